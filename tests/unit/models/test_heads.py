from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocl_ray.errors import ModelError
from pocl_ray.models.frozen import LiveTeacher
from pocl_ray.models.head_loading import load_head
from pocl_ray.models.heads import (
    HeadSample,
    HeadWeights,
    LogitTransform,
    check_split,
    head_of,
    response_hidden,
    split_model,
)
from pocl_ray.models.loading import load_model
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model


def test_head_of_hidden_states_is_the_models_logits_at_response_positions(family, new_model, padded_batch):
    model = new_model(family)
    input_ids_BT, attention_mask_BT, index_N = padded_batch
    with torch.no_grad():
        expected_NV = model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits.flatten(0, 1)[index_N]
        hidden_NH = response_hidden(model, input_ids_BT, attention_mask_BT, index_N)
        torch.testing.assert_close(head_of(model).logits(hidden_NH), expected_NV)
        torch.testing.assert_close(split_model(model).logits(hidden_NH), expected_NV)


def test_padding_does_not_change_hidden_states(family, new_model, padded_batch):
    model = new_model(family)
    input_ids_BT, attention_mask_BT, index_N = padded_batch
    with torch.no_grad():
        padded_NH = response_hidden(model, input_ids_BT, attention_mask_BT, index_N)[:4]
        alone_NH = response_hidden(model, input_ids_BT[:1, :6], attention_mask_BT[:1, :6], index_N[:4])
    torch.testing.assert_close(padded_NH, alone_NH)


@pytest.mark.parametrize("max_shard_size", ["5GB", "5KB"])
def test_head_loads_alone_from_a_directory(family, new_model, tmp_path, max_shard_size, monkeypatch):
    model = new_model(family)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    monkeypatch.setattr(
        "pocl_ray.models.head_loading.load_model", lambda *_, **__: pytest.fail("loaded the whole model")
    )
    head = load_head(ModelRef(str(tmp_path)))
    assert torch.equal(head.weight_VH, head_of(model).weight_VH)
    assert head.transform == head_of(model).transform


def test_head_loads_alone_from_a_base_model_checkpoint_without_prefix(new_model, tmp_path, monkeypatch):
    model = new_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(
        "pocl_ray.models.head_loading.load_model", lambda *_, **__: pytest.fail("loaded the whole model")
    )
    assert torch.equal(load_head(ModelRef(str(tmp_path))).weight_VH, head_of(model).weight_VH)


@pytest.mark.parametrize("max_shard_size", ["5GB", "5KB"])
def test_a_head_of_its_own_is_read_though_the_config_ties_the_embeddings(new_model, tmp_path, max_shard_size):
    model = new_model("llama_untied")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ref = ModelRef(str(tmp_path))
    assert torch.equal(load_head(ref).weight_VH, head_of(load_model(ref)).weight_VH)
    assert torch.equal(load_head(ref).weight_VH, model.lm_head.weight)


def test_a_head_is_held_against_the_models_own_logits(new_model):
    model = new_model("llama_untied")
    sample = HeadSample.from_bytes(HeadSample.of(model, torch.arange(6)[None], torch.tensor([2, 4])).to_bytes())
    sample.check(head_of(model), "here")
    weight_VH = head_of(model).weight_VH.clone()
    weight_VH[7] += 1.0
    with pytest.raises(ModelError, match=r"^here: the LM head read from its files gives other logits"):
        sample.check(HeadWeights(weight_VH), "here")
    with pytest.raises(ModelError, match="gives 8 logits"):
        sample.check(head_of(model).cut(8), "here")


def test_head_comes_from_the_whole_model_where_weights_are_quantized(new_model, tmp_path, monkeypatch):
    model = new_model("llama_untied")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    monkeypatch.setattr("pocl_ray.models.head_loading.load_model", lambda *_, **__: model)
    assert torch.equal(load_head(ModelRef(str(tmp_path))).weight_VH, head_of(model).weight_VH)


def test_head_loads_in_the_dtype_asked_for(new_model, tmp_path):
    new_model("llama_tied").save_pretrained(tmp_path)
    assert load_head(ModelRef(str(tmp_path))).weight_VH.dtype == torch.float32
    assert load_head(ModelRef(str(tmp_path), dtype="bfloat16")).weight_VH.dtype == torch.bfloat16
    assert load_head(ModelRef(str(tmp_path)), dtype=torch.float16).weight_VH.dtype == torch.float16


@pytest.mark.parametrize("bias_V", [None, torch.randn(5)])
def test_head_survives_a_file_and_a_pickle(tmp_path, bias_V):
    head = HeadWeights(torch.randn(5, 3), bias_V, LogitTransform(multiplier=0.5, softcap=30.0))
    hidden_NH = torch.randn(4, 3)
    for copy in (HeadWeights.load(head.save(tmp_path / "head.safetensors")), pickle.loads(pickle.dumps(head))):
        assert torch.equal(copy.logits(hidden_NH), head.logits(hidden_NH))
        assert copy.transform == head.transform
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]


def test_a_file_that_is_no_head_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is not a head"):
        HeadWeights.load(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no such file"):
        HeadWeights.load(tmp_path / "absent.safetensors")


def test_cut_head_gives_the_first_logits(new_model):
    head = head_of(new_model("qwen2"))
    hidden_NH = torch.randn(3, head.hidden_size)
    torch.testing.assert_close(head.cut(60).logits(hidden_NH), head.logits(hidden_NH)[:, :60])
    assert (head.vocab_size, head.cut(60).vocab_size) == (64, 60)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_families_that_transform_their_logits_are_split_exactly(new_model, padded_batch, model_type, overrides):
    model = new_model("llama_tied", model_type=model_type, **overrides)
    input_ids_BT, attention_mask_BT, index_N = padded_batch
    with torch.no_grad():
        expected_NV = model(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits.flatten(0, 1)[index_N]
        found_NV = head_of(model).logits(response_hidden(model, input_ids_BT, attention_mask_BT, index_N))
    torch.testing.assert_close(found_NV, expected_NV)
    assert asdict(head_of(model).transform) != asdict(LogitTransform())


def test_a_family_whose_logits_are_unknown_is_refused(new_model):
    model = new_model("llama_tied")
    check_split(model)
    model.config.logits_scaling = 3.0  # the class does not divide: body and head no longer give the model's logits
    with pytest.raises(ModelError, match="cannot be split"):
        check_split(model)


def test_live_teacher_gives_hidden_states_that_a_loss_may_use(new_model, new_tokenizer, padded_batch, tmp_path):
    model = new_model("opt_350m")
    save_model(model, new_tokenizer(), tmp_path / "teacher")
    teacher = LiveTeacher(ModelRef(str(tmp_path / "teacher")))
    hidden_NK = teacher.hidden(*padded_batch)
    with torch.no_grad():
        torch.testing.assert_close(hidden_NK, response_hidden(model, *padded_batch))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    student = torch.nn.Linear(hidden_NK.shape[1], teacher.head.vocab_size)
    (student(hidden_NK) - teacher.head.logits(hidden_NK)).square().sum().backward()
    assert student.weight.grad is not None


def test_a_model_whose_logits_are_not_finite_is_told_so_and_not_that_it_cannot_be_split(new_model):
    model = new_model("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"^here: Qwen2ForCausalLM: its own logits are not finite in float32; load"):
        check_split(model, "here")


def test_a_dtype_that_a_family_cannot_compute_with_is_one_line(new_model, monkeypatch):
    model = new_model("llama_tied").to(torch.bfloat16)

    def fail(*args, **options):
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ModelError, match=r"^here: LlamaForCausalLM: fails on its first tokens in bfloat16 \(expected"):
        check_split(model, "here")
    with pytest.raises(RuntimeError, match="expected m1"):
        check_split(model.float(), "here")
