"""Metrics over optimizer steps, prepared for drawing: smoothed within stages, thinned, finite values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pocl_ray.report.files import Metrics

STEP = "step"


@dataclass(frozen=True)
class Curve:
    """One metric over optimizer steps.

    Attributes:
        steps: Steps in rising order, shape (points,).
        values: Finite values, shape (points,).
        num_not_finite: Number of logged values that are NaN or infinite; the points leave them out.
    """

    steps: np.ndarray
    values: np.ndarray
    num_not_finite: int


def curve_of(columns: dict[str, np.ndarray], name: str) -> Curve | None:
    """Return a metric as a curve, or None if no finite value of it was logged."""
    if name not in columns:
        return None
    finite = np.isfinite(columns[name])
    if not finite.any():
        return None
    return Curve(columns[STEP][finite], columns[name][finite], int(len(finite) - finite.sum()))


def num_not_finite(metrics: Metrics, name: str) -> int:
    """Return the number of logged training steps at which a metric is NaN or infinite."""
    return int((~np.isfinite(metrics.train[name])).sum()) if name in metrics.train else 0


def smooth(curve: Curve, stage_ends: Sequence[int]) -> np.ndarray:
    """Return the centred moving mean of a curve, shape (points,).

    The mean does not cross a stage border, where temperature and kd_ratio change the meaning of the loss.
    """
    borders = [0, *np.searchsorted(curve.steps, np.asarray(stage_ends), side="right").tolist(), len(curve.steps)]
    smoothed = np.empty_like(curve.values)
    for start, end in pairwise(borders):
        if end > start:
            smoothed[start:end] = _moving_mean(curve.values[start:end], window=max(1, (end - start) // 12) | 1)
    return smoothed


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    # Near an end the window loses only its outer part. A window that shrinks to a point would end in noise.
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[end] - total[start]) / (end - start)


def thin(steps: np.ndarray, values: np.ndarray, max_points: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `max_points` of a curve that look the same: the lowest and the highest point of each slice."""
    if len(steps) <= max_points:
        return steps, values
    kept = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), max_points // 2 - 1):
        kept.update((int(part[values[part].argmin()]), int(part[values[part].argmax()])))
    places = np.array(sorted(kept))
    return steps[places], values[places]


def best_of_stages(curve: Curve, stage_ends: Sequence[int], losses: Curve | None = None) -> list[int]:
    """Return the index of each stage's highest value; of equal values the lowest loss decides, then the earliest step.

    Args:
        curve: Curve whose values are compared.
        stage_ends: Last step of each stage.
        losses: Losses at the same steps, which decide between equal values.
    """
    loss_at = {} if losses is None else dict(zip(losses.steps.tolist(), losses.values.tolist(), strict=True))
    loss = np.array([loss_at.get(step, np.inf) for step in curve.steps.tolist()])
    stages = np.searchsorted(np.asarray(stage_ends), curve.steps, side="left")
    places = []
    for stage in np.unique(stages):
        members = np.flatnonzero(stages == stage)
        places.append(int(members[np.lexsort((loss[members], -curve.values[members]))[0]]))
    return places


def padded(values: Sequence[float] | np.ndarray, *, zero: bool) -> tuple[float, float]:
    """Return limits of an axis with room around the values; with `zero` the axis starts at 0."""
    low, high = (0.0 if zero else float(min(values))), float(max(values))
    pad = 0.14 * (high - low) or 0.14 * abs(high) or 1.0
    return (low if zero else low - pad), high + pad


def without_spikes(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return limits of an axis that a few outliers do not stretch."""
    values = np.concatenate([curve.values for curve in curves])
    low, high = np.percentile(values, (0.2, 99.5))
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - pad), float(high + pad)
