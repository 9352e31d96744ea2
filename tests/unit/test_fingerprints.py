"""The cases in which training reads the teacher: for a loss, for a watched figure, by a control or in a search."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.fingerprints import any_training_reads_teacher, distill_dependencies, reads_teacher, sft_dependencies
from pocl_ray.run_directory.digests import fingerprint

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
}
NEVER = {"kd_ratio": 0}


def config_of(curriculum: dict[str, Any], **more: Any) -> Config:
    return Config.model_validate({**TREE, "curriculum": curriculum, **more})


@pytest.mark.parametrize(
    ("curriculum", "is_read"),
    [
        ({}, True),
        (NEVER, False),
        ({"kd_ratio": [0, 0, 0, 0.1]}, True),
        ({"kd_ratio": {"values": [0, 1], "by": "step"}}, True),
        ({"kd_ratio": {"values": [0, 0], "by": "step"}}, False),
        ({**NEVER, "advance": "plateau", "plateau": {"metric": "kd_loss"}}, True),
        ({**NEVER, "advance": "plateau", "plateau": {"metric": "ce_loss"}}, False),
    ],
)
def test_a_run_reads_the_teacher_for_its_loss_or_for_the_figure_it_watches(
    curriculum: dict[str, Any], is_read: bool
) -> None:
    config = config_of(curriculum)
    assert reads_teacher(config, plan_stages(config, 1000)) is is_read


@pytest.mark.parametrize(
    ("more", "is_read"),
    [
        ({}, False),
        ({"control": {}}, True),
        ({"control": {"kd_ratio": 0}}, False),
        ({"tune": {"space": {"curriculum.kd_ratio": {"choice": [0, 1]}}}}, True),
    ],
)
def test_a_control_or_a_search_may_read_it_where_the_run_does_not(more: dict[str, Any], is_read: bool) -> None:
    config = config_of(NEVER, **more)
    assert any_training_reads_teacher(config, plan_stages(config, 1000)) is is_read


@pytest.mark.parametrize(
    ("difficulty", "is_read"),
    [
        ({"signals": ["ce_loss"], "rescore": "each_stage"}, False),
        ({"signals": ["teacher_student_kl"]}, False),
        ({"signals": ["ce_loss", "teacher_student_kl"], "rescore": "each_stage"}, True),
    ],
)
def test_a_signal_that_compares_the_models_again_between_stages_reads_it(
    difficulty: dict[str, Any], is_read: bool
) -> None:
    config = config_of(NEVER, difficulty=difficulty)
    assert reads_teacher(config, plan_stages(config, 1000)) is is_read


@pytest.mark.parametrize(
    ("curriculum", "distilled"),
    [
        ({}, "47c0766d5e7657e84ae86a5bb7f935eaf33b4bba6f7549f3bd3636233511fe18"),
        (
            {"optimizer": "continuous", "kd_temperature": {"start": 1, "end": 2, "by": "step"}},
            "be4d9a3d0dff89df3d90350c99d0150e432d13c63ed917cb2d9956150dc55d94",
        ),
    ],
)
def test_keys_that_came_later_leave_the_fingerprints_of_older_runs_alone(
    curriculum: dict[str, Any], distilled: str
) -> None:
    """The digests are those of the release before these keys: a run of then goes on, and trains nothing again."""
    config = config_of(curriculum, student={"path": "student", "sft": {}})
    assert fingerprint(distill_dependencies(config, "r", "s", plan_stages(config, 1000))) == distilled
    trained = "149be067a9e7e3d8e8025831edc3f53bd549caf3052f6d698be96fd31d1e2cc8"
    assert fingerprint(sft_dependencies(config, "student")) == trained


def test_tasks_of_lm_eval_leave_every_training_alone() -> None:
    def distilled(**more: Any) -> str:
        config = config_of({}, **more)
        return fingerprint(distill_dependencies(config, "r", "s", plan_stages(config, 1000)))

    assert distilled(evaluation={"tasks": ["arc_easy"]}) == distilled()


def test_adapters_of_before_are_trained_again_only_for_targets_that_are_named() -> None:
    def distilled(lora: dict[str, Any]) -> str:
        config = config_of({}, student={"path": "student", "lora": lora})
        return fingerprint(distill_dependencies(config, "r", "s", plan_stages(config, 1000)))

    before = "4cc3102a76e5af747c2550bc3103e21fe1fca6a067cce9ec6a9da4900d35bceb"
    assert distilled({"rank": 4}) == before
    assert distilled({"rank": 4, "target_parameters": ["experts.down_proj"]}) != before
