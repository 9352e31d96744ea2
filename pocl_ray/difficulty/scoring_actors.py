"""The actors of the scoring job: the student answers prompts and reads references, then the teacher reads them.

What passes from one to the other is a unit: a micro-batch of row ids with the student's signals and its final hidden
states of response tokens, from which the teacher's actor makes the student's logits again with the student's LM head.
Logits, a hundred times as large, never leave a process. Units of a set that only the teacher reads (dev, for its
cache) pass the student by. Axes: N response tokens of a unit in one flat axis, R its rows, H hidden.
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
from pocl_ray.difficulty.answers import score_answers
from pocl_ray.difficulty.choice import TokenSignal, load_signals
from pocl_ray.difficulty.keeping import HiddenKept, Keeper, NothingKept, TopKKept
from pocl_ray.difficulty.ranking import TEACHER_SIGNALS
from pocl_ray.difficulty.signals import LmHead, Signals, student_signals, teacher_signals
from pocl_ray.models.head_files import load_head
from pocl_ray.models.heads import HeadWeights
from pocl_ray.models.hidden_cache import write_shard
from pocl_ray.models.live import LiveTeacher as FrozenModel  # a model without gradients, split into body and head
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.models.top_k import TopK
from pocl_ray.pulse import beat
from pocl_ray.records import ID, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS
from pocl_ray.storage import RunDirectory

SET = "set"
IDS = "ids"
SHARD = "shard"
ANSWER_STOPPED = "answer_stopped"
STUDENT_COLUMNS = {
    "rouge_l": pa.float64(),
    ANSWER_STOPPED: pa.bool_(),
    "ce_loss": pa.float64(),
    "student_confidence": pa.float64(),
}
_HIDDEN = "student_hidden"
_DTYPE = "student_dtype"
_MAX_SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ScoringTask:
    """What the actors are told.

    Attributes:
        run_dir: The run directory; the paths below are relative to it.
        rows: Set -> Arrow file of its rows.
        student_set: The set that the student is run on; the teacher is run on all.
        tokenizer: Tokenizer directory.
        student: The untuned student.
        teacher: The frozen teacher; None where the student's signals are all.
        generation: Of the student's answers.
        max_tokens: Prompt and answer together.
        seed: Of the answers.
        compare: Whether `teacher_student_kl` and the signals of plug-ins are measured.
        cache: Directory of the teacher caches, one for each set; None for no cache.
        cache_dtype: Of what they hold; `auto` is the teacher's own, for the top k float16 where that is bfloat16.
        top_k: The tokens that they keep of each response token; None for hidden states.
        use_gpu: Whether actors run on a GPU.
        plugins: Signals that plug-ins measure.
    """

    run_dir: RunDirectory
    rows: dict[str, str]
    student_set: str
    tokenizer: str
    student: ModelRef
    teacher: ModelRef | None
    generation: GenerationConfig
    max_tokens: int
    seed: int
    compare: bool
    cache: str | None
    cache_dtype: str
    use_gpu: bool
    plugins: tuple[str, ...] = ()
    top_k: int | None = None

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
        self._stores: dict[str, RowStore] = {}

    def rows(self, name: str) -> RowStore:
        if name not in self._stores:
            self._stores[name] = RowStore.open(self.task.run_dir.local(self.task.rows[name]))
        return self._stores[name]

    def unit(self, name: str, ids: npt.NDArray[np.int64]) -> _Unit:
        beat("scoring rows")
        prompts, responses = self.rows(name).tokens(ids)
        batch = collate(prompts, responses, pad_id=0).to(self.task.device)
        return _Unit(ids, batch, _lengths(prompts), _lengths(responses))


class StudentActor(_Reader):
    """Answers each prompt and reads each reference with the untuned student."""

    @cached_property
    def model(self) -> FrozenModel:
        """The student."""
        return FrozenModel(on_this_node(self.task.student), self.task.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models."""
        return load_tokenizer(str(self.task.run_dir.local(self.task.tokenizer)))

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Score the rows of one task.

        Args:
            units: `set` and `ids` (the row ids) of each micro-batch; all of one set.

        Yields:
            Each micro-batch with the student's signals by row, and its hidden states as bytes; without a teacher, who
            would come next, what `TeacherActor` yields.
        """
        name = units[SET][0].as_py()
        batches = _ids_of(units)
        if name != self.task.student_set:
            yield from (_student_unit(name, ids, None, None) for ids in batches)
            return
        has_prompts = self.rows(name).has_prompts
        answers = iter(self._answer(name, np.concatenate(batches)) if has_prompts else [])
        for ids in batches:
            unit = self.unit(name, ids)
            hidden_NH = unit.hidden_of(self.model)
            signals = student_signals(hidden_NH, self.model.head.logits, unit.batch.targets_N, unit.response_lengths_R)
            by_row: dict[str, Any] = dict(signals)
            if has_prompts:
                by_row["rouge_l"], by_row[ANSWER_STOPPED] = zip(*(next(answers) for _ in ids), strict=True)
            if self.task.teacher is not None:
                yield _student_unit(name, ids, by_row, hidden_NH if self.task.compare else None)
            else:
                scored = _row_table(unit, {}, _student_unit(name, ids, by_row, None), 0, ())
                yield _with_place(scored, name, shard=None)

    def _answer(self, name: str, ids: npt.NDArray[np.int64]) -> list[tuple[float, bool]]:
        """ROUGE-L of each row's answer, and whether the answer came to an end."""
        task = self.task
        rows = self.rows(name)
        return score_answers(self.model.model, self.tokenizer, rows, ids, task.generation, task.max_tokens, task.seed)


class TeacherActor(_Reader):
    """Reads each reference with the teacher, and keeps what it says as shards of the teacher cache."""

    def __init__(self, task: ScoringTask) -> None:
        super().__init__(task)
        self._head: HeadWeights | None = None

    @cached_property
    def plugins(self) -> dict[str, TokenSignal]:
        """Signals of plug-ins, by name."""
        return load_signals(self.task.plugins)

    @cached_property
    def model(self) -> FrozenModel:
        """The teacher."""
        assert self.task.teacher is not None, "the job has no teacher"
        return FrozenModel(on_this_node(self.task.teacher), self.task.device)

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Score the rows of one task.

        Args:
            units: What `StudentActor` gives, of one set.

        Yields:
            One row for each row id: set, signals, lengths, and the shard of the cache that it is in.
        """
        name = units[SET][0].as_py()
        scored: list[pa.Table] = []
        kept: list[torch.Tensor | TopK] = []
        for index, ids in enumerate(_ids_of(units)):
            unit = self.unit(name, ids)
            hidden_NH = unit.hidden_of(self.model)
            student = self._student_part(units, index)
            keeper = self._keeper(hidden_NH)
            signals = teacher_signals(
                hidden_NH,
                self.model.head.logits,
                unit.batch.targets_N,
                unit.response_lengths_R,
                student,
                self.plugins if student is not None else {},
                keeper.watch,
            )
            scored.append(_row_table(unit, signals, units, index, (*TEACHER_SIGNALS, *self.task.plugins)))
            kept += keeper.rows(unit.response_lengths_R.tolist())
            if sum(part.nbytes for part in kept) >= _MAX_SHARD_BYTES:
                yield self._finish(name, scored, kept)
                scored, kept = [], []
        if scored:
            yield self._finish(name, scored, kept)

    def _keeper(self, hidden_NH: torch.Tensor) -> Keeper:
        task = self.task
        if task.cache is None:
            return NothingKept()
        dtype = None if task.cache_dtype == "auto" else getattr(torch, task.cache_dtype)
        if task.top_k is None:
            return HiddenKept(hidden_NH, dtype)
        # What lies beyond the student's vocabulary is padding, in which no student can follow the teacher.
        return TopKKept(task.top_k, self._student_head(hidden_NH.dtype).vocab_size, hidden_NH.dtype, dtype)

    def _student_part(self, units: pa.Table, index: int) -> tuple[torch.Tensor, LmHead] | None:
        """The student's hidden states of a unit, and its head in their dtype."""
        payload = units[_HIDDEN][index]
        if not payload.is_valid:
            return None
        dtype = getattr(torch, units[_DTYPE][index].as_py())
        head = self._student_head(dtype)
        raw = torch.from_numpy(np.frombuffer(payload.as_buffer(), dtype=np.uint8).copy())
        return raw.view(dtype).view(-1, head.hidden_size).to(self.task.device), head.logits

    def _student_head(self, dtype: torch.dtype) -> HeadWeights:
        if self._head is None:
            self._head = load_head(on_this_node(self.task.student), self.task.device, dtype)
        return self._head

    def _finish(self, name: str, scored: Sequence[pa.Table], kept: Sequence[torch.Tensor | TopK]) -> pa.Table:
        table = pa.concat_tables(scored)
        shard = None
        if self.task.cache is not None:
            run_dir = self.task.run_dir
            directory = run_dir.fs_path(f"{self.task.cache}/{name}")
            shard = write_shard(directory, table[ID].to_numpy(), kept, run_dir.filesystem).name
        return _with_place(table, name, shard)


def _with_place(table: pa.Table, name: str, shard: str | None) -> pa.Table:
    table = table.append_column(SET, pa.array([name] * table.num_rows, pa.string()))
    return table.append_column(SHARD, pa.array([shard] * table.num_rows, pa.string()))


def unit_table(name: str, batches: Sequence[npt.NDArray[np.int64]]) -> pa.Table:
    """Return the input of one task: the set and the row ids of each of its micro-batches."""
    ids = pa.array([batch.tolist() for batch in batches], pa.list_(pa.int64()))
    return pa.table({SET: pa.array([name] * len(batches), pa.string()), IDS: ids})


def unscored_units(name: str, batches: Sequence[npt.NDArray[np.int64]]) -> pa.Table:
    """Return the input of one task of a `TeacherActor` that no student comes before."""
    return pa.concat_tables(_student_unit(name, ids, None, None) for ids in batches)


def _ids_of(units: pa.Table) -> list[npt.NDArray[np.int64]]:
    return [np.array(ids, dtype=np.int64) for ids in units[IDS].to_pylist()]


def _student_unit(
    name: str, ids: npt.NDArray[np.int64], by_row: Mapping[str, Any] | None, hidden_NH: torch.Tensor | None
) -> pa.Table:
    table = unit_table(name, [ids])
    for column, value_type in STUDENT_COLUMNS.items():
        values = list(by_row[column]) if by_row is not None and column in by_row else None
        table = table.append_column(column, pa.array([values], pa.list_(value_type)))
    payload = None if hidden_NH is None else hidden_NH.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    dtype = None if hidden_NH is None else str(hidden_NH.dtype).removeprefix("torch.")
    table = table.append_column(_HIDDEN, pa.array([payload], pa.large_binary()))
    return table.append_column(_DTYPE, pa.array([dtype], pa.string()))


def _row_table(unit: _Unit, signals: Signals, units: pa.Table, index: int, names: Sequence[str]) -> pa.Table:
    columns = {ID: pa.array(unit.ids)}
    for name, value_type in STUDENT_COLUMNS.items():
        values = units[name][index]
        columns[name] = values.values if values.is_valid else pa.nulls(len(unit.ids), value_type)
    for name in names:
        values = signals.get(name)
        columns[name] = pa.nulls(len(unit.ids), pa.float64()) if values is None else pa.array(values)
    columns[NUM_PROMPT_TOKENS] = pa.array(unit.prompt_lengths_R)
    columns[NUM_RESPONSE_TOKENS] = pa.array(unit.response_lengths_R)
    return pa.table(columns)


def _lengths(rows: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    return np.array([len(row) for row in rows], dtype=np.int64)
