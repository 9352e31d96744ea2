"""The cache of the teacher's likeliest tokens: for corpora whose hidden states would not fit.

Legend: N tokens of several rows in one flat axis, K tokens kept.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch

from pocl_ray.errors import StorageError
from pocl_ray.teacher_cache.reader import TeacherCache
from pocl_ray.teacher_cache.top_k import TopK
from pocl_ray.teacher_cache.writer import DTYPES


class TopKCache(TeacherCache):
    """A finished cache of the likeliest tokens in a local directory."""

    kind: ClassVar[Literal["hidden", "topk"]] = "topk"

    def take(self, ids: np.ndarray) -> TopK:
        """Return what is kept of rows, one after the other in the order of `ids`.

        Raises:
            StorageError: an id that the cache does not hold, or a shard that cannot be read.
        """
        layout = self.meta.layout
        records_NR = torch.from_numpy(self.records(ids))
        sizes = [4 * layout.width, DTYPES[layout.dtype].itemsize * layout.width]
        ids_NR, logp_NR, curve_NR = records_NR.tensor_split((sizes[0], sum(sizes)), dim=1)
        return TopK(
            ids_NR.contiguous().view(torch.int32),
            logp_NR.contiguous().view(DTYPES[layout.dtype]),
            curve_NR.contiguous().view(torch.float32),
            layout.vocab_size,
        )

    def check(self, top_k: int, student_vocab_size: int) -> None:
        """Check that the cache keeps as many tokens as asked for, of a vocabulary that the student has.

        Args:
            top_k: What the config asks for; of a smaller vocabulary all are kept.
            student_vocab_size: The student's logits, padding included.

        Raises:
            StorageError: It does not.
        """
        layout, remedy = self.meta.layout, "score again"
        if layout.width != min(top_k, layout.vocab_size):
            raise StorageError(
                f"{self.directory}: this teacher cache keeps {layout.width} tokens, "
                f"and distill.top_k is {top_k}; {remedy}"
            )
        if layout.vocab_size > student_vocab_size:
            raise StorageError(
                f"{self.directory}: this teacher cache is over {layout.vocab_size} tokens, more than the student's "
                f"{student_vocab_size}; {remedy}"
            )
