"""Several teachers in the config: which stages they teach in, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import Config, load_config
from pocl_ray.config.loading import dump_config
from pocl_ray.curriculum.schedule import plan_control, plan_stages
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import distill_dependencies

NUM_ROWS = 800


def config_of(path: Path, teacher: Any, **changes: Any) -> Config:
    tree = {
        "name": "run",
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": teacher,
        "student": {"num_layers": 2},
        "control": {},
        **changes,
    }
    file = path / "config.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(file)


def weak_to_strong(path: Path, *stages: list[int] | None) -> Config:
    teachers = [{"path": f"teacher_{i}", **({} if s is None else {"stages": s})} for i, s in enumerate(stages)]
    return config_of(path, teachers)


def test_a_list_of_teachers_is_the_teacher_and_further_ones(tmp_path: Path) -> None:
    config = weak_to_strong(tmp_path, [0, 1], None)
    assert config.teacher.path == "teacher_0" and config.teacher.stages == (0, 1)
    assert [other.path for other in config.other_teachers] == ["teacher_1"]
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
    apart = config_of(tmp_path, {"path": "teacher_0", "stages": [0, 1]}, other_teachers=[{"path": "teacher_1"}])
    assert apart == config


def test_a_control_of_one_stage_is_taught_by_all(tmp_path: Path) -> None:
    config = weak_to_strong(tmp_path, [0, 1], [2, 3])
    stages = plan_stages(config, NUM_ROWS)
    assert [config.teacher.stages_of(len(plan)) for plan in (stages, plan_control(config, NUM_ROWS, 10))] == [
        (0, 1),
        None,
    ]


def test_a_stage_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stage 2 has no teacher"):
        plan_stages(weak_to_strong(tmp_path, [0, 1], [3]), NUM_ROWS)


def test_a_stage_that_there_is_not_is_refused_under_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other_teachers\.0\.stages: there is no stage 4; the stages are 0 to 3"):
        plan_stages(weak_to_strong(tmp_path, None, [4]), NUM_ROWS)


@pytest.mark.parametrize(
    ("teacher", "changes", "reason"),
    [
        ({"path": "t", "stages": [0]}, {}, "leaves the other stages without a teacher"),
        ([], {}, "a list of at least one"),
        ([{"path": "t"}, {"path": "u"}], {"other_teachers": [{"path": "v"}]}, "other_teachers is then left out"),
        ([{"path": "t"}, {"architecture": {"model_type": "llama"}, "sft": {}}], {}, "ready-made: give path"),
        ([{"path": "t"}, {"path": "u", "weight": 0}], {}, "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, teacher: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        config_of(tmp_path, teacher, **changes)
    assert "\n" not in str(error.value)


def test_weights_and_stages_are_what_a_student_depends_on(tmp_path: Path) -> None:
    def depends(*stages: list[int] | None) -> Any:
        config = weak_to_strong(tmp_path, *stages)
        return distill_dependencies(config, "ranking", "student", plan_stages(config, NUM_ROWS))

    assert depends([0, 1], None) != depends([0, 1, 2], None)
    assert depends(None)[0] == "ranking", "one teacher alone adds nothing"
