"""The schedule of stages against the figures of the released logs, and its edges."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.config import Config, ScheduleConfig
from pocl_ray.curriculum.schedule import bucket_ends, check_curriculum, plan_control, plan_sft, plan_stages, scheduled
from pocl_ray.errors import ConfigError
from pocl_ray.records import Stage

DOLLY_ROWS = 11435


def config(global_batch_rows: int = 64, control: dict[str, float] | None = None, **curriculum: Any) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "data": {"train": {"path": "a.jsonl"}, "dev": {"path": "b.jsonl"}},
            "teacher": {"path": "teacher"},
            "student": {"path": "student"},
            "curriculum": curriculum,
            "control": control,
            "train": {"global_batch_rows": global_batch_rows},
        }
    )


# The paper


def test_dolly_gives_the_steps_of_the_released_logs() -> None:
    stages = plan_stages(config(), DOLLY_ROWS)
    assert [s.num_steps for s in stages] == [352, 712, 1064, 1424]
    assert [s.num_rows for s in stages] == [2858, 5716, 8574, 11435]
    assert [s.kd_temperature for s in stages] == [1.0, 1.33, 1.67, 2.0]
    assert [s.kd_ratio for s in stages] == [0.7, 0.8, 0.9, 1.0]
    assert [s.buckets for s in stages] == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert all(s.first_rank == 0 and s.num_epochs == 8 for s in stages)


def test_stage_sizes_are_those_of_the_authors_code(shared: Path) -> None:
    example = json.loads((shared / "parity" / "ranking.json").read_text(encoding="utf-8"))
    num_rows = len(example["order_easiest_first"])
    stages = plan_stages(config(global_batch_rows=8, num_buckets=example["num_stages"]), num_rows)
    assert [s.num_rows for s in stages] == example["stage_sizes"]


# Buckets and pacing


@pytest.mark.parametrize(
    ("num_rows", "num_buckets", "ends"),
    [(10, 4, (2, 4, 6, 10)), (8, 4, (2, 4, 6, 8)), (3, 3, (1, 2, 3)), (7, 1, (7,)), (5, 3, (1, 2, 5))],
)
def test_the_last_bucket_takes_the_remainder(num_rows: int, num_buckets: int, ends: tuple[int, ...]) -> None:
    assert bucket_ends(num_rows, num_buckets) == ends


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_more_buckets_than_rows_are_refused(num_rows: int) -> None:
    with pytest.raises(ConfigError, match=f"^curriculum.num_buckets: 4 buckets cannot be made of {num_rows} rows.*$"):
        plan_stages(config(num_buckets=4), num_rows)


def test_without_pacing_there_is_one_stage_on_all_rows_at_the_steps_of_baby_step() -> None:
    (stage,) = plan_stages(config(pacing="none", kd_ratio=[0.5]), DOLLY_ROWS)
    assert (stage.num_rows, stage.num_steps, stage.kd_ratio, stage.kd_temperature) == (DOLLY_ROWS, 3552, 0.5, 1.0)
    assert stage.buckets == (0, 1, 2, 3)
    assert stage.lr_num_steps == 3552


@pytest.mark.parametrize(("num_buckets", "stage"), [(4, 0), (1, 0)])
def test_a_stage_smaller_than_a_global_batch_is_refused(num_buckets: int, stage: int) -> None:
    with pytest.raises(ConfigError, match=rf"^stage {stage} has \d+ rows, fewer than one global batch of 64; lower "):
        plan_stages(config(num_buckets=num_buckets), 60)


def test_a_stage_of_exactly_one_global_batch_is_one_step_an_epoch() -> None:
    (stage,) = plan_stages(config(num_buckets=1, interval_epochs=1), 64)
    assert stage.num_steps == stage.steps_per_epoch == 1


# Schedules of temperature and ratio


def test_a_cosine_schedule_is_slow_at_both_ends() -> None:
    values = scheduled(ScheduleConfig(shape="cosine", start=1, end=3, decimals=None), 5)
    assert values == pytest.approx([2 - math.cos(math.pi * k / 4) for k in range(5)])


def test_a_constant_and_a_list_are_taken_as_they_are() -> None:
    assert scheduled(ScheduleConfig.model_validate(1.2345), 3) == (1.2345,) * 3
    assert scheduled(ScheduleConfig.model_validate([0.123, 1, 0.456]), 3) == (0.123, 1.0, 0.456)


def test_rounding_is_to_two_places_and_can_be_turned_off() -> None:
    assert scheduled(ScheduleConfig(start=1, end=2), 4) == (1.0, 1.33, 1.67, 2.0)
    assert scheduled(ScheduleConfig(start=1, end=2, decimals=None), 4)[1] == pytest.approx(4 / 3, abs=1e-15)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_single_stage_takes_the_start(shape: str) -> None:
    assert scheduled(ScheduleConfig.model_validate({"shape": shape, "start": 0.7, "end": 1.0}), 1) == (0.7,)


def test_a_schedule_may_fall() -> None:
    assert scheduled(ScheduleConfig(start=2, end=1), 3) == (2.0, 1.5, 1.0)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="lists 2 values, but there are 3 stages"):
        scheduled(ScheduleConfig.model_validate([1, 2]), 3)


@pytest.mark.parametrize("key", ["kd_temperature", "kd_ratio"])
def test_a_list_has_one_value_a_stage_and_the_message_names_the_key(key: str) -> None:
    for pacing, num_stages in (("baby_step", 4), ("none", 1), ("competence", 8)):
        curriculum = config(pacing=pacing, **{key: [0.5, 1.0, 1.0]}).curriculum
        there = "there is 1 stage;" if num_stages == 1 else f"there are {num_stages} stages;"
        with pytest.raises(ConfigError, match=f"curriculum.{key} lists 3 values, but {there} list one for each"):
            check_curriculum(curriculum)
    check_curriculum(config(num_buckets=3, **{key: [0.5, 1.0, 1.0]}).curriculum)


# Values that move by step


def over_all_steps(stages: tuple[Stage, ...], key: str) -> list[float]:
    return [getattr(stage, f"{key}_at")(step) for stage in stages for step in range(stage.num_steps)]


def test_by_step_a_linear_value_moves_evenly_over_the_whole_run_whatever_the_stages() -> None:
    stages = plan_stages(config(kd_temperature={"start": 2, "end": 1, "by": "step"}), DOLLY_ROWS)
    values = over_all_steps(stages, "kd_temperature")
    assert values == pytest.approx([2 - step / 3551 for step in range(3552)])
    assert [stage.kd_temperature for stage in stages] == pytest.approx([2 - s / 3551 for s in (0, 352, 1064, 2128)])
    assert {stage.kd_ratio_ramp for stage in stages} == {None}


def test_by_step_a_cosine_is_slow_at_both_ends_and_a_list_is_a_line_through_its_points() -> None:
    curriculum = {"kd_temperature": {"shape": "cosine", "start": 1, "end": 3, "by": "step"}}
    curriculum["kd_ratio"] = {"values": [0, 1, 0.5], "by": "step"}
    stages = plan_stages(config(num_buckets=2, interval_epochs=1, global_batch_rows=8, **curriculum), 24)
    num_steps = sum(stage.num_steps for stage in stages)
    assert num_steps == 4
    cosine = [2 - math.cos(math.pi * step / 3) for step in range(4)]
    assert over_all_steps(stages, "kd_temperature") == pytest.approx(cosine)
    assert over_all_steps(stages, "kd_ratio") == pytest.approx([0, 2 / 3, 5 / 6, 0.5])


def test_by_step_a_constant_and_a_single_step_stay_where_they_are() -> None:
    steady = {"shape": "constant", "start": 1.5, "by": "step"}
    assert set(over_all_steps(plan_stages(config(kd_temperature=steady), DOLLY_ROWS), "kd_temperature")) == {1.5}
    moving = {"start": 1, "end": 2, "by": "step"}
    curriculum = {"num_buckets": 1, "interval_epochs": 1, "kd_temperature": moving}
    (stage,) = plan_stages(config(global_batch_rows=8, **curriculum), 8)
    assert stage.kd_temperature_at(0) == 1.0


# The learning rate's place in its schedule


def test_restart_gives_each_stage_a_schedule_of_its_own() -> None:
    stages = plan_stages(config(optimizer="restart"), DOLLY_ROWS)
    assert all(s.restart_optimizer and s.lr_first_step == 0 and s.lr_num_steps == s.num_steps for s in stages)


def test_continuous_lays_one_schedule_over_all_stages() -> None:
    stages = plan_stages(config(optimizer="continuous"), DOLLY_ROWS)
    assert [s.restart_optimizer for s in stages] == [True, False, False, False]
    assert [s.lr_first_step for s in stages] == [0, 352, 1064, 2128]
    assert {s.lr_num_steps for s in stages} == {3552}


# The control and supervised fine-tuning


@pytest.mark.parametrize("optimizer", ["restart", "continuous"])
def test_the_control_takes_as_many_steps_on_all_rows_in_one_schedule(optimizer: str) -> None:
    stages = plan_stages(config(optimizer=optimizer), DOLLY_ROWS)
    asked = config(optimizer=optimizer, control={"kd_temperature": 1.5, "kd_ratio": 0.9})
    (control,) = plan_control(asked, DOLLY_ROWS, sum(s.num_steps for s in stages))
    assert control.num_steps == control.lr_num_steps == sum(s.num_steps for s in stages) == 3552
    assert (control.index, control.first_rank, control.end_rank) == (0, 0, DOLLY_ROWS)
    assert (control.kd_temperature, control.kd_ratio, control.restart_optimizer) == (1.5, 0.9, True)
    assert control.lr_first_step == 0
    assert control.num_epochs * control.steps_per_epoch >= control.num_steps, "its epochs hold all the steps"


def test_fine_tuning_is_one_stage_without_the_teacher() -> None:
    (stage,) = plan_sft(100, 3, None, 8, "student.sft")
    assert (stage.num_steps, stage.lr_num_steps, stage.kd_ratio, stage.num_rows) == (36, 36, 0.0, 100)


@pytest.mark.parametrize(("max_steps", "num_steps"), [(5, 5), (12, 12), (36, 36), (99, 36)])
def test_fine_tuning_stops_at_max_steps(max_steps: int, num_steps: int) -> None:
    (stage,) = plan_sft(100, 3, max_steps, 8, "student.sft")
    assert stage.num_steps == stage.lr_num_steps == num_steps


def test_fine_tuning_on_too_few_rows_names_its_section() -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.sft has 5 rows, fewer than one global batch of 8"):
        plan_sft(5, 1, None, 8, "teacher.sft")


def test_a_stage_comes_back_from_json_as_it_was() -> None:
    moving = {"start": 1, "end": 2, "by": "step"}
    ramped = plan_stages(config(kd_temperature=moving, advance="plateau"), DOLLY_ROWS)
    for stage in (*plan_stages(config(), DOLLY_ROWS), *ramped, *plan_sft(100, 3, 5, 8, "student.sft")):
        assert Stage.from_json(json.loads(json.dumps(stage.to_json()))) == stage


@pytest.mark.parametrize("optimizer", ["restart", "continuous"])
def test_wsd_is_one_schedule_over_the_whole_run_whatever_the_moments_do(optimizer: str) -> None:
    made = config(optimizer=optimizer)
    made = Config.model_validate({**made.model_dump(), "train": {"lr_schedule": "wsd"}})
    stages = plan_stages(made, 11435)
    assert [s.lr_first_step for s in stages] == [0, 352, 1064, 2128]
    assert {s.lr_num_steps for s in stages} == {3552}
    assert [s.restart_optimizer for s in stages[1:]] == [optimizer == "restart"] * 3


def test_wsd_needs_a_run_of_known_length() -> None:
    made = config(advance="plateau").model_dump()
    with pytest.raises(ValueError, match=r"train\.lr_schedule wsd falls over the end of the run.*advance to interval"):
        Config.model_validate({**made, "train": {"lr_schedule": "wsd"}})
