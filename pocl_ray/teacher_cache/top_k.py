"""The teacher's likeliest tokens and the mass of all others: the record of a response token in a `topk` cache.

A record holds the k largest log-probabilities log p_j at temperature 1. The other V - k tokens are the tail, of which
it holds the curve

    f(b) = log sum_{j in tail} p_j^b,      b = 1/T,

The curve gives, at temperature T, the distribution over k tokens and one bucket for the tail:

    log p_i(T) = b log p_i - Z,    log p_tail(T) = f(b) - Z,    Z = log(sum_{i in top} p_i^b + e^f(b)).

The tail's share at T does not follow from its share at 1, because it depends on the spread of the tail. But f is convex
and smooth, so a few of its values and slopes f'(b) = E_b[log p] describe it. It is exact at each stored b. Between two
stored b it is read from the cubic through both values and slopes (Hermite). Above the largest b it continues along its
slope, which by convexity is never above f. f(0) = log(V - k) is not stored.

Legend: N response tokens in one flat axis, V vocabulary, K tokens kept, E = K + 1 events (tokens and bucket), P numbers
of the curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pocl_ray.teacher_cache.layout import INVERSE_TEMPERATURES, NUM_CURVE

LOG_ZERO = math.log(torch.finfo(torch.float32).tiny)
"""The value that stands for the logarithm of a probability of 0, as in the losses."""


@dataclass(frozen=True, eq=False)
class TopK:
    """The kept part of the teacher's distribution at N tokens.

    Attributes:
        ids_NK: Ids of the likeliest tokens, int32, the likeliest first.
        logp_NK: Log-probabilities of these tokens at temperature 1, in the dtype of the cache.
        curve_NP: Curve of the tail, float32; it has no meaning if there is no tail.
        vocab_size: Number V of tokens of the distribution; the tail has V - K tokens.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    curve_NP: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        assert self.ids_NK.shape == self.logp_NK.shape and self.top_k <= self.vocab_size
        assert self.curve_NP.shape == (len(self), NUM_CURVE)

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids_NK[rows], self.logp_NK[rows], self.curve_NP[rows], self.vocab_size)

    @property
    def top_k(self) -> int:
        """The number K of tokens that are kept."""
        return self.ids_NK.shape[1]

    @property
    def has_tail(self) -> bool:
        """Return whether there are other tokens than the kept ones."""
        return self.top_k < self.vocab_size

    @property
    def nbytes(self) -> int:
        """The size in bytes, in memory and in the cache."""
        return self.ids_NK.nbytes + self.logp_NK.nbytes + self.curve_NP.nbytes

    def to(self, device: str | torch.device, non_blocking: bool = False) -> TopK:
        """Return a copy on a device."""
        ids_NK, logp_NK, curve_NP = (
            part.to(device, non_blocking=non_blocking) for part in (self.ids_NK, self.logp_NK, self.curve_NP)
        )
        return TopK(ids_NK, logp_NK, curve_NP, self.vocab_size)

    def split(self, lengths: Sequence[int]) -> list[TopK]:
        """Return pieces with these numbers of tokens."""
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        return [self[start:end] for start, end in pairwise(ends)]

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Return the events' log-probabilities at a temperature, float32, shape (N, K + 1), or (N, K) without a
        tail."""
        inverse = 1.0 / temperature
        top_NK = self.logp_NK.float() * inverse
        events_NE = torch.cat([top_NK, self._tail(inverse)[:, None]], dim=-1) if self.has_tail else top_NK
        return events_NE.log_softmax(dim=-1)

    def entropy(self) -> Tensor:
        """Return the entropy of the whole distribution at temperature 1, shape (N,), float32, in nats.

        It is exact: the tail's mass is e^f(1), and the tail's mean log-probability is f'(1).
        """
        top_NK = self.logp_NK.float()
        entropy_N = -(top_NK.exp() * top_NK).sum(-1)
        if not self.has_tail:
            return entropy_N
        place = 1 + 2 * INVERSE_TEMPERATURES.index(1.0)
        return entropy_N - self.curve_NP[:, place].exp() * self.curve_NP[:, place + 1]

    def _tail(self, inverse: float) -> Tensor:
        """The curve at b = `inverse`, shape (N,)."""
        knots, values, slopes = self._knots()
        if inverse >= knots[-1]:
            return values[-1] + (inverse - knots[-1]) * slopes[-1]
        right = next(place for place, knot in enumerate(knots) if knot > inverse)
        left, width = right - 1, knots[right] - knots[right - 1]
        t = (inverse - knots[left]) / width
        return (
            (2 * t**3 - 3 * t**2 + 1) * values[left]
            + (t**3 - 2 * t**2 + t) * width * slopes[left]
            + (3 * t**2 - 2 * t**3) * values[right]
            + (t**3 - t**2) * width * slopes[right]
        )

    def _knots(self) -> tuple[list[float], list[Tensor], list[Tensor]]:
        first_N = torch.full_like(self.curve_NP[:, 0], math.log(self.vocab_size - self.top_k))
        values, slopes = self.curve_NP[:, 1::2].unbind(-1), self.curve_NP[:, 2::2].unbind(-1)
        return [0.0, *INVERSE_TEMPERATURES], [first_N, *values], [self.curve_NP[:, 0], *slopes]


@torch.no_grad()
def top_k_of(logits_NV: Tensor, top_k: int, dtype: torch.dtype = torch.float32) -> TopK:
    """Return the likeliest tokens of the teacher and the curve of its tail.

    Args:
        logits_NV: Teacher's logits; a logit of -inf is a mask.
        top_k: Number K of tokens to keep; a smaller vocabulary is kept completely.
        dtype: Dtype of the log-probabilities: float32 or float16 (exact to 0.03 nats at -60, and much finer near 0,
            where it matters).
    """
    logp_NV = logits_NV.float().log_softmax(dim=-1).nan_to_num_(nan=math.nan, neginf=LOG_ZERO)
    num_kept = min(top_k, logp_NV.shape[-1])
    top_NK, ids_NK = logp_NV.topk(num_kept, dim=-1)
    if num_kept < logp_NV.shape[-1]:
        curve_NP = _curve(logp_NV, top_NK, ids_NK)
    else:
        curve_NP = logp_NV.new_zeros(len(logp_NV), NUM_CURVE)
    return TopK(ids_NK.int(), top_NK.to(dtype), curve_NP, logp_NV.shape[-1])


def concatenate(parts: Sequence[TopK]) -> TopK:
    """Return the tokens of several parts as one."""
    return TopK(
        torch.cat([part.ids_NK for part in parts]),
        torch.cat([part.logp_NK for part in parts]),
        torch.cat([part.curve_NP for part in parts]),
        parts[0].vocab_size,
    )


def _curve(logp_NV: Tensor, top_NK: Tensor, ids_NK: Tensor) -> Tensor:
    num_tail = logp_NV.shape[-1] - top_NK.shape[-1]
    tail_NV = logp_NV.scatter(-1, ids_NK, -math.inf)
    columns = [(logp_NV.sum(-1) - top_NK.sum(-1)) / num_tail]
    for inverse in INVERSE_TEMPERATURES:
        value_N1 = (scaled_NV := tail_NV * inverse).logsumexp(-1, keepdim=True)
        slope_N = ((scaled_NV - value_N1).exp_() * logp_NV).sum(-1)
        columns += [value_N1.squeeze(-1), slope_N]
    return torch.stack(columns, dim=-1)
