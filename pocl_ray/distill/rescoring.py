"""Scoring between stages: the training workers, which hold the current student, share the rows and rank them again.

Each worker takes whole tasks of the plan that the first scoring used, reads them in eval mode and writes its figures
into an array of zeros; one sum over the workers gives everybody all figures, exactly. The ranking is then computed by
every worker for itself. Signals that do not depend on the student are those of the first scoring. What is sampled and
what shares a batch depends on lengths and seed alone, so neither the number of workers nor the ZeRO stage matters.

Axes: N response tokens of a batch in one flat axis, H hidden of the student, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.rouge import score_answers
from pocl_ray.difficulty.choice import choose_signals, load_signals
from pocl_ray.difficulty.ranking import STUDENT_SIGNALS, rank_rows
from pocl_ray.difficulty.signals import comparison_signals, student_signals
from pocl_ray.difficulty.tasks import MicroBatches, plan_tasks
from pocl_ray.distill.collectives import from_rank_zero
from pocl_ray.distill.engine import Engine
from pocl_ray.distill.feed import Feed, Teachers
from pocl_ray.distill.task import Rescoring, TrainTask
from pocl_ray.heartbeat import beat
from pocl_ray.models.heads import HeadWeights, head_of, split_model
from pocl_ray.records import ID, PREVIOUS_RANK, RANK, RRF_SCORE, Stage

ORDER = "order.safetensors"

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Rescorer:
    """Ranks the training rows by the student of an engine; every worker calls it."""

    def __init__(
        self,
        task: TrainTask,
        rescoring: Rescoring,
        engine: Engine,
        feed: Feed,
        tokenizer: PreTrainedTokenizerBase,
        student: Callable[[], PreTrainedModel],
        teacher_head: HeadWeights | None,
    ) -> None:
        """Find the signals that are measured again.

        Args:
            task: Task of the training run; its `scores` hold the signals that are measured once.
            rescoring: Signals, fusion, and settings of generation.
            engine: Engine, which knows the rank of this worker.
            feed: Feed of the training rows and the teachers; signals compare the student with the first teacher.
            tokenizer: Tokenizer that decodes answers.
            student: Source of the current student, complete and in eval mode; collective.
            teacher_head: LM head of the first teacher.
        """
        self.task, self.rescoring, self.engine, self.feed = task, rescoring, engine, feed
        self.tokenizer, self.student, self.teacher_head = tokenizer, student, teacher_head
        difficulty = rescoring.difficulty
        self.choice = choose_signals(difficulty)
        self.plugins = load_signals(self.choice.plugins)
        self.measured = [name for name in difficulty.signals if name in STUDENT_SIGNALS or name in self.plugins]
        self.compared = [name for name in self.measured if name == "teacher_student_kl" or name in self.plugins]
        assert not self.compared or teacher_head is not None, "a signal compares the student with a teacher"
        self.teachers = Teachers(feed.teachers.sources[:1] if self.compared else ())

    @cached_property
    def tasks(self) -> list[MicroBatches]:
        """The rows as the first scoring cut them."""
        rows, difficulty = self.feed.rows, self.rescoring.difficulty
        return plan_tasks(rows.prompt_lengths, rows.response_lengths, difficulty.shard_rows, difficulty.batch_tokens)

    def order(self, stage: Stage, previous: IntArray) -> IntArray:
        """Return a new ranking of all rows, and write a table of it (rank 0); collective.

        Args:
            stage: Stage that is about to begin.
            previous: Row ids in the order of the ranking before.

        Returns:
            Row ids, the easiest first.

        Raises:
            DataError: A signal is NaN for some row.
        """
        difficulty, seed = self.rescoring.difficulty, self.rescoring.seed
        figures = self._measure()
        fixed = [name for name in difficulty.signals if name not in figures]
        if fixed:
            assert self.task.scores is not None
            table = self.task.run_dir.read_table(self.task.scores, fixed)
            figures.update({name: table[name].to_numpy() for name in fixed})
        chosen = {name: figures[name] for name in difficulty.signals}
        rrf_score, rank = rank_rows(
            chosen, difficulty.rrf_k, difficulty.tie_break, seed, weights=difficulty.signals, easy=self.choice.easy
        )
        if self.engine.rank == 0:
            before = np.empty_like(rank)
            before[previous] = np.arange(1, len(previous) + 1)
            places = {PREVIOUS_RANK: before, RRF_SCORE: rrf_score, RANK: rank}
            self._write(stage, pa.table({ID: np.arange(len(rank)), **chosen, **places}))
        return np.argsort(rank, kind="stable")

    def clear(self) -> None:
        """Remove the tables of an earlier run, before the first stage; rank 0."""
        if self.engine.rank == 0:
            self.task.run_dir.delete(self.rescoring.folder)

    def _write(self, stage: Stage, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        rel = f"{self.rescoring.folder}/stage-{stage.index}.parquet"
        self.task.run_dir.write_bytes(rel, sink.getvalue().to_pybytes())

    @torch.no_grad()
    def _measure(self) -> dict[str, FloatArray]:
        """The student's signals of all rows; each worker measures its tasks."""
        model, rank, world_size = self.student(), self.engine.rank, self.engine.world_size
        found = {name: np.zeros(len(self.feed.rows)) for name in self.measured}
        for batches in self.tasks[rank::world_size]:
            if "rouge_l" in found:
                ids = np.concatenate(batches)
                found["rouge_l"][ids] = [score for score, _ in self._answers(model, ids)]
            if set(found) - {"rouge_l"}:
                for ids in batches:
                    for name, values_R in self._read(model, ids).items():
                        if name in found:
                            found[name][ids] = values_R
        stacked = torch.from_numpy(np.stack([found[name] for name in self.measured])).to(self.engine.device)
        dist.all_reduce(stacked)  # all but one worker have 0, so the sum is exactly that worker's figure
        return dict(zip(self.measured, stacked.cpu().numpy(), strict=True))

    def _answers(self, model: PreTrainedModel, ids: IntArray) -> list[tuple[float, bool]]:
        generation, seed = self.rescoring.difficulty.generation, self.rescoring.seed
        return score_answers(model, self.tokenizer, self.feed.rows, ids, generation, self.task.max_tokens, seed)

    def _read(self, model: PreTrainedModel, ids: IntArray) -> dict[str, FloatArray]:
        """The signals of a micro-batch that come from reading the responses."""
        beat("scoring rows")
        batch = self.feed.batch(ids, self.teachers).to(self.engine.device)
        lengths_R = self.feed.rows.response_lengths[ids].astype(np.int64)
        head = head_of(model)
        hidden_NH = split_model(model).response_hidden(*batch.rows_input)
        signals: dict[str, FloatArray] = {}
        if {"ce_loss", "student_confidence"} & set(self.measured):
            signals.update(student_signals(hidden_NH, head.logits, batch.targets_N, lengths_R))
        if self.compared:
            teacher_hidden_NK = batch.teacher_outputs[0].tokens
            assert isinstance(teacher_hidden_NK, torch.Tensor) and self.teacher_head is not None
            teacher = (teacher_hidden_NK, self.teacher_head.logits)
            student = (hidden_NH, head.logits)
            signals.update(comparison_signals(teacher, student, batch.targets_N, lengths_R, self.plugins))
        return signals


def write_order(order: IntArray, directory: Path) -> None:
    """Write the order of rows that a stage is a slice of into a checkpoint."""
    save_file({"order": order}, directory / ORDER)


def shared_order(directory: Path | None, device: torch.device) -> IntArray:
    """Return on every worker the order in a checkpoint, which rank 0 reads; collective.

    Args:
        directory: Directory of the checkpoint, on rank 0.
        device: Device of collective operations.
    """
    order = None if directory is None else load_file(directory / ORDER)["order"]
    return from_rank_zero(order, torch.int64, device)
