"""A student of whom adapters alone are trained, through the whole flow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import config_tree, metrics

from pocl_ray.config import Config
from pocl_ray.pipeline import Pipeline

pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def run(cluster: None, ready_made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with a student cut from its teacher, which teaches live; its adapters are all that is written."""
    folder = tmp_path_factory.mktemp("lora")
    changes = {
        **ready_made,
        "student": {
            "num_layers": 1,
            "sft": {"max_steps": 2},
            "lora": {"rank": 2, "target_modules": ["q_proj", "up_proj"], "merge": False},
        },
        "curriculum": {"num_buckets": 2, "interval_epochs": 1},
        "distill": {"token_weight": "teacher_entropy", "teacher_cache": "none"},
        "control": None,
    }
    del changes["student__sft"]
    pipeline = Pipeline(Config.model_validate(config_tree(folder, **changes)))
    assert pipeline.report
    pipeline.close()
    return folder / "runs" / "tiny"


def test_the_student_is_its_adapters_and_is_evaluated_with_them(run: Path) -> None:
    assert not (run / "student" / "model.safetensors").exists() and (run / "student" / "tokenizer.json").exists()
    tensors = load_file(run / "student" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4 and all("layers.0" in name for name in tensors)
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name), "they were trained"
    figures = json.loads((run / "evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"}
    assert "AutoPeftModelForCausalLM" in (run / "student" / "README.md").read_text()


def test_warm_up_ends_in_a_plain_model_that_distillation_starts_from(run: Path) -> None:
    assert (run / "models" / "student" / "model.safetensors").exists()
    config = json.loads((run / "student" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].endswith("models/student")
    assert any("train/kd_loss" in record for record in metrics(run / "metrics.jsonl"))
    assert not (run / "teacher_cache").exists(), "the teacher read the rows in the training worker"
