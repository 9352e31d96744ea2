"""Frontier pacing: rows are drawn by what is left to learn from them. Pure functions of numpy.

The *gap* g of a row is the mean KL(teacher || student), at temperature 1, over its response tokens. The chance of a row
is its weight's share, with one of two weights:

    (g + floor)^power                  power 0.5: a row of four times the gap is drawn about twice as often
    (g + floor) / (g + saturation)     bounded: rows that are never learned (noise, a wrong teacher) do not eat the run

The floor keeps every chance above zero. A stage of M samples draws systematically: at the places (k + u) / M, for k
from 0 to M - 1 and one u from [0, 1), in the cumulative chances. So a row comes as often as its share M p says, rounded
up or down, which no independent draw does: the variance is the least that there can be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def row_weights(
    gaps: npt.NDArray[np.floating[Any]], power: float = 0.5, floor: float = 0.02, saturation: float | None = None
) -> FloatArray:
    """Return the weight of each row, above 0.

    Args:
        gaps: Gaps in nats per token, shape (rows,). Rounding can leave a gap a little below 0, which counts as 0.
        power: Exponent of the gap; 0 draws all rows alike. It is not used with `saturation`.
        floor: Number that is added to each gap.
        saturation: Gap at which the bounded weight is about one half; None: the weight is not bounded.

    Raises:
        ValueError: A gap is not a finite number.
    """
    if not np.isfinite(gaps).all():
        raise ValueError(f"gap of row {int(np.flatnonzero(~np.isfinite(gaps))[0])} is not a finite number")
    weights = np.maximum(gaps, 0.0, dtype=np.float64)
    weights += floor
    if saturation is None:
        return np.power(weights, power, out=weights)
    return np.divide(weights, weights + (saturation - floor), out=weights)


def draw_rows(weights: FloatArray, num_draws: int, seed: int, stage: int) -> IntArray:
    """Draw the rows of a stage systematically, a function of its arguments.

    Args:
        weights: Weight of each row, not normalised, shape (rows,).
        num_draws: Number M of samples of the stage.
        seed: Seed of the run.
        stage: Index of the stage.

    Returns:
        Row ids in rising order, each as often as it was drawn, shape (M,). The stage's order shuffles them, as it does
        with the rows of every stage (`data.batching.epoch_order`).
    """
    # A separate branch of the seed: the epochs' orders are drawn by [seed, stage, epoch].
    sequence = np.random.SeedSequence([seed, stage], spawn_key=(2,))
    offset = np.random.Generator(np.random.PCG64(sequence)).random()
    ends = np.cumsum(weights)
    ends *= num_draws / ends[-1]
    ends[-1] = num_draws  # exactly, so that M rows are drawn
    # Of the places k + u, ceil(e - u) are before e. Differences of these numbers are the draws of each row.
    ends -= offset
    before = np.ceil(ends, out=ends).astype(np.int64)
    del ends  # of ten million rows each array is 80 MB
    counts = np.diff(before, prepend=0)
    del before
    return np.repeat(np.arange(len(counts)), counts)


def stage_steps(num_steps: int, num_stages: int) -> list[int]:
    """Return stages of equal length, as nearly as whole steps allow."""
    ends = [num_steps * stage // num_stages for stage in range(num_stages + 1)]
    return [end - start for start, end in pairwise(ends)]
