"""Judges a student in memory on sets of rows: answers, and how well it predicts the references.

Axes: N the response tokens of a batch in one flat axis, H hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.answers.rouge import exact_match_batch, rouge_l_batch
from pocl_ray.config import Config, EvaluationConfig
from pocl_ray.data.batching import MicroBatch, collate
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.signals import comparison_signals, student_signals
from pocl_ray.evaluation.perplexity import reading_batches
from pocl_ray.heartbeat import beat
from pocl_ray.models.frozen import LiveTeacher
from pocl_ray.models.heads import HeadWeights, head_of, response_hidden
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory


@dataclass(frozen=True)
class JudgeTask:
    """The sets and settings with which students are judged.

    Attributes:
        run_dir: Run directory, with the rows.
        sets: Name -> Arrow file of its rows, relative to the run directory.
        teacher: Model that `kl` compares with; None if its tokenizer is another one, and there is no `kl`.
        tokenizer: Directory of the tokenizer, relative to the run directory.
        evaluation: Seeds of sampled answers, and how they are generated.
        max_tokens: Maximum tokens of prompt and answer together.
    """

    run_dir: RunDirectory
    sets: Mapping[str, str]
    teacher: ModelRef | None
    tokenizer: str
    evaluation: EvaluationConfig
    max_tokens: int


def judge_task(config: Config, run_dir: RunDirectory, sets: Mapping[str, RowsSummary], teacher: ModelRef) -> JudgeTask:
    """Return the task that judges students on `sets` as the config says."""
    return JudgeTask(
        run_dir=run_dir,
        sets={name: made.path for name, made in sets.items()},
        teacher=teacher if config.teacher.cross_tokenizer is None else None,
        tokenizer="tokenizer",
        evaluation=config.evaluation,
        max_tokens=config.data.max_tokens,
    )


class Judge:
    """Judges one student after the other; the teacher reads the rows once."""

    def __init__(self, task: JudgeTask, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Open the sets, and let the teacher read them.

        Raises:
            UserError: The teacher cannot be loaded.
        """
        self.task, self.tokenizer, self.device = task, tokenizer, device
        self.rows = {name: RowStore.open(task.run_dir.local(path)) for name, path in task.sets.items()}
        self.teacher_head: HeadWeights | None = None
        self._teacher_NH: dict[str, list[torch.Tensor]] = {}
        if task.teacher is not None:
            teacher = LiveTeacher(on_this_node(task.teacher), device)
            self.teacher_head = teacher.head
            for name, rows in self.rows.items():
                batches = (self._batch(rows, ids) for ids in reading_batches(rows))
                self._teacher_NH[name] = [
                    teacher.hidden(b.input_ids_BT, b.attention_mask_BT, b.response_index_N).cpu() for b in batches
                ]

    def judge(self, student: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Return for each set the figures of `statistics.FIGURES` that can be measured.

        There are no answers without prompts, and no `kl` without a teacher.
        `kl` is KL(teacher || student) at temperature 1, whatever was trained on; it and `ce_loss` are in nats, means
        over response tokens.
        """
        student.eval()
        figures = {}
        for name, rows in self.rows.items():
            figures[name] = self._reading(student, name, rows)
            if rows.has_prompts:
                figures[name].update(self._answers(student, rows))
        return figures

    @torch.no_grad()
    def _reading(self, student: PreTrainedModel, name: str, rows: RowStore) -> dict[str, float]:
        sums, num_tokens = {"ce_loss": 0.0, "kl": 0.0}, 0
        head = head_of(student)
        for place, ids in enumerate(reading_batches(rows)):
            beat("judging")
            batch, lengths_R = self._batch(rows, ids), rows.response_lengths[ids].astype(np.int64)
            student_NH = response_hidden(student, batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N)
            means = student_signals(student_NH, head.logits, batch.targets_N, lengths_R)
            sums["ce_loss"] += float(np.dot(means["ce_loss"], lengths_R))
            if self.teacher_head is not None:
                teacher_NH = self._teacher_NH[name][place].to(self.device)
                teacher, own = (teacher_NH, self.teacher_head.logits), (student_NH, head.logits)
                compared = comparison_signals(teacher, own, batch.targets_N, lengths_R)
                sums["kl"] += float(np.dot(compared["teacher_student_kl"], lengths_R))
            num_tokens += int(lengths_R.sum())
        found = {key: value / num_tokens for key, value in sums.items()}
        if self.teacher_head is None:
            del found["kl"]
        return found

    def _answers(self, student: PreTrainedModel, rows: RowStore) -> dict[str, float]:
        evaluation = self.task.evaluation
        prompts, _ = rows.tokens(range(len(rows)))
        references = rows.references(range(len(rows)))
        settings = GenerationSettings.of(evaluation.generation, self.task.max_tokens, prompts)
        seeds = [None, *evaluation.seeds]  # None: greedy
        scores = []
        for answers in generate(student, self.tokenizer, prompts, settings, seeds, range(len(rows))):
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            pairs = (rouge_l_batch(texts, references), exact_match_batch(texts, references))
            scores.append((statistics.fmean(pairs[0]), statistics.fmean(pairs[1])))
        (rouge_l, exact_match), *sampled = scores
        return {
            "rouge_l": rouge_l,
            "exact_match": exact_match,
            "sampled_rouge_l": statistics.fmean(score for score, _ in sampled),
            "sampled_exact_match": statistics.fmean(score for _, score in sampled),
        }

    def _batch(self, rows: RowStore, ids: np.ndarray) -> MicroBatch:
        return collate(*rows.tokens(ids), pad_id=0).to(self.device)
