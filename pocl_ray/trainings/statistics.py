"""Paired differences with their intervals. Numpy only.

Two arms that were trained on the same seeds are compared seed by seed, d_s = arm_s - baseline_s: what a seed does to
both cancels out. With n seeds, mean m and sample standard deviation s of d, the t interval is
m +- t(0.975, n - 1) s / sqrt(n). It assumes that d is normal. The bootstrap interval (percentiles of means of n draws
from d, with replacement) does not, but it is too narrow for few seeds: with fewer than about 15, trust the wider one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
NUM_RESAMPLES = 10_000
_BOOTSTRAP_SEED = 20_260_101
"""The seed of the draws, the same in every call, so that a page that is written again shows the same interval."""

FIGURES = {
    "rouge_l": True,
    "sampled_rouge_l": True,
    "exact_match": True,
    "sampled_exact_match": True,
    "kl": False,
    "ce_loss": False,
}
"""Figure -> whether more of it is better. ROUGE-L and exact match from 0 to 100, greedy where not called sampled; `kl`
is KL(teacher || student) at temperature 1, and it and `ce_loss` are means over response tokens, in nats."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms over shared seeds.

    Attributes:
        num_seeds: Number of pairs.
        mean: Mean of arm - baseline.
        t_low: Lower end of the 95 % t interval.
        t_high: Upper end of the 95 % t interval.
        bootstrap_low: Lower end of the 95 % bootstrap interval.
        bootstrap_high: Upper end of the 95 % bootstrap interval.
        num_wins: Seeds on which the arm is better.
        num_ties: Seeds on which both are equal.
    """

    num_seeds: int
    mean: float
    t_low: float
    t_high: float
    bootstrap_low: float
    bootstrap_high: float
    num_wins: int
    num_ties: int

    @property
    def half_width(self) -> float:
        """Half of the t interval."""
        return (self.t_high - self.t_low) / 2

    def verdict(self, higher_is_better: bool) -> str:
        """Return `ahead`, `behind` or `level`: on which side of zero the t interval lies."""
        if self.t_low <= 0 <= self.t_high:
            return "level"
        return "ahead" if (self.mean > 0) == higher_is_better else "behind"


def paired_difference(arm: npt.ArrayLike, baseline: npt.ArrayLike, higher_is_better: bool) -> PairedDifference:
    """Compare two arms seed by seed.

    Args:
        arm: A figure on each seed, shape (seeds,), at least 2 of them.
        baseline: The other arm's on the same seeds, in the same order.
        higher_is_better: Whether a positive difference is a win.

    Raises:
        ValueError: The shapes differ, or there are fewer than 2 seeds, which give no interval.
    """
    ours, theirs = np.asarray(arm, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(f"pairs of at least 2 seeds are needed, not shapes {ours.shape} and {theirs.shape}")
    differences = ours - theirs
    mean = float(differences.mean())
    half = t_quantile((1 + LEVEL) / 2, len(differences) - 1) * float(differences.std(ddof=1)) / math.sqrt(len(ours))
    low, high = _bootstrap_interval(differences)
    wins = differences > 0 if higher_is_better else differences < 0
    return PairedDifference(
        len(differences), mean, mean - half, mean + half, low, high, int(wins.sum()), int((differences == 0).sum())
    )


def _bootstrap_interval(differences: Floats) -> tuple[float, float]:
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    draws = rng.integers(len(differences), size=(NUM_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        probability: Above 0.5 and below 1.
        degrees: Degrees of freedom, a whole number.
    """
    assert 0.5 < probability < 1 and degrees >= 1
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, degrees: int) -> float:
    """Return P(T <= t) for t >= 0 and whole degrees of freedom v: the finite series in theta = atan(t / sqrt(v)).

    P(|T| <= t) is, for odd v, 2/pi (theta + sin(theta) (cos(theta) + 2/3 cos^3(theta) + ...)), and for even v
    sin(theta) (1 + 1/2 cos^2(theta) + 1*3/(2*4) cos^4(theta) + ...), each up to the power v - 2 (Abramowitz and Stegun,
    26.7.3 and 26.7.4).
    """
    theta = math.atan(t / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total, power = 0.0, 1 if is_odd else 0
    while power <= degrees - 2:
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
        power += 2
    inside = 2 / math.pi * (theta + sine * total) if is_odd else sine * total
    return (1 + inside) / 2
