"""The weights of frontier pacing, and the properties of its drawing."""

from __future__ import annotations

import numpy as np
import pytest

from pocl_ray.curriculum.frontier import draw_rows, row_weights, stage_steps


def test_weights_grow_with_the_gap_by_the_power_or_level_off() -> None:
    gaps = np.array([0.0, 0.02, 0.38, 1.0])
    assert row_weights(gaps) == pytest.approx(np.sqrt(gaps + 0.02))
    assert row_weights(gaps, power=0.0) == pytest.approx([1, 1, 1, 1])
    bounded = row_weights(gaps, floor=0.02, saturation=0.1)
    assert bounded == pytest.approx((gaps + 0.02) / (gaps + 0.1))
    assert row_weights(np.array([1e6]), saturation=0.1) == pytest.approx([1.0])


def test_a_gap_a_little_below_zero_counts_as_none_and_one_that_is_no_number_is_refused() -> None:
    assert row_weights(np.array([-1e-7, 0.0]))[0] == row_weights(np.array([0.0]))[0]
    assert row_weights(np.array([0.5], dtype=np.float32)).dtype == np.float64
    with pytest.raises(ValueError, match="gap of row 1 is not a finite number"):
        row_weights(np.array([0.1, np.nan, np.inf]))


@pytest.mark.parametrize("case", range(60))
def test_each_row_comes_as_often_as_its_share_says_rounded_up_or_down(case: int) -> None:
    rng = np.random.default_rng(case)
    num_rows, num_draws = int(rng.integers(1, 400)), int(rng.integers(1, 2000))
    weights = row_weights(rng.exponential(rng.choice([0.01, 0.5, 20.0]), num_rows), power=rng.choice([0.0, 0.5, 1.0]))
    drawn = draw_rows(weights, num_draws, seed=case, stage=case % 5)
    counts = np.bincount(drawn, minlength=num_rows)
    share = num_draws * weights / weights.sum()
    assert len(drawn) == num_draws and np.array_equal(drawn, np.sort(drawn))
    assert (counts >= np.floor(share - 1e-9)).all() and (counts <= np.ceil(share + 1e-9)).all()


def test_the_places_are_those_of_one_offset_in_the_cumulative_chances() -> None:
    weights = np.random.default_rng(1).random(50) + 0.01
    drawn = draw_rows(weights, 30, seed=7, stage=2)
    places = np.cumsum(weights) / weights.sum()
    offsets = [[(k + u) / 30 for k in range(30)] for u in np.linspace(0, 1, 2001)[:-1]]
    assert any(np.array_equal(np.searchsorted(places, row, side="right"), drawn) for row in offsets)


def test_seed_and_stage_move_the_draw_and_chances_come_out_over_stages() -> None:
    weights = np.array([0.5, 1.5, 3.0, 5.0])
    assert np.array_equal(draw_rows(weights, 3, 0, 1), draw_rows(weights, 3, 0, 1))
    draws = [draw_rows(weights, 3, seed, stage) for seed in range(40) for stage in range(50)]
    assert len({tuple(draw) for draw in draws}) > 2
    counts = np.bincount(np.concatenate(draws), minlength=4)
    assert counts / counts.sum() == pytest.approx(weights / weights.sum(), abs=0.01)


def test_stages_are_of_equal_length_to_a_step() -> None:
    assert stage_steps(8, 4) == [2, 2, 2, 2]
    made = stage_steps(582, 8)
    assert sum(made) == 582 and set(made) == {72, 73}
