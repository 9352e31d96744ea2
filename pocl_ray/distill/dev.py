"""Dev figures during training: losses on the reference responses, and ROUGE-L of generated ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.answers.rouge import exact_match_batch, rouge_l_batch
from pocl_ray.config import GenerationConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.signals import student_signals
from pocl_ray.distill.engine import Engine, InferenceStudent
from pocl_ray.distill.feed import Feed
from pocl_ray.distill.gaps import FloatArray, IntArray, RowGaps
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import StepSettings
from pocl_ray.heartbeat import beat
from pocl_ray.models.heads import head_of, split_model
from pocl_ray.run_directory.storage import RunDirectory


class DevEvaluator:
    """Evaluates an engine's student on the dev rows; collective, every worker calls it."""

    def __init__(
        self,
        engine: Engine,
        feed: Feed,
        tokenizer: PreTrainedTokenizerBase,
        settings: StepSettings,
        generation: GenerationConfig,
        max_rows: int | None,
        max_tokens: int,
        seed: int,
        student: InferenceStudent,
    ) -> None:
        """Choose the dev rows that answers are generated for.

        Args:
            engine: Engine with the student.
            feed: Dev rows, with the teacher's outputs if there is a teacher.
            tokenizer: Tokenizer that decodes answers.
            settings: Settings of the dev losses, with one temperature for all stages, so that they can be compared.
            generation: Settings of the answers.
            max_rows: Number of rows that answers are generated for; None for all, 0 for none.
            max_tokens: Maximum tokens of prompt and answer together.
            seed: Seed of sampled answers.
            student: Student that generates.
        """
        self.engine, self.feed, self.tokenizer = engine, feed, tokenizer
        self.settings, self.generation = settings, generation
        self.num_rows = len(feed.rows) if max_rows is None else min(len(feed.rows), max_rows)
        self.max_tokens, self.seed = max_tokens, seed
        self.student = student

    def evaluate(self) -> dict[str, float]:
        """Return dev figures: losses per token, and ROUGE-L and exact match, 0 to 100, if any prompts are answered."""
        figures = self._losses()
        if self.feed.rows.has_prompts and self.num_rows:
            figures.update(self._answers(self.feed.rows))
        return figures

    def row_losses(self) -> dict[str, FloatArray]:
        """Return `ce_loss` of each dev row, and `kl` with a teacher: means over response tokens at temperature 1.

        Not a number where a loss is not finite. Measuring changes nothing in training.
        """
        found = {"ce_loss": self._row_ce()}
        if self.settings.kd_ratio > 0:
            lengths_R = self.feed.rows.response_lengths
            gaps = RowGaps(np.full(len(lengths_R), np.nan), lengths_R, self.engine.device)
            measure_gaps(self.engine, self.feed, gaps, None, None)
            gaps.settle()
            found["kl"] = gaps.values_R
        return found

    @torch.no_grad()
    def _row_ce(self) -> FloatArray:
        model, lengths_R = self.student.current(), self.feed.rows.response_lengths
        head = head_of(model)
        losses_R = torch.zeros(len(lengths_R), dtype=torch.float64, device=self.engine.device)
        for batch, counts in self.feed.evaluation():
            if not counts:
                continue
            beat("evaluating")
            here, ids = batch.to(self.engine.device), batch.row_ids_B
            assert ids is not None, "a set's own rows have ids"
            hidden_NH = split_model(model).response_hidden(*here.rows_input)
            means = student_signals(hidden_NH, head.logits, here.targets_N, lengths_R[ids].astype(np.int64))
            losses_R[torch.from_numpy(ids)] = torch.from_numpy(means["ce_loss"]).to(losses_R)
        dist.all_reduce(losses_R)
        return losses_R.cpu().numpy()

    def _losses(self) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        for batch, counts in self.feed.evaluation():
            losses = self.engine.evaluate(batch, self.settings)
            if counts:
                sums[:3] += losses
                sums[3] += batch.num_response_tokens
        dist.all_reduce(sums)
        _, ce_sum, kd_sum, num_tokens = sums.tolist()
        figures = {"eval/dev/ce_loss": ce_sum / num_tokens}
        if self.settings.kd_ratio > 0:
            figures["eval/dev/kd_loss"] = kd_sum / num_tokens
        return figures

    def _answers(self, rows: RowStore) -> dict[str, float]:
        ids = np.arange(self.engine.rank, self.num_rows, self.engine.world_size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        model = self.student.current()
        if len(ids):
            prompts, _ = rows.tokens(ids)
            settings = GenerationSettings.of(self.generation, self.max_tokens, prompts)
            (answers,) = generate(model, self.tokenizer, prompts, settings, [self.seed], ids.tolist())
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            references = rows.references(ids)
            sums[0] = sum(rouge_l_batch(texts, references))
            sums[1] = sum(exact_match_batch(texts, references))
        dist.all_reduce(sums)
        rouge_l, exact_match = (sums / self.num_rows).tolist()
        return {"eval/dev/rouge_l": rouge_l, "eval/dev/exact_match": exact_match}


def measure_gaps(engine: Engine, feed: Feed, gaps: RowGaps, ids: IntArray | None, stage: int | None) -> None:
    """Let the student read some rows of a feed, None for all, with a stage's teachers, and note their gaps."""
    plain = StepSettings(1.0, 1.0, resolve_loss("forward_kl"))
    for batch, counts in feed.evaluation(ids, stage):
        meter = gaps.meter(batch, engine.device) if counts else None
        engine.evaluate(batch, replace(plain, gap_meter=meter))
        gaps.end_step(0)


def write_row_losses(run_dir: RunDirectory, path: str, losses: Mapping[str, FloatArray]) -> None:
    """Write the losses of dev rows as Parquet, one column a figure."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({figure: pa.array(values) for figure, values in losses.items()}), sink)
    run_dir.write_bytes(path, sink.getvalue().to_pybytes())


def read_row_losses(run_dir: RunDirectory, path: str, figure: str) -> FloatArray:
    """Return one figure of the dev rows from a file of `write_row_losses`."""
    table = pq.read_table(pa.BufferReader(run_dir.read_bytes(path)), columns=[figure])
    return table[figure].to_numpy().astype(np.float64)
