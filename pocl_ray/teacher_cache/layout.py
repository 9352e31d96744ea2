"""The layout of a cached token's record and the size of a cache. It needs no torch, since `plan` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of a number in each dtype that a cache may have."""

INVERSE_TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 2.0)
"""The points at which the tail's curve is stored. It is exact at temperatures 4, 2, 4/3, 1 and 1/2."""

NUM_CURVE = 1 + 2 * len(INVERSE_TEMPERATURES)
"""The length of a curve: the slope at b = 0, then value and slope at each of `INVERSE_TEMPERATURES`."""


@dataclass(frozen=True)
class Layout:
    """The layout of a token's record.

    Attributes:
        kind: `hidden` for a hidden state; `topk` for ids (int32), log-probabilities, and the curve of the tail
            (float32).
        dtype: Dtype of the hidden state or of the log-probabilities: float32, bfloat16 or float16.
        width: Hidden size, or number of tokens that are kept.
        vocab_size: Number of tokens of the distribution for `topk`; 0 for hidden states.
    """

    kind: Literal["hidden", "topk"]
    dtype: str
    width: int
    vocab_size: int = 0

    @property
    def row_bytes(self) -> int:
        """The number R of bytes of a record."""
        itemsize = ITEM_BYTES[self.dtype]
        return self.width * itemsize if self.kind == "hidden" else self.width * (4 + itemsize) + 4 * NUM_CURVE

    def __str__(self) -> str:
        if self.kind == "hidden":
            return f"hidden states of {self.width} x {self.dtype}"
        return f"the {self.width} likeliest tokens in {self.dtype}"


def estimate_bytes(num_tokens: int, layout: Layout) -> int:
    """Return the size in bytes of a cache of `num_tokens` response tokens (the index adds 28 bytes for each row)."""
    return num_tokens * layout.row_bytes
