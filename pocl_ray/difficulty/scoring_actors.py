"""The actors of the scoring job: the student answers and reads the references, then the teacher reads them.

What passes from one to the other is a unit: a micro-batch of row ids with the student's signals and its final hidden
states of response tokens, from which the teacher's actor makes the student's logits again with the student's LM head.
Logits, a hundred times as large, never leave a process. Axes: N response tokens of a unit in one flat axis, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from pocl_ray.config import GenerationConfig
from pocl_ray.data.batching import MicroBatch, collate
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.signals import Signals, student_signals, teacher_signals
from pocl_ray.evaluation.actors import on_this_node
from pocl_ray.evaluation.generation import GenerationSettings, generate
from pocl_ray.evaluation.rouge import rouge_l_batch
from pocl_ray.models.head_files import load_head
from pocl_ray.models.heads import HeadWeights
from pocl_ray.models.hidden_cache import write_shard
from pocl_ray.models.live import LiveTeacher as FrozenModel  # a model without gradients, split into body and head
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.records import ID, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS
from pocl_ray.storage import RunDirectory, localize

IDS = "ids"
SHARD = "shard"
ANSWER_STOPPED = "answer_stopped"
STUDENT_COLUMNS = ("rouge_l", ANSWER_STOPPED, "ce_loss", "student_confidence")
_HIDDEN = "student_hidden"
_DTYPE = "student_dtype"
_MAX_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ScoringTask:
    """What the actors are told.

    Attributes:
        run_dir: The run directory.
        rows: Arrow file of the rows, relative to it.
        tokenizer: Tokenizer directory or Hub id.
        teacher: The frozen teacher.
        student: The untuned student; None where the teacher alone is run.
        generation: Of the student's answers.
        max_tokens: Prompt and answer together.
        seed: Of the answers.
        compare: Whether `teacher_student_kl` is measured.
        cache: Directory of the teacher cache, relative to the run directory; None for no cache.
        cache_dtype: Of its hidden states; None is the teacher's own.
        use_gpu: Whether actors run on a GPU.
    """

    run_dir: RunDirectory
    rows: str
    tokenizer: str
    teacher: ModelRef
    student: ModelRef | None
    generation: GenerationConfig
    max_tokens: int
    seed: int
    compare: bool
    cache: str | None
    cache_dtype: torch.dtype | None
    use_gpu: bool

    @property
    def device(self) -> str:
        """Where models run."""
        return "cuda" if self.use_gpu else "cpu"


@dataclass(frozen=True)
class _Unit:
    """The tensors of a micro-batch of rows."""

    ids: npt.NDArray[np.int64]
    batch: MicroBatch
    prompt_lengths_R: npt.NDArray[np.int64]
    response_lengths_R: npt.NDArray[np.int64]

    def hidden_of(self, model: FrozenModel) -> torch.Tensor:
        return model.hidden(self.batch.input_ids_BT, self.batch.attention_mask_BT, self.batch.response_index_N)


class _Reader:
    """The rows, mapped by each actor on its own node: tasks name rows by id."""

    def __init__(self, task: ScoringTask) -> None:
        self.task = task

    @cached_property
    def rows(self) -> RowStore:
        return RowStore.open(self.task.run_dir.local(self.task.rows))

    def unit(self, ids: npt.NDArray[np.int64]) -> _Unit:
        prompts, responses = self.rows.tokens(ids)
        batch = collate(prompts, responses, pad_id=0).to(self.task.device)
        return _Unit(ids, batch, _lengths(prompts), _lengths(responses))


class StudentActor(_Reader):
    """Answers each prompt and reads each reference with the untuned student."""

    @cached_property
    def model(self) -> FrozenModel:
        """The student."""
        assert self.task.student is not None
        return FrozenModel(on_this_node(self.task.student), self.task.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models."""
        return load_tokenizer(localize(self.task.tokenizer))

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Score the rows of one task.

        Args:
            units: `ids`, the row ids of each micro-batch.

        Yields:
            Each micro-batch with the student's signals by row, and its hidden states as bytes.
        """
        batches = [np.array(ids, dtype=np.int64) for ids in units[IDS].to_pylist()]
        answers = iter(self._answer(np.concatenate(batches)))
        for ids in batches:
            unit = self.unit(ids)
            hidden_NH = unit.hidden_of(self.model)
            signals = student_signals(hidden_NH, self.model.head.logits, unit.batch.targets_N, unit.response_lengths_R)
            rouge_l, stopped = zip(*(next(answers) for _ in ids), strict=True)
            yield _student_unit(ids, {**signals, "rouge_l": rouge_l, ANSWER_STOPPED: stopped}, self._payload(hidden_NH))

    def _answer(self, ids: npt.NDArray[np.int64]) -> list[tuple[float, bool]]:
        """ROUGE-L of each row's answer, and whether the answer came to an end."""
        prompts, _ = self.rows.tokens(ids)
        settings = GenerationSettings.of(self.task.generation, self.task.max_tokens, prompts)
        answers = generate(self.model.model, self.tokenizer, prompts, settings, self.task.seed)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        stopped = [len(answer) < limit for answer, limit in zip(answers, settings.limits(len(ids)), strict=True)]
        return list(zip(rouge_l_batch(texts, self.rows.references(ids)), stopped, strict=True))

    def _payload(self, hidden_NH: torch.Tensor) -> torch.Tensor | None:
        return hidden_NH.cpu().contiguous() if self.task.compare else None


class TeacherActor(_Reader):
    """Reads each reference with the teacher, and keeps its hidden states as shards of the teacher cache."""

    @cached_property
    def model(self) -> FrozenModel:
        """The teacher."""
        return FrozenModel(on_this_node(self.task.teacher), self.task.device)

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Score the rows of one task.

        Args:
            units: `ids`, the row ids of each micro-batch, and what `StudentActor` adds.

        Yields:
            One row for each row id: signals, lengths, and the shard that its hidden states are in.
        """
        scored: list[pa.Table] = []
        hidden: list[torch.Tensor] = []
        for index in range(units.num_rows):
            unit = self.unit(np.array(units[IDS][index].as_py(), dtype=np.int64))
            hidden_NH = unit.hidden_of(self.model)
            signals = self._signals(unit, hidden_NH, self._student_part(units, index))
            scored.append(_row_table(unit, signals, units, index))
            if self.task.cache is not None:
                hidden += hidden_NH.to("cpu", self.task.cache_dtype).split(unit.response_lengths_R.tolist())
                if sum(part.nbytes for part in hidden) >= _MAX_SHARD_BYTES:
                    yield self._finish(scored, hidden)
                    scored, hidden = [], []
        if scored:
            yield self._finish(scored, hidden)

    def _signals(
        self, unit: _Unit, hidden_NH: torch.Tensor, student: tuple[torch.Tensor, HeadWeights] | None
    ) -> Signals:
        other = None if student is None else (student[0], student[1].logits)
        return teacher_signals(hidden_NH, self.model.head.logits, unit.batch.targets_N, unit.response_lengths_R, other)

    def _student_part(self, units: pa.Table, index: int) -> tuple[torch.Tensor, HeadWeights] | None:
        """The student's hidden states of a unit, and its head in their dtype."""
        if _HIDDEN not in units.column_names:
            return None
        dtype = getattr(torch, units[_DTYPE][index].as_py())
        raw = np.frombuffer(units[_HIDDEN][index].as_buffer(), dtype=np.uint8).copy()
        head = self._student_head(dtype)
        hidden_NH = torch.from_numpy(raw).view(dtype).view(-1, head.hidden_size)
        return hidden_NH.to(self.task.device), head

    def _student_head(self, dtype: torch.dtype) -> HeadWeights:
        if not hasattr(self, "_head"):
            assert self.task.student is not None
            self._head = load_head(on_this_node(self.task.student), self.task.device, dtype)
        return self._head

    def _finish(self, scored: Sequence[pa.Table], hidden: Sequence[torch.Tensor]) -> pa.Table:
        table = pa.concat_tables(scored)
        name = None
        if self.task.cache is not None:
            run_dir = self.task.run_dir
            directory = run_dir.fs_path(self.task.cache)
            name = write_shard(directory, table[ID].to_numpy(), hidden, run_dir.filesystem).name
        return table.append_column(SHARD, pa.array([name] * table.num_rows, pa.string()))


def _student_unit(ids: npt.NDArray[np.int64], by_row: Mapping[str, Any], hidden_NH: torch.Tensor | None) -> pa.Table:
    columns = {IDS: pa.array([ids.tolist()], pa.list_(pa.int64()))}
    for name in STUDENT_COLUMNS:
        value_type = pa.bool_() if name == ANSWER_STOPPED else pa.float64()
        columns[name] = pa.array([list(by_row[name])], pa.list_(value_type))
    if hidden_NH is not None:
        payload = hidden_NH.view(torch.uint8).numpy().tobytes()
        columns[_HIDDEN] = pa.array([payload], pa.large_binary())
        columns[_DTYPE] = pa.array([str(hidden_NH.dtype).removeprefix("torch.")])
    return pa.table(columns)


def _row_table(unit: _Unit, signals: Signals, units: pa.Table, index: int) -> pa.Table:
    columns = {ID: pa.array(unit.ids)}
    for name in STUDENT_COLUMNS:
        if name in units.column_names:
            columns[name] = units[name][index].values
    columns |= {name: pa.array(values) for name, values in signals.items()}
    columns[NUM_PROMPT_TOKENS] = pa.array(unit.prompt_lengths_R)
    columns[NUM_RESPONSE_TOKENS] = pa.array(unit.response_lengths_R)
    return pa.table(columns)


def _lengths(rows: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    return np.array([len(row) for row in rows], dtype=np.int64)
