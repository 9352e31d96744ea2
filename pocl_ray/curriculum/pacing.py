"""Pacing: the rule that says which buckets each stage trains on.

A rule is a function of the number of buckets that returns, stage by stage, the buckets that the stage trains on;
they must be neighbours in the ranking. A new rule is one function and one line in `PACINGS`.
"""

from __future__ import annotations

from collections.abc import Callable

Pacing = Callable[[int], list[tuple[int, ...]]]


def baby_step(num_buckets: int) -> list[tuple[int, ...]]:
    """Admit one more bucket a stage and keep those before it (Bengio et al. 2009; POCL, algorithm 1)."""
    return [tuple(range(stage + 1)) for stage in range(num_buckets)]


def none(num_buckets: int) -> list[tuple[int, ...]]:
    """Train on everything in one stage: no curriculum."""
    return [tuple(range(num_buckets))]


PACINGS: dict[str, Pacing] = {"baby_step": baby_step, "none": none}
