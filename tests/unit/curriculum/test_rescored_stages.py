"""The stages before which rows are scored again: those that take a part of the rows by rank, after the first."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import check_curriculum, plan_control, plan_stages
from pocl_ray.errors import ConfigError
from pocl_ray.records import Stage

NUM_ROWS = 1000


def config(rescore: str = "each_stage", **curriculum: Any) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
            "teacher": {"path": "teacher"},
            "student": {"path": "student"},
            "difficulty": {"rescore": rescore},
            "curriculum": curriculum,
            "control": {},
        }
    )


def rescored(found: Config) -> list[bool]:
    return [stage.rescore for stage in plan_stages(found, NUM_ROWS)]


@pytest.mark.parametrize(
    ("curriculum", "expected"),
    [
        ({}, [False, True, True, False]),
        ({"pacing": "one_pass"}, [False, True, True, True]),
        ({"pacing": "anti"}, [False, True, True, False]),
        ({"pacing": "competence", "pacing_args": {"num_stages": 3}}, [False, True, False]),
        ({"advance": "plateau"}, [False, True, True, False]),
    ],
)
def test_a_stage_is_scored_for_again_where_the_rank_decides_its_rows(
    curriculum: dict[str, Any], expected: list[bool]
) -> None:
    assert rescored(config(**curriculum)) == expected
    assert not any(rescored(config(rescore="never", **curriculum)))


@pytest.mark.parametrize(
    "curriculum", [{"pacing": "none"}, {"pacing": "random"}, {"num_buckets": 2}, {"num_buckets": 1}]
)
def test_where_that_is_no_stage_it_is_refused_before_rows_are_read(curriculum: dict[str, Any]) -> None:
    found = config(**curriculum)
    with pytest.raises(ConfigError, match=r"difficulty\.rescore each_stage.*nothing would be scored again"):
        plan_stages(found, NUM_ROWS)
    with pytest.raises(ConfigError, match=r"difficulty\.rescore each_stage"):
        check_curriculum(found.curriculum, rescores=True)
    check_curriculum(found.curriculum)


def test_the_control_is_not_concerned() -> None:
    (control,) = plan_control(config(), NUM_ROWS, 40)
    assert not control.rescore


def test_the_plan_file_says_it() -> None:
    stages = plan_stages(config(), NUM_ROWS)
    assert [Stage.from_json(stage.to_json()) for stage in stages] == list(stages)


def test_signals_that_never_change_cannot_be_scored_again() -> None:
    tree = config().model_dump(mode="json")
    tree["difficulty"] = {"signals": ["teacher_ce_loss", "response_tokens"], "rescore": "each_stage"}
    with pytest.raises(ValueError, match="never change while the student learns"):
        Config.model_validate(tree)
    tree["difficulty"]["signals"].append("ce_loss")
    Config.model_validate(tree)
