"""The feed: from a stage's order of rows to micro-batches with the teacher's part, prepared ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from pocl_ray.data.batching import MicroBatch, collate, global_batches, rank_micro_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.rollout_schedule import Source
from pocl_ray.distill.teachers import Teachers
from pocl_ray.records import Stage


@dataclass(frozen=True)
class GlobalBatch:
    """One worker's part of an optimizer step.

    Attributes:
        micro_batches: What this worker runs.
        num_rows: Rows over all workers.
        num_response_tokens: Response tokens over all workers.
        ids: Row ids over all workers.
        source: Who wrote the responses: the rows' own, the student just now, or the student once (replayed).
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
        pad_id: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        teachers: Teachers | None = None,
    ) -> None:
        """Set the feed up.

        Args:
            rows: The set's rows.
            pad_id: Fills up short rows.
            micro_batch_rows: Rows of a forward pass.
            rank: This worker.
            world_size: Number of workers.
            teachers: Where the teachers' part comes from; without any, batches carry none.
        """
        self.rows = rows
        self.pad_id = pad_id
        self.micro_batch_rows = micro_batch_rows
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
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            ahead: Future[GlobalBatch] | None = None
            for batch_ids in ids:
                behind, ahead = ahead, pool.submit(self._global_batch, batch_ids, teachers)
                if behind is not None:
                    yield _taught(behind.result(), teachers, respond)
            if ahead is not None:
                yield _taught(ahead.result(), teachers, respond)

    def batch(self, ids: np.ndarray, teachers: Teachers) -> MicroBatch:
        """Return the rows of these ids as one micro-batch, with the part of these teachers."""
        return teachers.teach(self._micro_batch(ids, teachers))

    def evaluation(self) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield this worker's micro-batches of the whole set, and whether each of them counts.

        Every worker gets equally many, since the forward pass may be collective: those that come out short repeat
        their last one, which does not count. All teachers teach, whatever their stages, so that the losses of stages
        can be compared.
        """
        teachers = self.teachers.in_stage(None)
        order = np.argsort(-self.lengths, kind="stable")
        num_batches = math.ceil(math.ceil(len(order) / self.world_size) / self.micro_batch_rows)
        mine = order[self.rank :: self.world_size]
        for index in range(num_batches):
            ids = mine[index * self.micro_batch_rows : (index + 1) * self.micro_batch_rows]
            counts = len(ids) > 0
            batch = self._micro_batch(ids if counts else order[:1], teachers)
            yield teachers.teach(batch), counts

    def _global_batch(self, ids: np.ndarray, teachers: Teachers) -> GlobalBatch:
        mine = rank_micro_batches(ids, self.lengths[ids], self.rank, self.world_size, self.micro_batch_rows)
        return GlobalBatch(
            [self._micro_batch(part, teachers) for part in mine],
            len(ids),
            int(self.rows.response_lengths[ids].sum()),
            ids,
        )

    def _micro_batch(self, ids: np.ndarray, teachers: Teachers) -> MicroBatch:
        batch = collate(*self.rows.tokens(ids), self.pad_id)
        lengths_R = self.rows.response_lengths[ids]
        return replace(batch, taught=teachers.stored(ids, lengths_R), teacher_rows=teachers.own_rows(ids, lengths_R))


def _taught(batch: GlobalBatch, teachers: Teachers, respond: Respond | None) -> GlobalBatch:
    if respond is not None:
        batch = respond(batch)
    return replace(batch, micro_batches=[teachers.teach(part) for part in batch.micro_batches])
