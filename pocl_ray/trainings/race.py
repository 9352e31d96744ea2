"""The policy of a race: when arms are compared, which of them are dropped, and which one is handed out. Pure functions.

Plain distillation and some curricula are trained from one start, each up to the first *rung*, a share of the steps. The
losses that they leave on the dev rows are compared row by row, d_r = arm_r - plain_r, with an interval
mean +- t s / sqrt(rows). An arm whose interval lies above zero is dropped; so are the worst of the others until as many
are left as the rung lets on. Those go on to the next rung. Plain distillation is compared at every rung. At the last
one it is handed out unless an arm's interval lies below zero, and by `margin` of plain's loss at that.

The error that may be made over the whole race, 1 - `confidence`, is shared evenly by all tests: (rungs) x (arms besides
plain), each on one side. So an arm that is no better is handed out with a probability below it.

With n arms, rungs at equal distances x, and k_i arms on the way to rung i, a race takes 1 + x sum (k_i - 1) times the
steps of a plain run at most, which sets x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocl_ray.config.race import PLAIN
from pocl_ray.errors import ConfigError
from pocl_ray.trainings.statistics import t_quantile

MANY_ROWS = 1000
"""Rows from which on the normal distribution takes the place of Student's."""

Floats = npt.NDArray[np.float64]
Fate = Literal["goes on", "dropped", "handed out"]


@dataclass(frozen=True)
class Rung:
    """One comparison: the optimizer step at which it is made, and the number of arms that it lets on."""

    step: int
    num_left: int


@dataclass(frozen=True)
class RacePlan:
    """The rungs of a race.

    Attributes:
        num_arms: Number of arms, plain distillation among them.
        num_steps: Optimizer steps of each arm's whole training.
        rungs: Rungs, the earliest first; the last one leaves one arm.
        confidence: Confidence of the whole race.
        margin: Share of plain's loss by which an arm must be ahead, beyond chance.
    """

    num_arms: int
    num_steps: int
    rungs: tuple[Rung, ...]
    confidence: float
    margin: float

    @property
    def steps(self) -> list[int]:
        """The steps of the rungs."""
        return [rung.step for rung in self.rungs]

    @property
    def level(self) -> float:
        """The error that one test on one side may make."""
        return (1 - self.confidence) / (len(self.rungs) * (self.num_arms - 1))

    @property
    def most_steps(self) -> int:
        """The optimizer steps of the race if no arm is dropped before it must be."""
        return self._steps([self.num_arms, *(rung.num_left for rung in self.rungs)])

    @property
    def least_steps(self) -> int:
        """The optimizer steps of the race if plain distillation alone is left after the first rung."""
        return self._steps([self.num_arms, *(1 for _ in self.rungs)])

    def _steps(self, num_running: Sequence[int]) -> int:
        ends = [0, *(rung.step for rung in self.rungs), self.num_steps]
        return sum(number * (end - start) for number, (start, end) in zip(num_running, pairwise(ends), strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON-like value."""
        return {**asdict(self), "most_steps": self.most_steps, "least_steps": self.least_steps}


def plan_rungs(
    num_arms: int,
    num_steps: int,
    max_cost: float,
    shares: Sequence[float] | None = None,
    confidence: float = 0.95,
    margin: float = 0.0,
) -> RacePlan:
    """Return the rungs of a race: successive halving, as late as the cost allows.

    Args:
        num_arms: Number of arms, plain distillation among them, at least 2.
        num_steps: Optimizer steps of an arm's whole training.
        max_cost: Steps of the whole race at most, as a multiple of `num_steps`.
        shares: Shares of the steps at which arms are compared; None: equal distances, set by `max_cost`.
        confidence: Confidence of the whole race.
        margin: Share of plain's loss by which an arm must be ahead.

    Raises:
        ConfigError: The shares cost more than `max_cost`, or there are too few steps for a rung.
    """
    num_rungs = math.ceil(math.log2(num_arms)) if shares is None else len(shares)
    left = [math.ceil(round(num_arms ** (1 - rung / num_rungs), 9)) for rung in range(num_rungs + 1)]
    if shares is None:
        distance = min((max_cost - 1) / sum(number - 1 for number in left[:-1]), 1 / num_rungs)
        shares = [distance * (rung + 1) for rung in range(num_rungs)]
    steps = [math.floor(round(share * num_steps, 6)) for share in shares]
    if steps[0] < 1 or any(later <= earlier for earlier, later in pairwise(steps)):
        raise ConfigError(
            f"curriculum.race: rungs at steps {', '.join(map(str, steps))} of {num_steps} leave nothing to compare; "
            "train for more steps, or raise curriculum.race.max_cost"
        )
    rungs = tuple(Rung(step, number) for step, number in zip(steps, left[1:], strict=True))
    plan = RacePlan(num_arms, num_steps, rungs, confidence, margin)
    if plan.most_steps > max_cost * num_steps + 1e-6 * num_steps:
        raise ConfigError(
            f"curriculum.race.rungs: {num_arms} arms cost up to {plan.most_steps / num_steps:.2f} times a plain run, "
            f"and curriculum.race.max_cost is {max_cost:g}; set rungs earlier, or max_cost higher"
        )
    return plan


@dataclass(frozen=True)
class Standing:
    """An arm at a rung.

    Attributes:
        arm: Its name.
        fate: Whether the arm goes on, is dropped, or is handed out.
        why: Reason in a few words.
        loss: Mean loss over the dev rows, each row counted once; NaN where one of them is not finite.
        difference: Mean difference from plain distillation; NaN where it cannot be taken, as for plain itself.
        low: Lower end of the interval of the difference.
        high: Upper end of it; each end is at the level of one test, so that all of them hold together over the race
            with its confidence.
    """

    arm: str
    fate: Fate
    why: str
    loss: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Decision:
    """The decision at a rung: how the arms stand, and those that are left, the best first."""

    rung: Rung
    standings: tuple[Standing, ...]
    left: tuple[str, ...]


def paired_interval(arm_R: Floats, plain_R: Floats, level: float) -> tuple[float, float, float]:
    """Return the mean difference of two arms over the same rows, and the ends of its t interval.

    Each end is wrong with a probability of `level`. One row gives no interval: its ends are infinite.
    """
    differences = arm_R - plain_R
    mean, num_rows = float(differences.mean()), len(differences)
    if num_rows < 2:
        return mean, -math.inf, math.inf
    quantile = NormalDist().inv_cdf(1 - level) if num_rows > MANY_ROWS else t_quantile(1 - level, num_rows - 1)
    half = quantile * float(differences.std(ddof=1)) / math.sqrt(num_rows)
    return mean, mean - half, mean + half


def decide(losses: Mapping[str, Floats], rung: Rung, plan: RacePlan) -> Decision:
    """Return what a rung decides, a function of its arguments alone.

    Args:
        losses: Arm -> losses of the same dev rows in the same order, those of `PLAIN` among them; of the arms that
            have come this far.
        rung: The rung.
        plan: Plan of the race.
    """
    means = {arm: float(values.mean()) if np.isfinite(values).all() else math.nan for arm, values in losses.items()}
    plain_R, has_plain = losses[PLAIN], math.isfinite(means[PLAIN])
    finite = [arm for arm in losses if math.isfinite(means[arm])]
    intervals = {
        arm: paired_interval(losses[arm], plain_R, plan.level) if has_plain else (math.nan,) * 3
        for arm in finite
        if arm != PLAIN
    }
    dropped = {arm: "its dev losses are not finite" for arm in losses if arm not in finite}
    if not finite:  # nothing is better than plain distillation, which then says itself that it diverges
        finite, dropped = [PLAIN], {arm: why for arm, why in dropped.items() if arm != PLAIN}
    for arm, (_, low, _) in intervals.items():
        if low > 0:
            dropped[arm] = f"behind {PLAIN} by more than chance"
    ranked = sorted((arm for arm in finite if arm not in dropped and arm != PLAIN), key=lambda arm: means[arm])
    if rung.num_left == 1:
        left = _winner(ranked, intervals, means[PLAIN], plan.margin)
    else:
        left = [*ranked[: rung.num_left - int(PLAIN in finite)], *([PLAIN] if PLAIN in finite else [])]
    is_over = len(left) == 1
    for arm in (arm for arm in [*ranked, PLAIN] if arm not in left and arm not in dropped):
        dropped[arm] = _why_dropped(arm, left, rung)
    standings = []
    for arm in losses:
        fate: Fate = "dropped" if arm in dropped else "handed out" if is_over else "goes on"
        why = dropped.get(arm) or _why_kept(arm, is_over, has_plain)
        standings.append(Standing(arm, fate, why, means[arm], *intervals.get(arm, (math.nan,) * 3)))
    return Decision(rung, tuple(standings), tuple(left))


def _winner(
    ranked: Sequence[str], intervals: Mapping[str, tuple[float, float, float]], plain_loss: float, margin: float
) -> list[str]:
    """The arm that is ahead of plain by more than chance and the margin, the best of them; else plain."""
    if not math.isfinite(plain_loss):
        return list(ranked[:1]) or [PLAIN]
    return [arm for arm in ranked if intervals[arm][2] < -margin * plain_loss][:1] or [PLAIN]


def _why_dropped(arm: str, left: Sequence[str], rung: Rung) -> str:
    if rung.num_left > 1:
        return f"{rung.num_left} arms go on, and others have a lower loss"
    if arm == PLAIN:
        return f"{left[0]} is ahead by more than chance"
    return "not ahead by more than chance" if left[0] == PLAIN else f"{left[0]} has a lower loss"


def _why_kept(arm: str, is_over: bool, has_plain: bool) -> str:
    if not is_over:
        return "compared with at every rung" if arm == PLAIN else "among the lowest losses"
    if arm == PLAIN:
        return "none is ahead by more than chance"
    return f"ahead of {PLAIN} by more than chance" if has_plain else f"the losses of {PLAIN} are not finite"
