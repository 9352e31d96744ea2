"""What the scoring pass keeps of the teacher for its cache: nothing, hidden states, or the likeliest tokens.

Axes: N response tokens of a unit in one flat axis, C those of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pocl_ray.teacher_cache.top_k import TopK, concatenate, top_k_of


class Keeper(Protocol):
    """Keeps one unit's part of the cache."""

    def watch(self, logits_CV: torch.Tensor) -> None:
        """See the teacher's logits of the next tokens of the unit."""

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return what is kept of each row, on the CPU."""


class NothingKept:
    """Keeps nothing: the teacher is not cached."""

    def watch(self, logits_CV: torch.Tensor) -> None:
        """See the logits, and leave them."""

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return nothing."""
        return ()


class HiddenKept:
    """Keeps the hidden states."""

    def __init__(self, hidden_NH: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Take the hidden states of the unit, and the dtype to store; None for their own."""
        self.hidden_NH = hidden_NH.to("cpu", dtype or hidden_NH.dtype)

    def watch(self, logits_CV: torch.Tensor) -> None:
        """See the logits, which follow from the hidden states."""

    def rows(self, lengths: Sequence[int]) -> Sequence[torch.Tensor | TopK]:
        """Return the hidden states of each row."""
        return self.hidden_NH.split(list(lengths))


class TopKKept:
    """Keeps the likeliest tokens, of the vocabulary that both models share."""

    def __init__(
        self, top_k: int, student_vocab_size: int, teacher_dtype: torch.dtype, dtype: torch.dtype | None
    ) -> None:
        """Set the keeper up.

        Args:
            top_k: Tokens to keep.
            student_vocab_size: The student's logits, padding included.
            teacher_dtype: What the teacher computes in.
            dtype: Of the log-probabilities; None: float32 for a teacher in float32, else float16.
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
