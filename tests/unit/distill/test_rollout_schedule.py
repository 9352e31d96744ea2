"""DistiLLM's schedule, held step by step against the rule as it is stated, and the replay buffer."""

from __future__ import annotations

import numpy as np
import pytest

from pocl_ray.config import RolloutConfig
from pocl_ray.distill.rollout_schedule import (
    AdaptiveSchedule,
    ReplayBuffer,
    draw_of,
    limits_of,
    replay_generator,
    source_of,
    token_draws,
)


def rollouts(first: int, count: int) -> tuple[list[int], list[np.ndarray]]:
    return list(range(first, first + count)), [np.arange(row, dtype=np.int32) + 1 for row in range(count)]


def test_the_threshold_rises_when_the_dev_loss_does_and_only_then() -> None:
    # prev is the dev loss at which phi last rose: 2.0, then 2.1 (2.0 + 0.1), then 2.25 (at least 2.1 + 0.1).
    seen = [(2.0, 0.0), (1.5, 0.0), (2.09, 0.0), (2.1, 0.1), (2.15, 0.1), (2.25, 0.2), (1.0, 0.2), (2.34, 0.2)]
    schedule = AdaptiveSchedule()
    for dev_ce, phi in seen:
        schedule = schedule.observed(dev_ce)
        assert schedule.phi == phi, f"after {dev_ce}"
    assert schedule.reference_ce == 2.25


def test_the_threshold_ends_at_one() -> None:
    schedule = AdaptiveSchedule().observed(0.0)
    risen = []
    for evaluation in range(1, 13):
        schedule = schedule.observed(float(evaluation))
        risen.append(schedule.phi)
    assert risen == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0]


def test_a_dev_loss_that_is_no_number_raises_nothing() -> None:
    assert AdaptiveSchedule(0.3, 2.0).observed(float("nan")) == AdaptiveSchedule(0.3, 2.0)


@pytest.mark.parametrize(
    ("u", "step", "is_full", "source"),
    [
        (0.39, 0, False, "student"),
        (0.39, 0, True, "student"),  # u < 0.4 (1 - 0)
        (0.40, 0, False, "data"),
        (0.19, 50, True, "student"),  # u < 0.4 (1 - 50/100) = 0.2
        (0.20, 50, True, "buffer"),
        (0.20, 50, False, "student"),  # the buffer still fills
        (0.39, 99, True, "buffer"),
        (0.003, 99, True, "student"),
        (0.41, 99, True, "data"),
    ],
)
def test_a_step_takes_the_source_that_the_rule_says(u: float, step: int, is_full: bool, source: str) -> None:
    assert AdaptiveSchedule(phi=0.4).source(u, step, 100, is_full) == source


def test_at_the_start_all_steps_are_on_the_rows() -> None:
    assert {AdaptiveSchedule().source(u, 0, 10, False) for u in (0.0, 0.5)} == {"data"}


def test_every_step_of_a_run_follows_the_rule_as_written() -> None:
    config = RolloutConfig(mode="adaptive", buffer_rows=40)
    schedule, buffer, num_steps = AdaptiveSchedule(), ReplayBuffer(40), 200
    phi, previous, held, seen = 0.0, None, 0, set()
    for step in range(num_steps):
        if step % 10 == 0:
            dev_ce = 2.0 + 0.03 * step
            schedule = schedule.observed(dev_ce)
            if previous is None:
                previous = dev_ce
            elif dev_ce >= previous + 0.1:
                phi, previous = min(1.0, phi + 0.1), dev_ce
        u = draw_of(7, step)
        if u < phi * (1 - step / num_steps) or (u < phi and held < 40):
            expected, held = "student", min(40, held + 8)
        else:
            expected = "buffer" if u < phi else "data"
        assert schedule.phi == pytest.approx(phi)
        source = source_of(config, schedule, u, step, num_steps, buffer.is_full)
        assert source == expected, f"step {step}"
        if source == "student":
            buffer.push(*rollouts(8 * step, 8))
        seen.add(source)
        assert len(buffer) == held
    assert seen == {"data", "student", "buffer"}


@pytest.mark.parametrize(("mode", "share"), [("off", 0.0), ("on", 1.0), ("mixed", 0.3)])
def test_other_modes_take_their_share_of_steps(mode: str, share: float) -> None:
    config = RolloutConfig.model_validate({"mode": mode, "lambda": 0.3})
    sources = [source_of(config, AdaptiveSchedule(), draw_of(1, step), step, 2000, False) for step in range(2000)]
    assert sources.count("student") / 2000 == pytest.approx(share, abs=0.03)


def test_draws_are_functions_of_their_place_alone() -> None:
    assert draw_of(1, 5) == draw_of(1, 5)
    assert len({draw_of(seed, step) for seed in range(3) for step in range(3)}) == 9
    assert np.array_equal(token_draws(1, 5, 3, 8), token_draws(1, 5, 3, 8))
    assert np.array_equal(token_draws(1, 5, 3, 4), token_draws(1, 5, 3, 8)[:4])
    assert not np.array_equal(token_draws(1, 5, 3, 8), token_draws(1, 5, 4, 8))
    draws = token_draws(1, 5, 3, 4000)
    assert draws.dtype == np.float32 and bool(((draws >= 0) & (draws < 1)).all())
    assert draws.mean() == pytest.approx(0.5, abs=0.03)


def test_a_full_buffer_lets_the_oldest_go() -> None:
    buffer = ReplayBuffer(5)
    buffer.push(*rollouts(0, 4))
    assert not buffer.is_full
    buffer.push(*rollouts(4, 3))
    assert buffer.is_full
    assert buffer.to_arrays()["ids"].tolist() == [2, 3, 4, 5, 6]


def test_the_buffer_is_drawn_from_without_replacement_and_by_seed_and_step() -> None:
    buffer = ReplayBuffer(20)
    buffer.push(*rollouts(100, 20))
    ids, responses = buffer.sample(8, replay_generator(1, 2))
    assert len(set(ids.tolist())) == 8
    assert all(len(response) == row - 99 - 1 for row, response in zip(ids, responses, strict=True))
    assert buffer.sample(8, replay_generator(1, 2))[0].tolist() == ids.tolist()
    assert buffer.sample(8, replay_generator(1, 3))[0].tolist() != ids.tolist()


@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_buffer_comes_back_from_its_arrays(count: int) -> None:
    buffer, other = ReplayBuffer(6), ReplayBuffer(6)
    buffer.push(range(count), [np.arange(row + 1, dtype=np.int32) for row in range(count)])
    other.push(*rollouts(50, 3))
    other.fill(buffer.to_arrays())
    assert len(other) == count
    for name, array in buffer.to_arrays().items():
        assert np.array_equal(array, other.to_arrays()[name]), name


def test_responses_end_where_the_whole_row_must() -> None:
    assert limits_of([4, 30, 40], max_tokens=32, max_new_tokens=None) == [28, 2, 1]
    assert limits_of([4, 30], max_tokens=32, max_new_tokens=8) == [8, 2]
