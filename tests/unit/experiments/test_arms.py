"""Arms: what they change, which share a scoring, and each mistake in one line."""

from __future__ import annotations

from typing import Any

import pytest
from arms_config import ARMS, NUM_ROWS, TREE, experiment_config
from pydantic import ValidationError

from pocl_ray.config import Config, load_config
from pocl_ray.config.loading import describe, with_overrides
from pocl_ray.errors import ConfigError
from pocl_ray.experiments.arms import by_scoring, notes, plan_arms, with_steps


def refused(**keys: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        experiment_config(**keys)
    return describe(caught.value)


def test_arms_differ_from_the_config_by_their_keys_alone() -> None:
    arms = plan_arms(experiment_config(), NUM_ROWS)
    assert list(arms) == ["plain", "hot", "fast"]
    assert arms["plain"].config.experiment is None
    ramp = arms["hot"].stages[0].kd_temperature_ramp
    assert ramp is not None
    assert ramp.points == (1.0, 2.0)
    assert arms["fast"].config.train.learning_rate == 5e-4
    assert {arm.num_steps for arm in arms.values()} == {24}


def test_another_learning_rate_leaves_the_fine_tuned_student_and_the_scoring_as_they_are() -> None:
    config = experiment_config()
    arms = plan_arms(config, NUM_ROWS)
    sft = arms["fast"].config.student.sft
    assert sft is not None
    assert sft.train.learning_rate == config.train.learning_rate
    assert by_scoring(config, arms) == {"trial": ["plain", "hot", "fast"]}
    assert notes(config, arms) == []


def test_arms_that_need_another_scoring_get_one_of_their_own_and_are_named() -> None:
    other = {"larger": {"student.path": "larger"}, "larger-hot": {"student.path": "larger", **ARMS["hot"]}}
    config = experiment_config(other)
    arms = plan_arms(config, NUM_ROWS)
    assert by_scoring(config, arms) == {"trial": ["plain"], "trial--larger": ["larger", "larger-hot"]}
    assert notes(config, arms) == ["larger, larger-hot: needs another scoring, which is made in trial--larger"]


def test_arms_that_differ_in_steps_are_named() -> None:
    config = experiment_config({"long": {"curriculum.num_steps": 30}})
    (note,) = notes(config, plan_arms(config, NUM_ROWS))
    assert note.startswith("arms differ in optimizer steps: plain 24, long 30;")


def test_the_same_arm_for_more_steps() -> None:
    config = experiment_config()
    longer = with_steps(config, plan_arms(config, NUM_ROWS)["hot"], 31, NUM_ROWS)
    assert (longer.name, longer.num_steps) == ("hot-31-steps", 31)
    ramp = longer.stages[0].kd_temperature_ramp
    assert ramp is not None
    assert ramp.num_positions == 31


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seeds": [7]}, "experiment: one seed gives no interval; give seeds at least 2, better 8"),
        ({"seeds": [7, 7]}, "experiment.seeds: seeds must differ from one another"),
        ({"baseline": "plane"}, "experiment: baseline 'plane' is none of the arms; did you mean plain?"),
        ({"baseline": "kd"}, "experiment: baseline 'kd' is none of the arms; the arms are plain, hot, fast"),
        ({"screen": {"seeds": [3]}}, "experiment: seed 3 stands in screen.seeds as well"),
        ({"screen": {"seeds": [9], "keep": 3}}, "experiment: screen.keep is 3, and there are 2 arms beside"),
        ({"arms": {"a b": {}}}, "experiment.arms: arm 'a b': names hold letters"),
        ({"arms": {}}, "experiment.arms: a comparison needs at least two arms"),
    ],
)
def test_a_section_that_cannot_work_is_refused_in_one_line(keys: dict[str, Any], message: str) -> None:
    assert refused(**keys).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"curriculum.pacingg": "none"}, "unknown key curriculum.pacingg; did you mean curriculum.pacing?"),
        ({"curriculum": {"pacing": "nonne"}}, "curriculum.pacing: unknown rule 'nonne'; did you mean none?"),
        ({"student.seed": 3}, "student.seed cannot differ between arms, since all arms of a seed start from the same"),
        ({"train.seed": 3}, "train.seed cannot differ between arms, since experiment.seeds sets it; remove it"),
        ({"evaluation": {"seeds": [1]}}, "evaluation cannot differ between arms, since all arms are judged alike"),
        ({"train.learning_rate": -1}, "train.learning_rate: Input should be greater than 0 (given: -1)"),
        ({"distill.loss": "foward_kl"}, "distill.loss: loss 'foward_kl' is unknown"),
        ({"curriculum.num_buckets": 64, "curriculum.pacing": "baby_step"}, "stage 0 has 4 rows"),
    ],
)
def test_an_arm_that_cannot_work_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^experiment\.arms\.odd: ") as caught:
        plan_arms(experiment_config({"odd": overrides}), NUM_ROWS)
    assert message in str(caught.value)


def test_a_student_of_its_own_for_each_seed_is_said() -> None:
    config = experiment_config(student="by_seed")
    (note,) = notes(config, plan_arms(config, NUM_ROWS))
    assert "each seed has a student of its own" in note
    assert "in trial--seed-1 and so on" in note


def test_students_that_could_not_differ_by_seed_are_refused() -> None:
    config = experiment_config({"ready": {"student.sft": None}}, student="by_seed")
    with pytest.raises(ConfigError) as caught:
        plan_arms(config, NUM_ROWS)
    place = "experiment.arms.ready: experiment.student by_seed"
    assert str(caught.value).startswith(f"{place}: the student is neither made nor fine-tuned here")
    plan_arms(config.model_copy(update={"experiment": experiment_config().experiment}), NUM_ROWS)


def test_without_a_section_there_is_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match=r"^experiment: the config has no such section"):
        plan_arms(Config.model_validate(TREE), NUM_ROWS)


def test_dotted_and_nested_keys_are_the_same() -> None:
    config = Config.model_validate(TREE)
    dotted = with_overrides(config, {"train.learning_rate": 1e-3, "train.betas": [0.9, 0.98]})
    assert dotted == with_overrides(config, {"train": {"learning_rate": 1e-3, "betas": [0.9, 0.98]}})
    assert dotted.train.global_batch_rows == 32


def test_the_shipped_experiment_is_at_equal_steps_and_shares_one_scoring() -> None:
    config = load_config("configs/experiment-quickstart.yaml")
    arms = plan_arms(config, 3750)
    assert notes(config, arms) == []
