"""The part of the report on rows that are drawn by their gaps: gaps and draws by bucket, and how often rows came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_GAP, _DRAWS, _ROWS = "frontier/gap_mean/", "frontier/draws/", "frontier/rows_drawn/"
_QUANTILES = ("05", "25", "50", "75", "95")


@dataclass(frozen=True)
class FrontierGaps:
    """The gaps and draws in the metrics of a run; a line is a stage that has begun.

    Attributes:
        stages: Index of each stage.
        steps: Optimizer steps done when it began.
        gaps: Mean gap, shape (stages, buckets), in nats per token.
        quantiles: Gaps at 5, 25, 50, 75 and 95 percent, shape (stages, buckets, 5).
        draws: Share of the stage's samples, shape (stages, buckets).
        rows: Share of the rows of each bucket, shape (buckets,): their share of draws if all rows were drawn alike.
        times: Number of draws, as text, and the number of rows that came as often in the whole run so far.
    """

    stages: tuple[int, ...]
    steps: tuple[int, ...]
    gaps: np.ndarray
    quantiles: np.ndarray
    draws: np.ndarray
    rows: np.ndarray
    times: tuple[tuple[str, int], ...]

    @property
    def num_buckets(self) -> int:
        """The number of buckets."""
        return int(self.gaps.shape[1])

    def sentence(self) -> str:
        """Return how gaps and draws changed from the first stage to the last, in one sentence."""
        first, last = (float(self.gaps[stage] @ self.rows) for stage in (0, -1))
        never = dict(self.times).get("0", 0)
        total = sum(count for _, count in self.times)
        return (
            f"The mean gap was {first:.3f} nats a token before stage {self.stages[0]} and {last:.3f} before stage "
            f"{self.stages[-1]}; of {total:,} rows {never:,} were never drawn."
        )


def frontier_gaps(columns: Mapping[str, np.ndarray], bucket_ends: tuple[int, ...]) -> FrontierGaps | None:
    """Return what the lines of stages hold; None if the run draws no rows by their gaps.

    Args:
        columns: Lines of metrics.jsonl as columns, in the order of steps.
        bucket_ends: Number of rows up to the end of each bucket.
    """
    buckets = [name.removeprefix(_GAP) for name in columns if name.startswith(_GAP)]
    if not buckets or len(buckets) != len(bucket_ends):
        return None
    firsts = sorted(int(name.removeprefix(_ROWS)) for name in columns if name.startswith(_ROWS))
    labels = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(firsts)] + [f"{firsts[-1]} or more"]
    return FrontierGaps(
        stages=tuple(int(stage) for stage in columns["curriculum/stage"]),
        steps=tuple(int(step) for step in columns["step"]),
        gaps=np.stack([columns[_GAP + bucket] for bucket in buckets], axis=-1),
        quantiles=np.stack(
            [np.stack([columns[f"frontier/gap_q{q}/{b}"] for q in _QUANTILES], axis=-1) for b in buckets], axis=1
        ),
        draws=np.stack([columns[_DRAWS + bucket] for bucket in buckets], axis=-1),
        rows=np.diff(bucket_ends, prepend=0) / bucket_ends[-1],
        times=tuple((label, int(columns[f"{_ROWS}{n}"][-1])) for label, n in zip(labels, firsts, strict=True)),
    )
