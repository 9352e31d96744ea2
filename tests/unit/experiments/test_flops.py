"""FLOPs by hand, and what they count."""

from __future__ import annotations

import pytest
from arms_config import TREE

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.experiments.flops import ArmFlops, FlopsCounter, ModelSize, equal_steps, size_of, uses_scores
from pocl_ray.models.building import build_model
from pocl_ray.records import RowsSummary

STUDENT, TEACHER = ModelSize(100, 50, 8), ModelSize(1000, 200, 30)
ROWS = RowsSummary("train", "rows.arrow", 256, 0, 256 * 6, 256 * 4, 4, "f")


def counted(**curriculum: object) -> tuple[Config, ArmFlops]:
    config = Config.model_validate({**TREE, "curriculum": {**TREE["curriculum"], **curriculum}})
    return config, FlopsCounter(STUDENT, TEACHER, ROWS).planned(config, plan_stages(config, ROWS.num_rows))


def test_a_forward_pass_by_hand() -> None:
    assert STUDENT.forward(10, 4, row_tokens=10) == 2 * 100 * 10 + 4 * 8 * 10 * 10 + 2 * 50 * 4


def test_plain_distillation_pays_for_the_cache_and_the_teachers_head() -> None:
    _, flops = counted()
    assert flops.scoring == 256 * TEACHER.forward(10, 4, 10)
    assert flops.training == pytest.approx(24 * 32 * (3 * STUDENT.forward(10, 4, 10) + TEACHER.head(4)))
    assert flops.refreshing == 0


def test_supervised_fine_tuning_reads_no_teacher() -> None:
    _, flops = counted(kd_ratio=0.0)
    assert flops.scoring == 0
    assert flops.training == pytest.approx(24 * 32 * 3 * STUDENT.forward(10, 4, 10))


def test_a_ranking_pays_for_the_students_signals() -> None:
    _, plain = counted()
    config, ranked = counted(pacing="baby_step", num_buckets=2, interval_epochs=1)
    assert uses_scores(config, plan_stages(config, ROWS.num_rows), ROWS.num_rows)
    assert ranked.scoring - plain.scoring == 2 * 256 * STUDENT.forward(10, 4, 10)  # read once, answered once
    assert ranked.training == pytest.approx(plain.training)


def test_the_baseline_gets_the_steps_that_an_arm_pays_for() -> None:
    baseline, arm = ArmFlops(100.0, 0.0, 1000.0), ArmFlops(150.0, 30.0, 1020.0)
    assert equal_steps(arm, baseline, 500) == 550
    assert equal_steps(baseline, baseline, 500) == 500


def test_the_size_of_a_model_is_that_of_its_matrices() -> None:
    keys = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    size = size_of(build_model(keys, 300, 0, None, 0))
    assert size == ModelSize(2 * (4 * 16 * 16 + 3 * 16 * 24), 300 * 16, 2 * 16)
