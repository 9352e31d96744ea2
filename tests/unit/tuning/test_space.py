from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from searches import search_config

from pocl_ray.config import DomainConfig
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.tuning.space import apply_settings, check_space, draw, grid_points


@pytest.mark.parametrize(
    ("domain", "low", "high"),
    [
        ({"uniform": [1.0, 3.0]}, 1.0, 3.0),
        ({"loguniform": [1e-4, 1e-2]}, 1e-4, 1e-2),
        ({"randint": [1, 3]}, 1, 3),
        ({"quniform": [0.5, 2.0, 0.5]}, 0.5, 2.0),
    ],
)
def test_draws_stay_within_the_bounds_and_reach_them(domain: dict[str, Any], low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw(DomainConfig(**domain), rng) for _ in range(300)]
    assert low <= min(drawn) and max(drawn) <= high
    if "randint" in domain or "quniform" in domain:
        assert {low, high} <= set(drawn)


def test_quantised_draws_lie_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    drawn = {draw(DomainConfig(quniform=(0.1, 0.5, 0.1)), rng) for _ in range(200)}
    assert drawn == {0.1, 0.2, 0.3, 0.4, 0.5}


def test_a_grid_has_every_combination() -> None:
    space = {"a": DomainConfig(grid=(1, 2)), "b": DomainConfig(choice=("x", (1, 2), None))}
    points = grid_points(space)
    assert len(points) == 6
    assert {"a": 2, "b": [1, 2]} in points


def test_settings_reach_nested_keys_and_leave_the_search_behind() -> None:
    config = apply_settings(
        search_config(),
        {"curriculum.kd_temperature.end": 3.0, "distill.loss_args.alpha": 0.2, "curriculum.kd_ratio": 1.0},
    )
    assert config.curriculum.kd_temperature.end == 3.0
    assert config.distill.loss_args == {"alpha": 0.2}
    assert config.curriculum.kd_ratio.shape == "constant"
    assert config.tune is None


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"curriculum.num_bucket": {"choice": [2]}}, "did you mean curriculum.num_buckets"),
        ({"curricula.num_buckets": {"choice": [2]}}, "did you mean curriculum"),
        ({"train.learning_rate": {"uniform": [0.0, 1.0]}}, "greater than 0"),
        ({"curriculum.num_buckets": {"choice": [2, "many"]}}, "'many'"),
        ({"data.max_tokens": {"choice": [64]}}, "made once for all trials"),
        ({"seed": {"choice": [1]}}, "made once for all trials"),
        ({"curriculum.num_steps": {"choice": [64]}}, "tune.budget"),
        ({"distill.loss": {"choice": ["forward_kl", "kullback"]}}, "kullback"),
        ({"difficulty.signals": {"choice": [["rouge"]]}}, "rouge"),
        ({"curriculum.pacing": {"choice": ["baby_stop"]}}, "baby_stop"),
    ],
)
def test_a_wrong_key_or_value_is_found_before_anything_starts(space: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check_space(search_config(space=space))
    assert "\n" not in str(caught.value)


def test_a_value_that_only_others_make_invalid_is_no_mistake() -> None:
    check_space(search_config(space={"train.global_batch_rows": {"choice": [16, 32]}}))
    with pytest.raises(ConfigError):
        check_space(search_config(space={"train.global_batch_rows": {"choice": [0]}}))
