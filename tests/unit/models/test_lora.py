"""Adapters: where they go, what they change, that they come back from files, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pocl_ray.config import LoraConfig
from pocl_ray.config.sources import StudentConfig, TeacherConfig
from pocl_ray.errors import ConfigError, ModelError
from pocl_ray.models import head_loading
from pocl_ray.models.adapter_targets import target_layers
from pocl_ray.models.heads import head_of
from pocl_ray.models.loading import load_model
from pocl_ray.models.lora import ADAPTER, add_adapters, add_same_adapters, save_student
from pocl_ray.models.places import ModelRef, model_fingerprint
from pocl_ray.models.prepare import check_adapters, reference, trained_reference
from pocl_ray.models.saving import save_model

peft = pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")

LORA = LoraConfig(rank=3, alpha=6.0)
IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 10]])
MakeModel = Callable[..., PreTrainedModel]
Saved = tuple[Path, Path, PreTrainedModel]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BT).logits


def trained_like(model: PreTrainedModel, lora: LoraConfig = LORA, seed: int = 1) -> PreTrainedModel:
    """The model with adapters that have left their start."""
    add_adapters(model, lora, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def saved(tmp_path: Path, new_model: MakeModel, new_tokenizer: Callable[..., Any]) -> Saved:
    """A tied model, the directory of a student trained from it, and that student before it was merged."""
    tokenizer = new_tokenizer()
    base = save_model(new_model("llama_tied"), tokenizer, tmp_path / "base")
    student = trained_like(load_model(ModelRef(str(base))))
    again = trained_like(load_model(ModelRef(str(base))))
    save_student(again, tokenizer, torch.float32, tmp_path / "student", LORA, str(base))
    return base, tmp_path / "student", student


# Where adapters go


def test_every_linear_layer_but_the_head_gets_one(family: str, new_model: MakeModel) -> None:
    model = new_model(family)
    layers = target_layers(model, None)
    head = model.get_output_embeddings()
    assert layers and all(model.get_submodule(name) is not head for name in layers)
    per_layer = {"gpt2": 4, "opt": 6, "opt_350m": 6}.get(family, 7)
    projections = 2 if family == "opt_350m" else 0
    assert len(layers) == per_layer * 4 + projections


def test_targets_are_names_or_their_ends_at_a_dot(new_model: MakeModel) -> None:
    model = new_model("llama_tied")
    assert target_layers(model, ["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in range(4)]
    assert target_layers(model, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert len(target_layers(model, ["q_proj", "self_attn.q_proj", "k_proj"])) == 8


@pytest.mark.parametrize("target", ["qproj", "proj", "self_attn", "embed_tokens", "norm", "layers.9.self_attn.q_proj"])
def test_a_target_that_matches_nothing_is_refused_with_the_names_that_exist(target: str, new_model: MakeModel) -> None:
    with pytest.raises(ConfigError) as error:
        target_layers(new_model("llama_tied"), ["q_proj", target])
    assert str(error.value) == (
        f"student.lora.target_modules: '{target}' matches no linear layer of LlamaForCausalLM; "
        "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


@pytest.mark.parametrize("family", ["llama_tied", "llama_untied"])
def test_the_head_stays_frozen(family: str, new_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="'lm_head' is the LM head, which stays frozen; choose among q_proj"):
        target_layers(new_model(family), ["lm_head"])


# What they change


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(family: str, new_model: MakeModel) -> None:
    model = new_model(family)
    before = logits(model)
    state = torch.get_rng_state()
    add_adapters(model, LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "the global random state was touched"
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=0.0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(target_layers(new_model(family), None))
    assert all(3 in p.shape and ("lora_A" in name or "lora_B" in name) for name, p in trained.items())


def test_the_seed_alone_decides_how_adapters_start(new_model: MakeModel) -> None:
    models = [new_model("llama_tied") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(1)
        add_adapters(model, LORA, seed)
    first, same, other = ([p for p in model.parameters() if p.requires_grad] for model in models)
    assert all(map(torch.equal, first, same)) and not all(map(torch.equal, first, other))


def test_the_output_of_an_adapter_is_alpha_over_rank_times_b_a(new_model: MakeModel) -> None:
    model = trained_like(new_model("llama_untied"), LoraConfig(rank=3, alpha=1.5, target_modules=("up_proj",)))
    layer: Any = model.get_submodule("model.layers.2.mlp.up_proj")
    hidden_NH = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    a_RH, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = hidden_NH.double() @ (layer.base_layer.weight + 0.5 * b_OR @ a_RH).double().t()
    torch.testing.assert_close(layer(hidden_NH).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_gets_the_same_adapters_and_a_plain_student_none(new_model: MakeModel) -> None:
    student, copy = trained_like(new_model("qwen2")), new_model("qwen2", seed=5)
    add_same_adapters(copy, student)
    assert [name for name, _ in copy.named_parameters()] == [name for name, _ in student.named_parameters()]
    copy.load_state_dict(student.state_dict())
    torch.testing.assert_close(logits(copy), logits(student), rtol=0.0, atol=0.0)
    plain = new_model("qwen2")
    names = [name for name, _ in plain.named_parameters()]
    add_same_adapters(plain, new_model("qwen2"))
    assert [name for name, _ in plain.named_parameters()] == names


# Files


def test_a_merged_student_is_a_plain_model_that_answers_as_the_adapted_one(
    family: str, new_model: MakeModel, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    student = trained_like(new_model(family))
    expected = logits(student)
    tied = student.config.tie_word_embeddings
    save_student(student, new_tokenizer(), torch.float32, tmp_path / "student", LORA, "base")
    loaded = load_model(ModelRef(str(tmp_path / "student")))
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in new_model(family).named_parameters()}
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_written_adapters_are_read_by_peft_itself(saved: Saved) -> None:
    base, directory, student = saved
    wrapped = peft.PeftModel.from_pretrained(load_model(ModelRef(str(base))), str(directory / ADAPTER))
    torch.testing.assert_close(logits(wrapped), logits(student), rtol=1e-6, atol=1e-6)
    config = json.loads((directory / ADAPTER / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6.0, "LORA")
    assert config["base_model_name_or_path"] == str(base)


def test_without_merge_the_directory_holds_adapters_and_its_reference_merges_them(
    saved: Saved, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    base, _, student = saved
    alone = LORA.model_copy(update={"merge": False})
    expected = logits(student)
    save_student(student, new_tokenizer(), torch.bfloat16, tmp_path / "alone", alone, str(base))
    assert not list((tmp_path / "alone").glob("*.safetensors")) and not (tmp_path / "alone" / "config.json").exists()
    config = StudentConfig(path=str(base), lora=alone)
    ref = trained_reference(config, reference(config), str(tmp_path / "alone"))
    torch.testing.assert_close(logits(load_model(ref)), expected, rtol=1e-4, atol=1e-4)
    merged = trained_reference(StudentConfig(path=str(base), lora=LORA), reference(config), "merged")
    assert merged == ModelRef("merged")


def test_an_adapter_is_merged_at_load_in_the_dtype_asked_for(saved: Saved) -> None:
    base, directory, student = saved
    ref = ModelRef(str(base), adapter=str(directory / ADAPTER))
    torch.testing.assert_close(logits(load_model(ref)), logits(student), rtol=1e-4, atol=1e-4)
    low = load_model(ref, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and not hasattr(low, "peft_config")
    assert all(p.requires_grad for p in load_model(ref, eval_mode=False).parameters())


def test_the_fingerprint_is_of_model_and_adapter(saved: Saved) -> None:
    base, directory, _ = saved
    plain, ref = ModelRef(str(base)), ModelRef(str(base), adapter=str(directory / ADAPTER))
    first = model_fingerprint(ref)
    assert first.startswith(model_fingerprint(plain)) and first != model_fingerprint(plain)
    path = directory / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1.0 for name, tensor in tensors.items()}, path)
    assert model_fingerprint(ref) != first


@pytest.mark.parametrize("family", ["llama_tied", "llama_untied"])
@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
def test_the_head_of_an_adapted_teacher_is_that_of_the_merged_model(
    family: str,
    target: str,
    new_model: MakeModel,
    new_tokenizer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = save_model(new_model(family), new_tokenizer(), tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(load_model(ModelRef(str(base))), config).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    ref = ModelRef(str(base), adapter=str(tmp_path / "adapter"))
    expected = head_of(load_model(ref)).weight_VH
    loads: list[ModelRef] = []
    monkeypatch.setattr(head_loading, "load_model", lambda ref, **rest: loads.append(ref) or load_model(ref, **rest))
    assert torch.equal(head_loading.load_head(ref).weight_VH, expected)
    changed = target == "lm_head" or (target == "embed_tokens" and family == "llama_tied")
    assert bool(loads) == changed, "the whole model is loaded exactly where the adapter changes the head"


# What is refused


def refused(ref: ModelRef) -> str:
    with pytest.raises(ModelError) as error:
        load_model(ref)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_that_is_not_there_not_safe_or_of_another_kind_is_refused(saved: Saved, tmp_path: Path) -> None:
    base, directory, _ = saved
    adapter = directory / ADAPTER
    assert "has no adapter_config.json" in refused(ModelRef(str(base), adapter=str(base)))
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    assert "only safetensors are read" in refused(ModelRef(str(base), adapter=str(adapter)))
    (adapter / "adapter_model.bin").rename(weights)
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, "peft_type": "IA3"}))
    assert "is a IA3 adapter; only LoRA is merged" in refused(ModelRef(str(base), adapter=str(adapter)))


def test_an_adapter_of_another_model_is_refused(
    saved: Saved, new_model: MakeModel, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    _, directory, _ = saved
    adapter = str(directory / ADAPTER)
    wider = save_model(new_model("llama_tied", intermediate_size=64), new_tokenizer(), tmp_path / "wider")
    assert "cannot be merged into" in refused(ModelRef(str(wider), adapter=adapter))
    deeper = save_model(new_model("llama_tied", num_hidden_layers=3), new_tokenizer(), tmp_path / "shallow")
    assert "does not fit" in refused(ModelRef(str(deeper), adapter=adapter))


def test_targets_are_checked_before_weights_are_read(saved: Saved) -> None:
    base, directory, _ = saved
    teacher = TeacherConfig(path=str(base), adapter=str(directory / ADAPTER))
    check_adapters(teacher, StudentConfig(path=str(base), lora=LORA))
    check_adapters(teacher, StudentConfig(num_layers=2, lora=LoraConfig(target_modules=("layers.1.mlp.up_proj",))))
    for student in ({"path": str(base), "target": "c_attn"}, {"num_layers": 2, "target": "layers.3.mlp.up_proj"}):
        lora = {"target_modules": [student.pop("target")]}
        with pytest.raises(ConfigError, match="matches no linear layer of LlamaForCausalLM; it has q_proj"):
            check_adapters(teacher, StudentConfig.model_validate({**student, "lora": lora}))
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        check_adapters(TeacherConfig(path=str(base), adapter=str(base)), StudentConfig(path=str(base)))


def test_a_machine_without_peft_is_told_what_to_install(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    base, directory, _ = saved
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^student\.lora: needs peft.*pip install 'pocl-ray\[lora\]'$"):
        check_adapters(TeacherConfig(path=str(base)), StudentConfig(path=str(base), lora=LORA))
    with pytest.raises(ConfigError, match=r"^teacher\.adapter: needs peft"):
        check_adapters(TeacherConfig(path=str(base), adapter=str(directory)), StudentConfig(path=str(base)))


@pytest.mark.parametrize(
    ("model", "section", "says"),
    [
        (StudentConfig, {"architecture": {"model_type": "llama"}, "lora": {}}, "those of a new architecture do not"),
        (StudentConfig, {"path": "x", "lora": {"rank": 0}}, "greater than or equal to 1"),
        (StudentConfig, {"path": "x", "lora": {"target_modules": []}}, "names nothing either"),
        (StudentConfig, {"path": "x", "lora": {"target_modules": [""]}}, "at least 1 character"),
        (StudentConfig, {"path": "x", "lora": {"r": 8}}, "Extra inputs"),
        (TeacherConfig, {"architecture": {}, "sft": {}, "adapter": "x"}, "give their path as well"),
        (TeacherConfig, {"path": "x", "adapter_revision": "main"}, "says nothing without adapter"),
    ],
)
def test_sections_that_make_no_sense_are_refused(model: Any, section: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.model_validate(section)
