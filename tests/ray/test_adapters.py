"""A student of whom adapters alone are trained, through the whole flow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import cli, metrics, write_config

pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with a student cut from its teacher, whose adapters are all that is written."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_config(
        folder,
        student__architecture=None,
        student__num_layers=1,
        student__lora={"rank": 2, "target_modules": ["q_proj", "up_proj"], "merge": False},
        curriculum={"num_buckets": 2, "interval_epochs": 1},
        distill__token_weight="teacher_entropy",
        control=None,
        scaling__num_workers=1,
    )
    done = cli("run", str(config))
    assert done.returncode == 0, done.stderr
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


def test_a_target_that_matches_nothing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, student__architecture=None, student__num_layers=1, student__lora={"target_modules": ["c_attn"]}
    )
    done = cli("run", str(config))
    assert done.returncode == 2 and done.stderr.count("\n") <= 2
    assert "'c_attn' matches no linear layer of LlamaForCausalLM; it has q_proj" in done.stderr
    assert not (tmp_path / "runs").exists()
