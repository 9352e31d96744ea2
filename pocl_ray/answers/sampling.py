"""Sampling in which every row has its own numbers: what a row is answered does not depend on the rows beside it.

A token is drawn by inversion: it is the first one whose cumulated probability passes u, with u uniform in [0, 1) and a
function of (seed, key of the row, number of the token) alone. Axes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

_MANTISSA_BITS = 53


class RowSampler(LogitsProcessor):
    """Leaves of each row's scores the token that is drawn, so that a greedy step takes it."""

    def __init__(
        self, keys: Sequence[int], first_token: int, seed: int, sampling_temperature: float, top_p: float
    ) -> None:
        """Set up the draws of a batch.

        Args:
            keys: Names the row of each line of the batch.
            first_token: Width at which the answers begin.
            seed: Of all draws.
            sampling_temperature: Divides the scores; above 0.
            top_p: Draws from the smallest set of tokens with this much probability.
        """
        self.keys, self.first_token, self.seed = keys, first_token, seed
        self.warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling_temperature)]
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return scores of shape (B, V): 0 for the drawn token, minus infinity for all others."""
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        number = input_ids.shape[1] - self.first_token
        drawn_B = [uniform(self.seed, key, number) for key in self.keys]
        cumulated_BV = scores.double().softmax(dim=-1).cumsum(dim=-1)
        bar_B1 = torch.tensor(drawn_B, dtype=torch.float64, device=scores.device)[:, None] * cumulated_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulated_BV, bar_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)


def uniform(seed: int, key: int, number: int) -> float:
    """Return a number in [0, 1) that (seed, key, number) alone decide."""
    digest = hashlib.blake2b(f"{seed}/{key}/{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _MANTISSA_BITS)) / 2**_MANTISSA_BITS
