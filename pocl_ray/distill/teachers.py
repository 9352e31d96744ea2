"""Where a training worker has a teacher's part of a batch from: its cache, or the teacher itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocl_ray.data.batching import MicroBatch, Taught
from pocl_ray.models.hidden_cache import HiddenCache
from pocl_ray.models.live import LiveTeacher
from pocl_ray.models.top_k_cache import TopKCache


@dataclass(frozen=True)
class TeacherSource:
    """One teacher, for the rows of one set.

    Attributes:
        cache: What is stored of it; None where it runs live.
        live: The teacher itself; None where it is cached.
        index: Its place among the run's teachers.
        weight: Of its divergence.
    """

    cache: HiddenCache | TopKCache | None = None
    live: LiveTeacher | None = None
    index: int = 0
    weight: float = 1.0

    def stored(self, ids: np.ndarray) -> tuple[Taught, ...]:
        """Return what the cache holds of rows; nothing where the teacher runs live."""
        return () if self.cache is None else (Taught(self.cache.take(ids), self.index, self.weight),)

    def asked(self, batch: MicroBatch) -> tuple[Taught, ...]:
        """Return what the live teacher says of a batch; nothing where it is cached."""
        if self.live is None:
            return ()
        hidden_NK = self.live.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N)
        return (Taught(hidden_NK, self.index, self.weight),)
