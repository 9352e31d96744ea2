from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import TREE, search_config

from pocl_ray.config import Config, load_config
from pocl_ray.errors import ConfigError


def load(tmp_path: Path, **tune: Any) -> Config:
    space = tune.pop("space", {"curriculum.num_buckets": {"choice": [2, 4]}})
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({**TREE, "tune": {"space": space, **tune}}))
    return load_config(path)


@pytest.mark.parametrize(
    ("tune", "says"),
    [
        ({"space": {}}, "nothing to search"),
        ({"space": {"curriculum.num_buckets": {"choice": [2], "randint": [1, 2]}}}, "exactly one"),
        ({"space": {"train.learning_rate": {"uniform": [2, 1]}}}, "low to high"),
        ({"space": {"train.learning_rate": {"loguniform": [0, 1]}}}, "above 0"),
        ({"space": {"train.learning_rate": {"quniform": [0.1, 1, 2]}}}, "step"),
        ({"scheduler": "pbt"}, "asha, median or none"),
        ({"scheduler": "hyper"}, "asha, median or none"),
        ({"objectives": ["bleu"]}, "there are rouge_l, exact_match"),
        ({"objectives": ["rouge_l", "rouge_l"]}, "differ"),
        ({"budget": {}}, "exactly one of steps and samples"),
        ({"budget": {"steps": 1, "samples": 2}}, "exactly one of steps and samples"),
        ({"algorithm": "grid", "space": {"train.learning_rate": {"uniform": [1e-4, 1e-3]}}}, "one by one"),
        ({"confirm": {"seeds": [1, 1]}}, "differ"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, tune: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path, **tune)
    assert "\n" not in str(caught.value) and "tune" in str(caught.value)


def test_the_name_of_a_metric_stands_for_an_objective(tmp_path: Path) -> None:
    tune = load(tmp_path, objectives=["eval/dev/rouge_l", "num_tokens"]).tune
    assert tune is not None
    assert [(o.metric, o.sign) for o in tune.objectives] == [("rouge_l", 1), ("num_tokens", -1)]


def test_a_search_does_not_make_another_run_of_its_config() -> None:
    from pocl_ray.config.neutral import neutral_free

    assert neutral_free(search_config()) == neutral_free(search_config(num_trials=2))
