"""Adapters of fused experts: which weights get one, that they merge exactly, and which share of the layers it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pocl_ray.config import Config, LoraConfig
from pocl_ray.config.sources import StudentConfig, TeacherConfig
from pocl_ray.errors import ConfigError
from pocl_ray.models.adapter_targets import coverage, target_layers, target_weights
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_model
from pocl_ray.models.lora import ADAPTER, add_adapters, add_same_adapters, save_student
from pocl_ray.models.places import ModelRef
from pocl_ray.models.prepare import adapter_coverage
from pocl_ray.models.saving import save_model
from pocl_ray.preview import print_plan
from pocl_ray.records import Coverage
from pocl_ray.report.files import read_run
from pocl_ray.report.headline import adapter_sentences
from pocl_ray.run_directory.storage import RunDirectory

peft = pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 10]])
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
_LOCAL = {"num_local_experts": 4, "intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
    "gpt_oss": {**_LOCAL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": _LOCAL,
    "deepseek_v3": {
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "head_dim": 4,
    },
}
LORA = LoraConfig(rank=3, alpha=6.0)
MIXTRAL_EXPERTS = [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]


def make(family: str, seed: int = 0) -> PreTrainedModel:
    model = build_model(
        {"model_type": family, "num_experts_per_tok": 2, **_SIZES, **FAMILIES[family]}, 60, 0, None, seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BT).logits


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters away from their start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_adapted_by_default_and_the_merged_student_is_the_adapted_one(
    family: str, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = new_tokenizer()
    base = str(save_model(make(family), tokenizer, tmp_path / "base"))
    student, copy = load_model(ModelRef(base)), make(family, seed=5)
    before, experts = logits(student), target_weights(student, LORA)
    assert len(experts) == (2 if family == "deepseek_v3" else 4) and all("expert" in name for name in experts)
    add_adapters(student, LORA, seed=3)
    torch.testing.assert_close(logits(student), before, rtol=1e-6, atol=1e-6)
    moved(student)
    expected = logits(student)
    assert not torch.allclose(expected, before, atol=1e-2)
    student(input_ids=IDS_BT).logits.square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert not parameter.requires_grad or parameter.grad is not None, name
    add_same_adapters(copy, student)  # as under ZeRO-3: for answers during training
    copy.load_state_dict(student.state_dict())
    torch.testing.assert_close(logits(copy), expected, rtol=1e-6, atol=1e-6)

    save_student(student, tokenizer, torch.float32, tmp_path / "student", LORA, base)
    adapter = str(tmp_path / "student" / ADAPTER)
    merged = load_model(ModelRef(str(tmp_path / "student")))
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in make(family).named_parameters()}
    as_teacher = load_model(ModelRef(base, adapter=adapter))
    by_peft = peft.PeftModel.from_pretrained(load_model(ModelRef(base)), adapter)
    for model in (merged, as_teacher, by_peft):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_targets_of_experts_are_names_or_their_ends_at_a_dot() -> None:
    model = make("mixtral")
    assert sorted(target_weights(model, LoraConfig())) == sorted(MIXTRAL_EXPERTS)
    assert target_weights(model, LoraConfig(target_modules=("q_proj",))) == []
    assert target_weights(model, LoraConfig(target_parameters=())) == []
    some = LoraConfig(target_modules=(), target_parameters=("layers.1.mlp.experts.down_proj", "gate.weight"))
    found = [
        f"model.layers.{i}.mlp.{name}" for i, name in ((0, "gate.weight"), (1, "gate.weight"), (1, "experts.down_proj"))
    ]
    assert sorted(target_weights(model, some)) == sorted(found)
    assert target_layers(model, some.target_modules) == []
    add_adapters(model, some, seed=0)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 6


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("experts.gate_proj", "matches no parameter of MixtralForCausalLM that is no layer of its own; nearest are "),
        ("q_proj.weight", "is the weight of a linear layer; name the layer, q_proj, in target_modules"),
        ("lm_head.weight", "is the weight of a linear layer"),
        ("embed_tokens.weight", "nearest are "),
        ("norm.weight", "nearest are "),
    ],
)
def test_a_wrong_target_is_told_with_the_nearest_names(target: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        target_weights(make("mixtral"), LoraConfig(target_parameters=(target,)))
    text = str(error.value)
    assert text.startswith(f"student.lora.target_parameters: '{target}' ") and says in text and "\n" not in text
    if target == "experts.gate_proj":
        assert text.partition("nearest are ")[2].startswith("experts.gate_up_proj, ")


def test_a_student_without_such_weights_and_dropout_are_refused(new_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ConfigError, match="all matrices of LlamaForCausalLM belong to layers; use target_modules"):
        target_weights(new_model("llama_tied"), LoraConfig(target_parameters=("experts.down_proj",)))
    with pytest.raises(ConfigError, match=r"student\.lora\.dropout: an adapter of experts\.gate_up_proj"):
        target_weights(make("mixtral"), LoraConfig(dropout=0.1))
    assert target_weights(make("mixtral"), LoraConfig(dropout=0.1, target_parameters=())) == []


def test_the_share_of_the_layers_that_adapters_change() -> None:
    model = make("mixtral")
    attention, experts, router = 4 * 16 * 16, 4 * 3 * 16 * 24, 4 * 16
    covered = coverage(model, LORA)
    assert covered.counts() == {
        "num_layer_weights": 2 * (attention + experts + router),
        "num_adapted_weights": 2 * (attention + experts),
    }
    assert not covered.is_little and covered.left_out == ()
    little = coverage(model, LoraConfig(target_modules=("q_proj", "v_proj")))
    assert little.num_adapted == 2 * 2 * 16 * 16 and little.is_little
    assert str(little) == (
        "adapters change 1,024 of the 11,392 weights in the student's layers (9%); to adapt experts too, set "
        "student.lora.target_parameters: [experts.gate_up_proj, experts.down_proj]"
    )
    assert "layers (100%)" in str(
        coverage(build_model({"model_type": "llama", **_SIZES, "intermediate_size": 24}, 60, 0, None, 0), LORA)
    )


def test_the_share_is_known_from_the_config_alone(new_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    base = str(save_model(make("mixtral"), new_tokenizer(), tmp_path / "base"))
    for file in (tmp_path / "base").glob("*.safetensors"):
        assert load_file(file)  # the check wants weights to be there, and reads none of them
    whole = adapter_coverage(TeacherConfig(path=base), StudentConfig(path=base, lora=LORA))
    half = adapter_coverage(TeacherConfig(path=base), StudentConfig(num_layers=1, lora=LORA))
    assert 2 * half.num_adapted == whole.num_adapted


@pytest.mark.parametrize(("targets", "kind"), [(None, "note"), (("q_proj",), "warning")])
def test_plan_tells_the_share_in_one_line(
    targets: Any, kind: str, new_tokenizer: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_model(make("mixtral"), new_tokenizer(), tmp_path / "base"))
    tree = {
        "name": "run",
        "storage_path": str(tmp_path / "runs"),
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": {"path": base},
        "student": {"path": base, "lora": {"target_modules": targets}},
    }
    print_plan(Config.model_validate(tree), 1000)
    lines = [line for line in capsys.readouterr().out.splitlines() if "adapters change" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{kind}: adapters change ")


def test_the_report_says_the_share(tmp_path: Path) -> None:
    steps = {"distill": {"status": "done", "counts": {"num_steps": 3, **Coverage(200, 50).counts()}}}
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "steps": steps}))
    (sentence,) = adapter_sentences(read_run(RunDirectory.open(str(tmp_path.parent), tmp_path.name)))
    assert sentence == "The adapters change 50 of the 200 weights in the student's layers (25%)."
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "steps": {}}))
    assert adapter_sentences(read_run(RunDirectory.open(str(tmp_path.parent), tmp_path.name))) == []
