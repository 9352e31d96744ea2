"""The feed: from a stage's order of rows to micro-batches with the teacher's part, prepared ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from pocl_ray.data.batching import (
    Layout,
    MicroBatch,
    TeacherOutput,
    TeacherRows,
    collate,
    global_batches,
    pack,
)
from pocl_ray.data.row_store import Pairs, RowStore
from pocl_ray.distill.deepspeed_import import import_deepspeed
from pocl_ray.distill.rollout_schedule import Source
from pocl_ray.distill.task import TeacherTask, TrainTask
from pocl_ray.models.frozen import LiveTeacher, ShardedTeacher
from pocl_ray.models.head_loading import load_head
from pocl_ray.models.heads import HeadWeights
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.teacher_cache.reader import HiddenCache, TopKCache
from pocl_ray.teacher_cache.top_k import TopK


@dataclass(frozen=True)
class TeacherSource:
    """The source of one teacher's outputs for the rows of one set.

    Attributes:
        cache: Cache of the teacher; None if it runs live.
        live: Live teacher; None if it is cached.
        index: Index of the teacher among the run's teachers.
        weight: Weight of the teacher's divergence.
        stages: Stages that use the teacher; None for all.
        rows: Rows in the teacher's own tokens; None if it shares the student's tokenizer.
    """

    cache: HiddenCache | TopKCache | None = None
    live: LiveTeacher | ShardedTeacher | None = None
    index: int = 0
    weight: float = 1.0
    stages: tuple[int, ...] | None = None
    rows: RowStore | None = None

    def stored(self, ids: np.ndarray, lengths_R: np.ndarray) -> TeacherOutput | None:
        """Return the cached outputs for rows whose responses have these lengths; None if the teacher runs live."""
        if self.cache is None:
            return None
        tokens = self.cache.take(ids)
        return self._with_teacher_outputs(
            tokens, None if self.rows is None else Pairs.of(lengths_R, self.rows.response_lengths[ids])
        )

    def asked(self, batch: MicroBatch) -> TeacherOutput | None:
        """Return the live teacher's output for a batch; None if the teacher is cached."""
        if self.live is None:
            return None
        own = batch.teacher_rows
        read, pairs = (batch, None) if own is None else (own.batch, own.pairs)
        if not self.live.reads_packed:
            read = read.padded()
        tokens = self.live.hidden(*read.rows_input)
        return self._with_teacher_outputs(tokens, pairs)

    def _with_teacher_outputs(self, tokens: torch.Tensor | TopK, pairs: Pairs | None) -> TeacherOutput:
        if pairs is None:
            return TeacherOutput(tokens, self.index, self.weight)
        assert isinstance(tokens, torch.Tensor), "over two tokenizers hidden states are compared"
        # A cache holds all of the teacher's response tokens; the loss compares those with a counterpart alone.
        if not pairs.teacher_M.all():
            tokens = tokens[torch.from_numpy(np.flatnonzero(pairs.teacher_M)).to(tokens.device)]
        return TeacherOutput(tokens, self.index, self.weight, torch.from_numpy(pairs.student_N))


@dataclass(frozen=True)
class Teachers:
    """The teachers of a set, or the ones that a stage uses."""

    sources: tuple[TeacherSource, ...] = ()

    def in_stage(self, stage: int | None) -> Teachers:
        """Return the teachers that a stage uses (None: all teachers), with weights that sum to 1."""
        chosen = [one for one in self.sources if stage is None or one.stages is None or stage in one.stages]
        # To 1 in every stage: kd_ratio then weighs the divergence the same, however many teachers a stage has.
        total = sum(one.weight for one in chosen)
        return Teachers(tuple(replace(one, weight=one.weight / total) for one in chosen))

    def stored(self, ids: np.ndarray, lengths_R: np.ndarray) -> tuple[TeacherOutput, ...]:
        """Return the cached outputs for rows, without those of live teachers.

        Args:
            ids: Row ids.
            lengths_R: Number of the student's response tokens of each row.
        """
        return tuple(
            teacher_outputs for one in self.sources if (teacher_outputs := one.stored(ids, lengths_R)) is not None
        )

    def own_rows(self, ids: np.ndarray, lengths_R: np.ndarray) -> TeacherRows | None:
        """Return rows in the tokens of a live teacher with another tokenizer; None if there is no such teacher."""
        for one in self.sources:
            if one.live is not None and one.rows is not None:
                tokens = one.rows.tokens(ids)
                batch = pack(*tokens) if one.live.reads_packed else collate(*tokens, pad_id=0)
                return TeacherRows(batch, Pairs.of(lengths_R, one.rows.response_lengths[ids]))
        return None

    def teach(self, batch: MicroBatch) -> MicroBatch:
        """Return the batch with the outputs of the live teachers added."""
        asked = tuple(teacher_outputs for one in self.sources if (teacher_outputs := one.asked(batch)) is not None)
        return replace(batch, teacher_outputs=batch.teacher_outputs + asked, teacher_rows=None)


@dataclass(frozen=True)
class LoadedTeacher:
    """The parts of a teacher that a worker holds in memory.

    Attributes:
        task: Task of the teacher.
        head: LM head of the teacher; None if its likeliest tokens are cached.
        live: Live teacher; None if it is cached.
    """

    task: TeacherTask
    head: HeadWeights | None
    live: LiveTeacher | ShardedTeacher | None


def load_teachers(task: TrainTask, device: torch.device) -> list[LoadedTeacher]:
    """Return for each teacher the parts that the loss needs: the LM head for hidden states, else the model.

    Raises:
        UserError: A teacher cannot be loaded.
    """
    loaded = []
    for one in task.teachers:
        ref = on_this_node(one.ref)
        if one.cache is not None and task.distill.teacher_cache == "topk":
            loaded.append(LoadedTeacher(one, None, None))  # the cache holds probabilities: no weight is needed
        elif one.cache is not None:  # the head alone turns cached hidden states into the full distribution
            loaded.append(LoadedTeacher(one, load_head(ref, device=device), None))
        else:
            live = _sharded(ref, device) if one.sharded else LiveTeacher(ref, device)
            loaded.append(LoadedTeacher(one, live.head, live))
    return loaded


def _sharded(ref: ModelRef, device: torch.device) -> ShardedTeacher:
    import_deepspeed(device)
    return ShardedTeacher(ref, device)


def teachers_of(
    task: TrainTask, made: RowsSummary, loaded: Sequence[LoadedTeacher], num_student_logits: int
) -> Teachers:
    """Return the teachers of a set of rows, with their caches opened.

    Raises:
        StorageError: A cache is missing, damaged, or of another teacher or other rows.
    """
    sources = []
    for index, one in enumerate(loaded):
        own = None if one.task.rows is None else one.task.rows[made.name]
        read = made if own is None else own
        cache: HiddenCache | TopKCache | None = None
        if one.task.cache is not None:
            directory = task.run_dir.local(f"{one.task.cache}/{made.name}")
            # A cache of another teacher or of other rows has the same shape, and would teach without any error.
            expected = (one.task.fingerprint, read.fingerprint, read.num_rows)
            if task.distill.teacher_cache == "topk":
                cache = TopKCache.open(directory, *expected)
                cache.check(task.distill.top_k, num_student_logits)
            else:
                cache = HiddenCache.open(directory, *expected)
                assert one.head is not None
                cache.check_head(one.head, one.task.ref.path)
        rows = None if own is None else RowStore.open(task.run_dir.local(own.path))
        assert rows is None or len(rows) == made.num_rows, "the teacher's rows are the student's, by id"
        sources.append(TeacherSource(cache, one.live, index, one.task.weight, one.task.stages, rows))
    return Teachers(tuple(sources))


@dataclass(frozen=True)
class GlobalBatch:
    """One worker's part of an optimizer step.

    Attributes:
        micro_batches: Micro-batches of this worker.
        num_rows: Number of rows over all workers.
        num_response_tokens: Number of response tokens over all workers.
        ids: Row ids over all workers.
        source: Source of the responses: the rows, the student now, or the student earlier (replayed).
    """

    micro_batches: list[MicroBatch]
    num_rows: int
    num_response_tokens: int
    ids: np.ndarray
    source: Source = "data"


Respond = Callable[[GlobalBatch], GlobalBatch]


class Feed:
    """Rows of one set as micro-batches; a thread reads one global batch ahead."""

    def __init__(
        self,
        rows: RowStore,
        layout: Layout,
        rank: int,
        world_size: int,
        teachers: Teachers | None = None,
    ) -> None:
        """Set the feed up.

        Args:
            rows: Rows of the set.
            layout: How rows share forward passes.
            rank: Rank of this worker.
            world_size: Number of workers.
            teachers: Sources of the teachers' outputs; without any, batches have none.
        """
        self.rows = rows
        self.layout = layout
        self.rank, self.world_size = rank, world_size
        self.teachers = teachers or Teachers()
        self.lengths = rows.prompt_lengths + rows.response_lengths

    def stage(
        self,
        stage: Stage,
        stage_rows: np.ndarray,
        global_batch_rows: int,
        seed: int,
        first_step: int,
        respond: Respond | None = None,
    ) -> Generator[GlobalBatch, None, None]:
        """Yield the global batches of a stage from `first_step` on; closing it stops the reading ahead.

        `respond` may put other responses into a batch, which the teachers then teach whatever the stage's `kd_ratio`.
        It is called when the batch is asked for, not ahead.
        """
        ids = global_batches(stage, stage_rows, global_batch_rows, seed, first_step)
        teachers = self.teachers.in_stage(stage.index) if stage.uses_teacher or respond else Teachers()
        # One batch ahead hides the reading behind the step. More would hold more cached hidden states, and a step that
        # is faster than its reading would not get faster by it.
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            ahead: Future[GlobalBatch] | None = None
            for batch_ids in ids:
                # What needs the device comes after the wait, in the caller's thread: a live teacher may be collective,
                # and a rollout needs the weights of this step, which do not exist while the batch is read.
                behind, ahead = ahead, pool.submit(self._global_batch, batch_ids, teachers)
                if behind is not None:
                    yield _with_teacher_outputs(behind.result(), teachers, respond)
            if ahead is not None:
                yield _with_teacher_outputs(ahead.result(), teachers, respond)

    def batch(self, ids: np.ndarray, teachers: Teachers) -> MicroBatch:
        """Return the rows of these ids as one micro-batch, with the part of these teachers.

        It is padded, as the first scoring pads: packed rows would change the last digits of signals that the ranks of
        the two are compared by.
        """
        return teachers.teach(self._micro_batch(ids, teachers, replace(self.layout, is_packed=False)))

    def evaluation(self, ids: np.ndarray | None = None, stage: int | None = None) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield this worker's micro-batches of the set, and whether each of them counts.

        Every worker gets equally many, since the forward pass may be collective: those that come out short repeat
        their last one, which does not count.

        Args:
            ids: Row ids; None for all rows.
            stage: Stage whose teachers are used. None for all teachers whatever their stages, so that the losses of
                stages can be compared.
        """
        teachers = self.teachers.in_stage(stage)
        ids = np.arange(len(self.lengths)) if ids is None else ids
        # The longest first: rows of a micro-batch are then alike, and a lack of memory shows at the first one.
        order = ids[np.argsort(-self.lengths[ids], kind="stable")]
        for part in self.layout.deal(self.lengths[order], self.rank, self.world_size):
            counts = len(part) > 0
            batch = self._micro_batch(order[part] if counts else order[-1:], teachers)
            yield teachers.teach(batch), counts

    def _global_batch(self, ids: np.ndarray, teachers: Teachers) -> GlobalBatch:
        assert len(ids) % self.world_size == 0, "a global batch is a multiple of the number of workers"
        mine = self.layout.deal(self.lengths[ids], self.rank, self.world_size)
        # The token count is that of the whole batch, known from the lengths of its rows: it divides the loss on every
        # worker, and no worker has to ask the others for theirs.
        return GlobalBatch(
            [self._micro_batch(ids[part], teachers) for part in mine],
            len(ids),
            int(self.rows.response_lengths[ids].sum()),
            ids,
        )

    def _micro_batch(self, ids: np.ndarray, teachers: Teachers, layout: Layout | None = None) -> MicroBatch:
        batch = (layout or self.layout).collate(*self.rows.tokens(ids))
        lengths_R = self.rows.response_lengths[ids]
        return replace(
            batch,
            teacher_outputs=teachers.stored(ids, lengths_R),
            teacher_rows=teachers.own_rows(ids, lengths_R),
            row_ids_B=ids,
        )


def _with_teacher_outputs(batch: GlobalBatch, teachers: Teachers, respond: Respond | None) -> GlobalBatch:
    if respond is not None:
        batch = respond(batch)  # first: the teachers teach the responses that the student wrote
    return replace(batch, micro_batches=[teachers.teach(part) for part in batch.micro_batches])
