"""Paired intervals, held against printed tables and against what they promise: how often they cover the truth."""

from __future__ import annotations

import numpy as np
import pytest

from pocl_ray.trainings.statistics import paired_difference, t_distribution, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (29, 2.045), (120, 1.980)]
)
def test_t_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-4)


def test_the_t_distribution_rises_from_a_half() -> None:
    values = [t_distribution(t, 5) for t in (0.0, 0.5, 1.0, 2.0, 100.0)]
    assert values[0] == 0.5
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1.0)


def test_a_difference_is_paired_by_seed() -> None:
    baseline = np.array([10.0, 50.0, 90.0, 20.0])
    found = paired_difference(baseline + np.array([1.0, 1.2, 0.8, 1.0]), baseline, higher_is_better=True)
    assert found.mean == pytest.approx(1.0)
    assert 0 < found.t_low < found.bootstrap_low < 1 < found.bootstrap_high < found.t_high
    assert (found.num_wins, found.num_ties, found.num_seeds) == (4, 0, 4)
    assert found.verdict(higher_is_better=True) == "ahead"
    assert found.verdict(higher_is_better=False) == "behind"


def test_what_is_lower_wins_where_less_is_better() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [1.0, 3.0, 5.0], higher_is_better=False)
    assert (found.num_wins, found.num_ties) == (2, 1)
    assert found.verdict(higher_is_better=False) == "level"  # -1 +- 2.5


def test_equal_differences_have_an_interval_of_no_width() -> None:
    found = paired_difference([2.0, 3.0], [1.0, 2.0], higher_is_better=True)
    assert (found.t_low, found.t_high, found.half_width) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("arms", [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_one_seed_gives_no_interval(arms: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="at least 2 seeds"):
        paired_difference(*arms, higher_is_better=True)


def test_intervals_cover_the_true_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(0.3, 2.0, size=(600, 8))
    found = [paired_difference(sample, np.zeros(8), higher_is_better=True) for sample in samples]
    covered = np.mean([one.t_low <= 0.3 <= one.t_high for one in found])
    assert 0.92 < covered < 0.98
