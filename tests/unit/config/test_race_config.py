"""What a race is told, planned and refused, each mistake in one line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from pocl_ray.arms import plan_race
from pocl_ray.config import Config, CurriculumConfig
from pocl_ray.config.loading import describe
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import any_training_reads_teacher
from pocl_ray.integrations.curriculum import Curriculum
from pocl_ray.preview import print_plan, race_notes

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
    "teacher": {"path": "teacher"},
    "student": {"path": "student", "sft": {}},
    "train": {"global_batch_rows": 32},
}
NUM_ROWS = 3750


def config_of(race: dict[str, Any] | None = None, curriculum: dict[str, Any] | None = None, **more: Any) -> Config:
    own = {"pacing": "race", "num_steps": 100, **({} if race is None else {"race": race}), **(curriculum or {})}
    return Config.model_validate({**TREE, "curriculum": own, **more})


def test_without_arms_named_the_default_ones_run_against_plain_distillation() -> None:
    race = plan_race(config_of(), NUM_ROWS)
    assert list(race.arms) == ["plain", "frontier", "temperature"]
    plain, frontier, temperature = race.arms.values()
    assert {arm.num_steps for arm in race.arms.values()} == {100}
    assert [stage.kd_temperature for stage in plain.stages] == [1.0] and plain.config.curriculum.pacing == "none"
    assert len(frontier.stages) == 8 and frontier.stages[-1].kd_temperature_at(99) == 2.0
    assert len(temperature.stages) == 1 and temperature.stages[0].kd_temperature_at(99) == 2.0
    assert [(rung.step, rung.num_left) for rung in race.plan.rungs] == [(20, 2), (40, 1)]
    assert plan_stages(config_of(), NUM_ROWS) == plain.stages
    assert any_training_reads_teacher(config_of(), plain.stages)
    assert config_of().difficulty.signals == {"teacher_student_kl": 1.0}


def test_the_plan_tells_arms_rungs_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of({"arms": {"gap": {"curriculum": {"pacing": "frontier", "frontier": {"refresh": "rescore"}}}}})
    notes = "\n".join(race_notes(plan_race(config, NUM_ROWS)))
    assert "rung at step 60 (60%): at most 2 arms, the last one is handed out" in notes
    assert "race: at most 160 optimizer steps, 1.60 times a plain run" in notes
    assert "gap: gaps are refreshed by 26,250 forward passes" in notes
    shown = Console(record=True, width=200)
    monkeypatch.setattr("pocl_ray.preview.Console", lambda **_: shown)
    print_plan(config_of(), NUM_ROWS)
    assert "at most 160 optimizer steps, 1.60 times" in shown.export_text()


@pytest.mark.parametrize(
    ("race", "more", "words"),
    [
        ({"arms": {}}, {}, "a race needs an arm besides plain distillation"),
        ({"arms": {"plain": {"curriculum.kd_temperature": 2}}}, {}, "'plain' is plain distillation, which every race"),
        ({"arms": {"same": {}}}, {}, "arm 'same' changes no key"),
        ({"arms": {"a b": {"curriculum.kd_temperature": 2}}}, {}, "names hold letters"),
        ({"arms": {"a": {"curriculum.race.margin": 0.1}}}, {}, "arm 'a' holds a race of its own"),
        ({"rungs": [0.4, 0.2]}, {}, "rungs are shares of the steps"),
        (None, {"curriculum": {"advance": "plateau", "num_steps": None}}, "the arms of pacing race take equal steps"),
        (None, {"control": {"seeds": [1, 2]}}, "control.seeds trains the curriculum again"),
        (None, {"tune": {"space": {"curriculum.kd_ratio": {"choice": [0, 1]}}}}, "and so does tune; remove tune"),
        (None, {"experiment": {"arms": {"plain": {}, "b": {}}, "seeds": [1, 2]}}, "and so does experiment"),
    ],
)
def test_what_makes_no_race_is_refused_in_one_line(race: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(race, **more)
    line = describe(caught.value)
    assert words in line and "\n" not in line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"curriculum.num_steps": 50}, "it takes 50 optimizer steps and plain distillation 100"),
        ({"distill.teacher_cache": "none"}, "it needs another scoring than plain distillation"),
        ({"student.num_layers": 2}, "it needs another scoring|student"),
        ({"difficulty.signals": ["ce_loss"]}, "difficulty.signals cannot differ between arms"),
        ({"train": {"seed": 3}}, "train.seed cannot differ between arms"),
        ({"curriculum.pacing": "race"}, "curriculum.pacing race trains arms of its own"),
        ({"curriculum.pacng": "none"}, "did you mean curriculum.pacing"),
        ({"distill.loss": "forward_lk"}, "forward_lk"),
    ],
)
def test_arms_that_cannot_be_compared_are_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"curriculum\.race\.arms\.odd: .*({words})"):
        plan_race(config_of({"arms": {"odd": keys}}), NUM_ROWS)


def test_an_arm_that_is_plain_distillation_is_named() -> None:
    ramp = {"start": 1.0, "end": 2.0, "by": "step"}
    with pytest.raises(ConfigError, match=r"race\.arms\.temperature: nothing in it differs from plain distillation"):
        plan_race(config_of(curriculum={"kd_temperature": ramp}), NUM_ROWS)


def test_another_learning_rate_keeps_the_student() -> None:
    race = plan_race(config_of({"arms": {"fast": {"train.learning_rate": 1e-3}}}), NUM_ROWS)
    assert race.arms["fast"].scoring == race.arms["plain"].scoring


def test_two_tokenizers_are_compared_by_cross_entropy() -> None:
    bridged = {**TREE["teacher"], "cross_tokenizer": "uld"}
    curriculum = {"kd_ratio": 0.5}
    race: dict[str, Any] = {"arms": {"less": {"curriculum.kd_ratio": 0.3}}}
    with pytest.raises(ValidationError, match=r"race\.figure kl has no meaning over two tokenizers"):
        config_of(race, curriculum, teacher=bridged)
    assert config_of({**race, "figure": "ce_loss"}, curriculum, teacher=bridged).curriculum.race is not None


def test_other_trainers_hold_no_race() -> None:
    with pytest.raises(ConfigError, match="race trains several students and drops all but one"):
        Curriculum.from_ranks([1, 2, 3, 4], CurriculumConfig(pacing="race"), 2)
