"""The policy of a race: its cost, who is dropped and who is handed out, how often it is wrong. No training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pocl_ray.errors import ConfigError
from pocl_ray.trainings.race import PLAIN, Decision, RacePlan, Rung, decide, plan_rungs

NUM_ROWS, NUM_RACES = 120, 600
DEFAULT = plan_rungs(3, 582, 1.6)
LAST = DEFAULT.rungs[-1]


def rows(rng: np.random.Generator, gain: float = 0.0, noise: float = 0.2) -> dict[str, Any]:
    """Losses of plain and of an arm that is better by `gain` on the population of rows, each row its own level."""
    level_R = rng.gamma(2.0, 0.3, NUM_ROWS)
    return {PLAIN: level_R, "arm": level_R - gain + noise * rng.standard_normal(NUM_ROWS)}


def fates(decision: Decision) -> dict[str, str]:
    return {standing.arm: standing.fate for standing in decision.standings}


@pytest.mark.parametrize(
    ("num_arms", "steps", "left", "cost"),
    [
        (2, [349], [1], 1.6),
        (3, [116, 232], [2, 1], 1.6),
        (4, [87, 174], [2, 1], 1.6),
        (5, [49, 99, 149], [3, 2, 1], 1.6),
    ],
)
def test_rungs_come_as_late_as_the_cost_allows(num_arms: int, steps: list[int], left: list[int], cost: float) -> None:
    plan = plan_rungs(num_arms, 582, 1.6)
    assert [rung.step for rung in plan.rungs] == steps and [rung.num_left for rung in plan.rungs] == left
    assert cost - 0.01 < plan.most_steps / 582 <= cost
    assert plan.least_steps == 582 + (num_arms - 1) * steps[0]


def test_a_cost_that_pays_for_all_arms_compares_them_at_the_end() -> None:
    assert plan_rungs(3, 100, 9.0).rungs[-1].step == 100
    assert plan_rungs(3, 100, 1.5, shares=[0.1, 0.3]).rungs == (Rung(10, 2), Rung(30, 1))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shares": [0.3, 0.6]}, r"race\.rungs: 3 arms cost up to 1\.90 times a plain run, and .*max_cost is 1\.6"),
        ({"num_steps": 4}, r"rungs at steps 0, 1 of 4 leave nothing to compare; train for more steps"),
    ],
)
def test_a_race_that_cannot_be_run_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_rungs(**{"num_arms": 3, "num_steps": 100, "max_cost": 1.6, **keys})


def test_an_arm_that_is_better_is_handed_out_and_a_worse_one_is_dropped_at_the_first_rung() -> None:
    made = rows(np.random.default_rng(0), gain=0.1)
    worse = {PLAIN: made[PLAIN], "good": made["arm"], "bad": made[PLAIN] + 0.3}
    first = decide(worse, DEFAULT.rungs[0], DEFAULT)
    assert first.left == ("good", PLAIN)
    assert fates(first) == {PLAIN: "goes on", "good": "goes on", "bad": "dropped"}
    assert first.standings[2].why == "behind plain by more than chance"
    last = decide({PLAIN: made[PLAIN], "good": made["arm"]}, LAST, DEFAULT)
    assert last.left == ("good",) and fates(last) == {PLAIN: "dropped", "good": "handed out"}
    assert last.standings[1].high < 0 and last.standings[1].why == "ahead of plain by more than chance"


def test_ties_and_what_may_be_chance_go_to_plain_distillation() -> None:
    plain = np.linspace(0.1, 1.0, NUM_ROWS)
    for arm in (plain, plain - 1e-3 * np.resize([50, -49], NUM_ROWS)):
        decision = decide({PLAIN: plain, "arm": arm}, LAST, DEFAULT)
        assert decision.left == (PLAIN,) and decision.standings[0].why == "none is ahead by more than chance"
    one_row = {PLAIN: plain[:1], "arm": plain[:1] - 1}
    assert decide(one_row, LAST, DEFAULT).left == (PLAIN,), "one row gives no interval"


def test_an_arm_must_be_ahead_by_the_margin() -> None:
    plain = np.linspace(0.1, 1.0, NUM_ROWS)
    ahead = {PLAIN: plain, "arm": plain * 0.97}
    assert decide(ahead, LAST, DEFAULT).left == ("arm",)
    assert decide(ahead, LAST, plan_rungs(3, 582, 1.6, margin=0.05)).left == (PLAIN,)


def test_all_arms_behind_end_the_race_early() -> None:
    plain = np.linspace(0.1, 1.0, NUM_ROWS)
    decision = decide({PLAIN: plain, "a": plain + 1, "b": plain + 2}, DEFAULT.rungs[0], DEFAULT)
    assert decision.left == (PLAIN,) and fates(decision)[PLAIN] == "handed out"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_figures_that_are_not_finite_never_win(bad: float) -> None:
    plain = np.linspace(0.1, 1.0, NUM_ROWS)
    broken = np.where(np.arange(NUM_ROWS) == 7, bad, plain - 1)
    diverged = np.array([math.nan])
    for rung in DEFAULT.rungs:
        decision = decide({PLAIN: plain, "a": broken, "b": diverged}, rung, DEFAULT)
        assert decision.left == (PLAIN,)
        assert {standing.why for standing in decision.standings[1:]} == {"its dev losses are not finite"}
    left = decide({PLAIN: broken, "a": plain, "b": plain + 1}, LAST, DEFAULT)
    assert left.left == ("a",), "plain that diverges is dropped"
    assert decide({PLAIN: diverged, "a": broken}, LAST, DEFAULT).left == (PLAIN,)


def test_an_arm_that_is_no_better_is_handed_out_less_often_than_the_level() -> None:
    """Arms that are equal to plain on the population of rows, with rows drawn afresh at each rung: the hardest case."""
    wins = 0
    for seed in range(NUM_RACES):
        rng, left = np.random.default_rng(seed), (PLAIN, "a", "b")
        for rung in DEFAULT.rungs:
            plain = rng.gamma(2.0, 0.3, NUM_ROWS)
            losses = {arm: plain + 0.2 * rng.standard_normal(NUM_ROWS) for arm in left}
            left = decide({**losses, PLAIN: plain}, rung, DEFAULT).left if len(left) > 1 else left
        wins += left != (PLAIN,)
    assert wins / NUM_RACES < 1 - DEFAULT.confidence


@pytest.mark.parametrize("gain", [0.02, 0.05, 0.1])
def test_the_regret_is_bounded_by_what_the_rows_can_tell(gain: float) -> None:
    """With arms better and worse by `gain`: no race loses to plain, and what is missed is within the intervals."""
    regrets, losses_to_plain = [], 0
    truth = {PLAIN: 0.0, "good": -gain, "bad": gain}
    for seed in range(NUM_RACES // 4):
        rng, left = np.random.default_rng(seed), tuple(truth)
        for rung in DEFAULT.rungs:
            plain = rng.gamma(2.0, 0.3, NUM_ROWS)
            noise = {arm: 0.2 * rng.standard_normal(NUM_ROWS) for arm in left}
            losses = {arm: plain + truth[arm] + (arm != PLAIN) * noise[arm] for arm in left}
            left = decide(losses, rung, DEFAULT).left if len(left) > 1 else left
        regrets.append(truth[left[0]] - truth["good"])
        losses_to_plain += truth[left[0]] > 0
    assert losses_to_plain / len(regrets) < 0.05
    assert np.mean(regrets) <= 3.5 * 0.2 / math.sqrt(NUM_ROWS)
    if gain == 0.1:
        assert np.mean(regrets) < 0.01, "a gain of five standard errors is found"


def test_the_level_is_shared_by_all_tests() -> None:
    assert DEFAULT.level == pytest.approx(0.05 / 4)
    assert (
        isinstance(DEFAULT.to_json()["rungs"], list | tuple)
        and RacePlan(
            **{
                **{
                    key: value
                    for key, value in DEFAULT.to_json().items()
                    if not key.endswith("_steps") or key == "num_steps"
                },
                "rungs": DEFAULT.rungs,
            }
        )
        == DEFAULT
    )
