"""FLOPs by hand, and what they count."""

from __future__ import annotations

import pytest
from arms_config import TREE

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.experiments.flops import ArmFlops, FlopsCounter, equal_steps, size_of, uses_scores
from pocl_ray.models.building import build_model
from pocl_ray.models.shapes import ModelSize
from pocl_ray.records import RowsSummary

STUDENT, TEACHER = ModelSize(100, 50, 8), ModelSize(1000, 200, 30)
ROWS = RowsSummary("train", "rows.arrow", 256, 0, 256 * 6, 256 * 4, 4, "f")


def counted(distill: dict[str, object] | None = None, **curriculum: object) -> tuple[Config, ArmFlops]:
    config = Config.model_validate(
        {**TREE, "curriculum": {**TREE["curriculum"], **curriculum}, "distill": distill or {}}
    )
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


def test_drawing_rows_by_their_gap_pays_for_the_forward_pass_that_measures_it_first() -> None:
    _, plain = counted()
    _, drawn = counted(pacing="frontier")
    assert drawn.scoring - plain.scoring == 256 * STUDENT.forward(10, 4, 10)  # read once; the cache is there anyway
    assert (drawn.refreshing, drawn.training) == (0, pytest.approx(plain.training))


@pytest.mark.parametrize(
    ("cache", "rescore_rows", "num_rows", "of_teacher"),
    [
        ("hidden", None, 256, TEACHER.head(4)),
        ("hidden", 64, 64, TEACHER.head(4)),
        ("hidden", 999, 256, TEACHER.head(4)),
        ("topk", None, 256, 0.0),
        ("none", None, 256, TEACHER.forward(10, 4, 10)),
    ],
)
def test_measuring_gaps_again_pays_for_the_rows_that_are_read(
    cache: str, rescore_rows: int | None, num_rows: int, of_teacher: float
) -> None:
    frontier = {"num_stages": 4, "refresh": "rescore", "rescore_rows": rescore_rows}
    _, flops = counted({"teacher_cache": cache}, pacing="frontier", frontier=frontier)
    assert flops.refreshing == pytest.approx(3 * num_rows * (STUDENT.forward(10, 4, 10) + of_teacher))


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
