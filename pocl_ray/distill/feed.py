"""The feed: from a stage's order of rows to micro-batches with the teacher's part, prepared ahead."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from pocl_ray.data.batching import MicroBatch, collate, global_batches, rank_micro_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.teachers import TeacherSource
from pocl_ray.records import Stage


@dataclass(frozen=True)
class GlobalBatch:
    """One worker's part of an optimizer step.

    Attributes:
        micro_batches: What this worker runs.
        num_rows: Rows over all workers.
        num_response_tokens: Response tokens over all workers.
    """

    micro_batches: list[MicroBatch]
    num_rows: int
    num_response_tokens: int


class Feed:
    """Rows of one set as micro-batches; a thread reads one global batch ahead."""

    def __init__(
        self,
        rows: RowStore,
        pad_id: int,
        micro_batch_rows: int,
        rank: int,
        world_size: int,
        teachers: Sequence[TeacherSource] = (),
    ) -> None:
        """Set the feed up.

        Args:
            rows: The set's rows.
            pad_id: Fills up short rows.
            micro_batch_rows: Rows of a forward pass.
            rank: This worker.
            world_size: Number of workers.
            teachers: Where each teacher's part comes from. Without any, batches carry no teacher.
        """
        self.rows = rows
        self.pad_id = pad_id
        self.micro_batch_rows = micro_batch_rows
        self.rank, self.world_size = rank, world_size
        self.teachers = tuple(teachers)
        self.lengths = rows.prompt_lengths + rows.response_lengths

    def stage(
        self, stage: Stage, stage_rows: np.ndarray, global_batch_rows: int, seed: int, first_step: int
    ) -> Generator[GlobalBatch, None, None]:
        """Yield the global batches of a stage from `first_step` on; closing it stops the reading ahead."""
        ids = global_batches(stage, stage_rows, global_batch_rows, seed, first_step)
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            ahead: Future[GlobalBatch] | None = None
            for batch_ids in ids:
                behind, ahead = ahead, pool.submit(self._global_batch, batch_ids)
                if behind is not None:
                    yield self._with_live_teacher(behind.result())
            if ahead is not None:
                yield self._with_live_teacher(ahead.result())

    def evaluation(self) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield this worker's micro-batches of the whole set, and whether each of them counts.

        Every worker gets equally many, since the forward pass may be collective: those that come out short repeat
        their last one, which does not count.
        """
        order = np.argsort(-self.lengths, kind="stable")
        num_batches = math.ceil(math.ceil(len(order) / self.world_size) / self.micro_batch_rows)
        mine = order[self.rank :: self.world_size]
        for index in range(num_batches):
            ids = mine[index * self.micro_batch_rows : (index + 1) * self.micro_batch_rows]
            counts = len(ids) > 0
            batch = self._micro_batch(ids if counts else order[:1])
            yield self._taught(batch), counts

    def _global_batch(self, ids: np.ndarray) -> GlobalBatch:
        mine = rank_micro_batches(ids, self.lengths[ids], self.rank, self.world_size, self.micro_batch_rows)
        return GlobalBatch(
            [self._micro_batch(part) for part in mine], len(ids), int(self.rows.response_lengths[ids].sum())
        )

    def _micro_batch(self, ids: np.ndarray) -> MicroBatch:
        batch = collate(*self.rows.tokens(ids), self.pad_id)
        return replace(batch, taught=tuple(part for teacher in self.teachers for part in teacher.stored(ids)))

    def _with_live_teacher(self, batch: GlobalBatch) -> GlobalBatch:
        return replace(batch, micro_batches=[self._taught(b) for b in batch.micro_batches])

    def _taught(self, batch: MicroBatch) -> MicroBatch:
        asked = tuple(part for teacher in self.teachers for part in teacher.asked(batch))
        return replace(batch, taught=batch.taught + asked)
