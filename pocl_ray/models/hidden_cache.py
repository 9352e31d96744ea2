"""The cache of the teacher's final hidden states, from which its LM head gives the full distribution back.

Legend: N tokens of several rows in one flat axis, K the teacher's hidden size.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pocl_ray.teacher_cache.reader import TeacherCache
from pocl_ray.teacher_cache.writer import DTYPES, CacheMeta, Layout, ShardInfo, estimate_bytes, write_index, write_shard

__all__ = ["CacheMeta", "HiddenCache", "Layout", "ShardInfo", "estimate_bytes", "write_index", "write_shard"]


class HiddenCache(TeacherCache):
    """A finished cache of hidden states in a local directory."""

    kind: ClassVar[Literal["hidden", "topk"]] = "hidden"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return DTYPES[self.meta.layout.dtype]

    def take(self, ids: np.ndarray, pin_memory: bool = False) -> Tensor:
        """Return the hidden states of rows, one after the other in the order of `ids`.

        Args:
            ids: row ids, in any order; an id may repeat.
            pin_memory: put them into page-locked memory, for an asynchronous copy to a GPU.

        Returns:
            hidden_NK, N the sum of `num_tokens(ids)`.

        Raises:
            StorageError: an id that the cache does not hold, or a shard that cannot be read.
        """
        shape = (int(self.num_tokens(ids).sum()), self.meta.layout.width)
        hidden_NK = torch.empty(shape, dtype=self.dtype, pin_memory=pin_memory)
        self.records(ids, hidden_NK.view(torch.uint8).numpy())
        return hidden_NK
