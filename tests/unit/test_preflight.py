"""What is refused before anything is done, though each key by itself is right."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.config import Config
from pocl_ray.errors import ConfigError
from pocl_ray.preflight import check_rescoring, check_without_gpus

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 8},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "difficulty": {"rescore": "each_stage", "signals": ["ce_loss", "teacher_student_kl"]},
}
ALONE: dict[str, Any] = {"difficulty": {"rescore": "each_stage", "signals": ["ce_loss"]}}
TOP_K: dict[str, Any] = {"distill": {"teacher_cache": "topk"}}
SHARDED: dict[str, Any] = {
    "distill": {"teacher_cache": "none"},
    "teacher": {"path": "teacher", "sharded": True},
    "evaluation": {"teacher": False},
}


@pytest.mark.parametrize(
    ("changes", "says"), [(TOP_K, "topk does not keep"), (SHARDED, "set teacher.sharded to false")]
)
def test_rescoring_by_the_teacher_needs_all_of_it_on_each_worker(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_rescoring(Config.model_validate({**TREE, **changes}))
    check_rescoring(Config.model_validate({**TREE, **changes, **ALONE}))


def test_rescoring_over_a_cache_of_hidden_states_is_no_mistake() -> None:
    check_rescoring(Config.model_validate(TREE))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"distill": {"kernel": "liger"}}, "distill.kernel: liger runs on CUDA.* set auto"),
        (
            {"distill": {"teacher_cache": "none"}, "rollout": {"mode": "on", "backend": "vllm"}},
            "rollout.backend: vllm runs on GPUs.* set it to transformers",
        ),
    ],
)
def test_what_only_gpus_can_do_is_refused_on_a_cluster_without_them(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_without_gpus(Config.model_validate({**TREE, **changes}))
    check_without_gpus(Config.model_validate(TREE))
