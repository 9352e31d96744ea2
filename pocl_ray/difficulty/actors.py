"""The actors of the scoring job: the student answers prompts and reads references, then the teacher reads them.

The student's actor sends units to the teacher's actor. A unit is a micro-batch of row ids with the student's signals
and its final hidden states of response tokens. The teacher's actor computes the student's logits from these with the
student's LM head. Logits are a hundred times as large and never leave a process. A set that only the teacher reads
(dev, for its cache) skips the student. Axes: N response tokens of a unit in one flat axis, R its rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from pocl_ray.answers.rouge import score_answers
from pocl_ray.config import GenerationConfig
from pocl_ray.data.batching import collate
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.choice import TokenSignal, load_signals
from pocl_ray.difficulty.ranking import TEACHER_SIGNALS
from pocl_ray.difficulty.signals import LmHead, Signals, check_finite, student_signals, teacher_signals
from pocl_ray.difficulty.tasks import (
    ANSWER_STOPPED,
    SET,
    STUDENT_DTYPE,
    STUDENT_HIDDEN,
    IntArray,
    Lengths,
    ids_of,
    row_table,
    student_unit,
    with_place,
)
from pocl_ray.heartbeat import advance, beat
from pocl_ray.models.frozen import LiveTeacher as FrozenModel  # any model without gradients, split into body and head
from pocl_ray.models.head_loading import load_head
from pocl_ray.models.heads import HeadSample, HeadWeights
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.records import ID
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.teacher_cache.top_k import TopK, concatenate, top_k_of
from pocl_ray.teacher_cache.writer import write_shard


class CacheUnitWriter(Protocol):
    """Keeps what the cache needs of the teacher's outputs for one unit: nothing, hidden states, or likeliest tokens.

    Further axes: C response tokens of a chunk, V vocabulary.
    """

    def watch(self, logits_CV: torch.Tensor) -> None:
        """Take the teacher's logits of the next tokens of the unit."""

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return the kept outputs of each row, on the CPU."""


class NoCache:
    """Keeps nothing, for a teacher that is not cached."""

    def watch(self, logits_CV: torch.Tensor) -> None:
        """Ignore the logits."""

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return an empty list."""
        return ()


class HiddenUnitWriter:
    """Keeps the hidden states."""

    def __init__(self, hidden_NH: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Take the hidden states of the unit, and the dtype to store them in; None keeps their dtype."""
        self.hidden_NH = hidden_NH.to("cpu", dtype or hidden_NH.dtype)

    def watch(self, logits_CV: torch.Tensor) -> None:
        """Ignore the logits, which can be computed from the hidden states."""

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return the hidden states of each row."""
        return self.hidden_NH.split(list(lengths))


class TopKUnitWriter:
    """Keeps the likeliest tokens of the vocabulary that both models share."""

    def __init__(
        self, top_k: int, student_vocab_size: int, teacher_dtype: torch.dtype, dtype: torch.dtype | None
    ) -> None:
        """Set up the writer of one unit.

        Args:
            top_k: Number of tokens to keep.
            student_vocab_size: Number of the student's logits, padding included.
            teacher_dtype: Dtype that the teacher computes in.
            dtype: Dtype of the log-probabilities; None: float32 for a teacher in float32, else float16.
        """
        self.top_k, self.student_vocab_size = top_k, student_vocab_size
        self.dtype = dtype or (torch.float32 if teacher_dtype == torch.float32 else torch.float16)
        self.parts: list[TopK] = []

    def watch(self, logits_CV: torch.Tensor) -> None:
        """Keep the likeliest tokens of a chunk."""
        self.parts.append(top_k_of(logits_CV[:, : self.student_vocab_size], self.top_k, self.dtype).to("cpu"))

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return the likeliest tokens of each row."""
        return concatenate(self.parts).split(lengths)


_MAX_SHARD_BYTES = 256 * 2**20
_SAMPLE_TOKENS = 4


@dataclass(frozen=True)
class ScoringTask:
    """The settings that the actors receive.

    Attributes:
        run_dir: Run directory; the paths below are relative to it.
        rows: Mapping of each set to the Arrow file of its rows.
        student_set: Set that the student reads; the teacher reads all sets.
        tokenizer: Directory of the tokenizer.
        student: Untuned student.
        teacher: Frozen teacher; None if no signal of the teacher is needed.
        generation: Settings of the student's answers.
        max_tokens: Maximum tokens of prompt and answer together.
        seed: Seed of the sampling of answers.
        compare: Whether `teacher_student_kl` and the signals of plug-ins are measured. The student's hidden states are
            then sent from actor to actor. It is False with two tokenizers.
        cache: Directory of the teacher caches, one cache for each set; None for no cache.
        cache_dtype: Dtype of the caches; `auto` is the teacher's dtype, except float16 for the top k of a bfloat16
            teacher.
        top_k: Number of tokens that the caches keep for each response token; None for hidden states.
        use_gpu: Whether actors run on a GPU.
        plugins: Names of signals that plug-ins measure; the plug-ins must be installed on every node.
        teacher_rows: Mapping of each set to the Arrow file of the same rows in the teacher's tokens; empty if both
            models share a tokenizer.
        batch_tokens: Padded tokens that a teacher with its own tokenizer reads at once, since micro-batches are cut by
            the student's lengths.
        answers: Whether the student answers the prompts, for `rouge_l`.
        reads_student: Whether the student reads the responses; if not, it only answers.
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
    teacher_rows: Mapping[str, str] = field(default_factory=dict)
    batch_tokens: int = 8192
    answers: bool = True
    reads_student: bool = True

    @property
    def device(self) -> str:
        """The device that models run on."""
        return "cuda" if self.use_gpu else "cpu"


@dataclass(frozen=True)
class _Read:
    """A model's output on a micro-batch: its hidden states, the tokens to predict, and their number in each row."""

    hidden_NH: torch.Tensor
    targets_N: torch.Tensor
    lengths_R: IntArray


class _Reader:
    """The rows, which each actor memory-maps on its node. Tasks name rows by id."""

    def __init__(self, task: ScoringTask) -> None:
        self.task = task
        self._stores: dict[str, RowStore] = {}

    def rows(self, name: str) -> RowStore:
        return self._store(self.task.rows[name])

    def lengths(self, name: str, ids: IntArray) -> Lengths:
        rows = self.rows(name)
        return rows.prompt_lengths[ids].astype(np.int64), rows.response_lengths[ids].astype(np.int64)

    def _store(self, rel: str) -> RowStore:
        if rel not in self._stores:
            self._stores[rel] = RowStore.open(self.task.run_dir.local(rel))
        return self._stores[rel]

    def read(self, model: FrozenModel, rows: RowStore, ids: IntArray) -> _Read:
        beat("scoring rows")
        batch = collate(*rows.tokens(ids), pad_id=0).to(self.task.device)
        hidden_NH = model.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N)
        return _Read(hidden_NH, batch.targets_N, rows.response_lengths[ids].astype(np.int64))


class StudentActor(_Reader):
    """Answers each prompt and reads each reference with the untuned student."""

    @cached_property
    def model(self) -> FrozenModel:
        """The student."""
        return FrozenModel(on_this_node(self.task.student), self.task.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return load_tokenizer(str(self.task.run_dir.local(self.task.tokenizer)))

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Score the rows of one task.

        Args:
            units: Table with `set` and `ids` (the row ids) of each micro-batch; all are of one set.

        Yields:
            Each micro-batch with the student's signals by row, and its hidden states as bytes. In a job without a
            teacher, the rows that `TeacherActor` yields.
        """
        name = units[SET][0].as_py()
        batches = ids_of(units)
        # The dev rows pass through: only the teacher reads them, and one job fills both caches.
        if name != self.task.student_set:
            yield from (student_unit(name, ids, None, None) for ids in batches)
            return
        is_answered = self.task.answers and self.rows(name).has_prompts
        # All prompts of the task at once: they are generated in batches of their own, larger than a micro-batch.
        answers = iter(self._answer(name, np.concatenate(batches)) if is_answered else [])
        for ids in batches:
            hidden_NH, signals = self._read_own(name, ids) if self.task.reads_student else (None, {})
            by_row: dict[str, Any] = dict(signals)
            if is_answered:
                by_row["rouge_l"], by_row[ANSWER_STOPPED] = zip(*(next(answers) for _ in ids), strict=True)
            if self.task.teacher is not None:
                yield student_unit(name, ids, by_row, hidden_NH if self.task.compare else None)
            else:
                scored = row_table(ids, self.lengths(name, ids), {}, student_unit(name, ids, by_row, None), 0, ())
                yield with_place(scored, name, shard=None)

    def _read_own(self, name: str, ids: IntArray) -> tuple[torch.Tensor, Signals]:
        """The student's hidden states of a micro-batch, and the signals that it gives alone."""
        read = self.read(self.model, self.rows(name), ids)
        signals = student_signals(read.hidden_NH, self.model.head.logits, read.targets_N, read.lengths_R)
        check_finite("student", name, self.rows(name), ids, read.hidden_NH, read.lengths_R, signals)
        advance(len(ids))
        return read.hidden_NH, signals

    def _answer(self, name: str, ids: IntArray) -> list[tuple[float, bool]]:
        """ROUGE-L of each row's answer, and whether the answer is complete."""
        task, rows = self.task, self.rows(name)
        return score_answers(self.model.model, self.tokenizer, rows, ids, task.generation, task.max_tokens, task.seed)


class TeacherActor(_Reader):
    """Reads each reference with the teacher, and writes the teacher's outputs as shards of the teacher cache."""

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
            units: Units of one set, as `StudentActor` yields them.

        Yields:
            One row for each row id: set, signals, lengths, and the shard of the cache that holds it.
        """
        name = units[SET][0].as_py()
        scored: list[pa.Table] = []
        kept: list[torch.Tensor | TopK] = []
        for index, ids in enumerate(ids_of(units)):
            read = self._read_own(name, ids)
            student = self._student_part(units, index)
            unit_writer = self._unit_writer(read.hidden_NH)
            # The writer sees each chunk's logits while the signals are computed: none are made twice or kept.
            signals = teacher_signals(
                read.hidden_NH,
                self.model.head.logits,
                read.targets_N,
                read.lengths_R,
                student,
                self.plugins if student is not None else {},
                unit_writer.watch,
            )
            outputs = unit_writer.rows(read.lengths_R.tolist())
            check_finite("teacher", name, self.rows(name), ids, read.hidden_NH, read.lengths_R, signals, outputs)
            names = (*TEACHER_SIGNALS, *self.task.plugins)
            advance(len(ids))
            scored.append(row_table(ids, self.lengths(name, ids), signals, units, index, names))
            kept += outputs
            if sum(part.nbytes for part in kept) >= _MAX_SHARD_BYTES:  # a task of long rows would fill the memory
                yield self._finish(name, scored, kept)
                scored, kept = [], []
        if scored:
            yield self._finish(name, scored, kept)

    def _read_own(self, name: str, ids: IntArray) -> _Read:
        """The teacher's output on rows in its own tokens, in parts within the token budget if tokenizers differ."""
        own = self.task.teacher_rows.get(name)
        if own is None:
            return self.read(self.model, self.rows(name), ids)
        rows = self._store(own)
        longest = int((rows.prompt_lengths[ids] + rows.response_lengths[ids]).max())
        num_parts = min(len(ids), -(-len(ids) * longest // self.task.batch_tokens))
        read = [self.read(self.model, rows, part) for part in np.array_split(ids, num_parts)]
        return _Read(
            torch.cat([part.hidden_NH for part in read]),
            torch.cat([part.targets_N for part in read]),
            np.concatenate([part.lengths_R for part in read]),
        )

    def _unit_writer(self, hidden_NH: torch.Tensor) -> CacheUnitWriter:
        task = self.task
        if task.cache is None:
            return NoCache()
        dtype = None if task.cache_dtype == "auto" else getattr(torch, task.cache_dtype)
        if task.top_k is None:
            return HiddenUnitWriter(hidden_NH, dtype)
        # Ids beyond the student's vocabulary are padding, which the student cannot predict.
        return TopKUnitWriter(task.top_k, self._student_head(hidden_NH.dtype).vocab_size, hidden_NH.dtype, dtype)

    def _student_part(self, units: pa.Table, index: int) -> tuple[torch.Tensor, LmHead] | None:
        """The student's hidden states of a unit, and its head in their dtype."""
        payload = units[STUDENT_HIDDEN][index]
        if not payload.is_valid:
            return None
        dtype = getattr(torch, units[STUDENT_DTYPE][index].as_py())
        head = self._student_head(dtype)
        # Copied: Arrow's buffer is read-only, and torch needs one that it may write to.
        raw = torch.from_numpy(np.frombuffer(payload.as_buffer(), dtype=np.uint8).copy())
        return raw.view(dtype).view(-1, head.hidden_size).to(self.task.device), head.logits

    def _student_head(self, dtype: torch.dtype) -> HeadWeights:
        if self._head is None:
            self._head = load_head(on_this_node(self.task.student), self.task.device, dtype)
        return self._head

    def _sample(self, name: str, row: int) -> HeadSample:
        """The teacher's own logits at the first response tokens of a row, to compare with those of the head on disk."""
        own = self.task.teacher_rows.get(name)
        prompts, responses = (self.rows(name) if own is None else self._store(own)).tokens([row])
        num_tokens = min(_SAMPLE_TOKENS, len(responses[0]))
        ids = np.concatenate([prompts[0], responses[0][:num_tokens]]).astype(np.int64)
        index_N = torch.arange(len(ids) - num_tokens - 1, len(ids) - 1, device=self.task.device).clamp_(min=0)
        return HeadSample.of(self.model.model, torch.from_numpy(ids)[None].to(self.task.device), index_N)

    def _finish(self, name: str, scored: Sequence[pa.Table], kept: Sequence[torch.Tensor | TopK]) -> pa.Table:
        table = pa.concat_tables(scored)
        shard = None
        if self.task.cache is not None:
            run_dir = self.task.run_dir
            directory = run_dir.fs_path(f"{self.task.cache}/{name}")
            ids = table[ID].to_numpy()
            sample = None if self.task.top_k is not None else self._sample(name, int(ids[0])).to_bytes()
            shard = write_shard(directory, ids, kept, run_dir.filesystem, sample).name
        return with_place(table, name, shard)
