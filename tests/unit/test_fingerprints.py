"""When the teacher is read in training: for a loss, for a watched figure, by a control or in a search; else never."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.fingerprints import any_training_reads_teacher, reads_teacher

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
