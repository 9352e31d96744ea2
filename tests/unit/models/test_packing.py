"""Packed rows give each family's own logits, losses and gradients, and families that cannot read them are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, NUM_TOKENS
from transformers import AttentionInterface, PreTrainedModel

from pocl_ray.data.batching import MicroBatch, TeacherOutput, collate, pack
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.models.frozen import LiveTeacher
from pocl_ray.models.heads import head_of, split_model
from pocl_ray.models.packing import PACKED_SDPA, find_packing_obstacle, packed_inputs, spans_of
from pocl_ray.models.places import ModelRef

MAX_TOKENS = 24
SIZES = [(3, 5), (6, 2), (1, 1), (4, 4), (2, 9)]  # two neighbours of one length, and a row of two tokens
_LLAMA = FAMILIES["llama_tied"]
MORE: dict[str, dict[str, Any]] = {
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**_LLAMA, "model_type": "gemma", "head_dim": 8},
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": MAX_TOKENS},
    "phi": {**_LLAMA, "model_type": "phi", "tie_word_embeddings": False},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding": (
        {**_LLAMA, "model_type": "mistral", "sliding_window": 8},
        "looks back 8 tokens, and rows have up to 24",
    ),
    "soft_capped": ({**_LLAMA, "model_type": "gemma2", "head_dim": 8}, "runs as eager"),
    "alibi": ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "runs as eager"),
    "own_code": ({**_LLAMA, "model_type": "stablelm"}, "change its logits by"),
    "hybrid": (
        {**_LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv", "conv"]},
        "change its logits by",
    ),
    "state_space": ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, "runs as eager"),
}
NewModel = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True, scope="module")
def more_families() -> Any:
    added = {**MORE, **{name: keys for name, (keys, _) in REFUSED.items()}}
    FAMILIES.update(added)
    yield
    for name in added:
        del FAMILIES[name]


def obstacle(model: PreTrainedModel, max_tokens: int = MAX_TOKENS) -> str | None:
    parts = split_model(model)
    return find_packing_obstacle(model, parts.response_hidden, parts.logits, max_tokens)


def batches(vocab_size: int = NUM_TOKENS) -> tuple[MicroBatch, MicroBatch]:
    """The same rows padded and packed."""
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(0, vocab_size, size[side]) for size in SIZES] for side in (0, 1))
    return collate(prompts, responses, pad_id=0), pack(prompts, responses)


def losses_and_gradients(model: PreTrainedModel, batch: MicroBatch, teacher: PreTrainedModel) -> list[torch.Tensor]:
    with torch.no_grad():
        output = TeacherOutput(split_model(teacher).response_hidden(*batch.rows_input))
    module = DistillationModule(model)
    module.attach_teacher_heads(head_of(teacher))
    settings = StepSettings(kd_temperature=2.0, kd_ratio=0.7, kd=resolve_loss("forward_kl"))
    batch = MicroBatch(*batch.rows_input[:3], batch.targets_N, (output,), row_lengths=batch.row_lengths)
    losses = module(batch, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [*losses, *torch.autograd.grad(losses[0], trained)]


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(
    new_model: NewModel, name: str, recomputes: bool
) -> None:
    student, teacher = new_model(name), new_model(name, seed=1)
    assert obstacle(student) is None and obstacle(teacher) is None
    assert student.config._attn_implementation == PACKED_SDPA
    if recomputes:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        turn_dropout_off(student.train())
    padded, packed = (losses_and_gradients(student, batch, teacher) for batch in batches())
    largest = max(float(tensor.detach().abs().max()) for tensor in padded[3:])
    for got, expected in zip(packed, padded, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * largest)


def turn_dropout_off(model: PreTrainedModel) -> None:
    for module in model.modules():
        for key in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_padded_batches_are_read_as_before(new_model: NewModel, name: str) -> None:
    plain, model = new_model(name), new_model(name)
    assert obstacle(model) is None
    padded, _ = batches()
    with torch.no_grad():
        expected, got = (split_model(one).response_hidden(*padded.rows_input) for one in (plain, model))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_read_packed_rows_is_found_and_left_as_it_was(new_model: NewModel, name: str) -> None:
    model, plain = new_model(name).train(), new_model(name)
    found = obstacle(model)
    assert found is not None and REFUSED[name][1] in found
    assert model.config._attn_implementation == plain.config._attn_implementation and model.training


def test_a_window_as_long_as_the_longest_row_is_no_obstacle(new_model: NewModel) -> None:
    assert obstacle(new_model("sliding"), max_tokens=8) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_leak_between_rows_is_told_from_rounding(
    new_model: NewModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obstacle(new_model("llama_tied").to(dtype)) is None
    monkeypatch.setattr("pocl_ray.models.packing.spans_of", lambda lengths: ((1, sum(lengths)),))
    assert "change its logits" in str(obstacle(new_model("llama_tied").to(dtype)))


def test_other_positions_than_those_of_each_row_are_found(new_model: NewModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*args: Any) -> dict[str, Any]:
        inputs = packed_inputs(*args)
        return {**inputs, "position_ids": torch.arange(inputs["position_ids"].shape[1]).unsqueeze(0)}

    monkeypatch.setattr("pocl_ray.models.heads.packed_inputs", shifted)
    assert "change its logits" in str(obstacle(new_model("gpt2")))
    assert "change its logits" in str(obstacle(new_model("opt")))


def test_the_saved_config_says_nothing_of_packing(new_model: NewModel) -> None:
    model = new_model("gpt2")
    assert obstacle(model) is None
    assert "packed" not in model.config.to_json_string(use_diff=False)


def test_neighbouring_rows_of_one_length_are_one_span() -> None:
    assert spans_of((5, 5, 3, 5)) == ((2, 5), (1, 3), (1, 5))


def test_flash_attention_is_told_the_rows_by_transformers_own_arguments(new_model: NewModel) -> None:
    """Flash attention needs a GPU; its arguments are those that a function of its contract receives in its place."""
    model, told = new_model("llama_tied"), []

    def stand_in(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        told.append((attention_mask, kwargs))
        spans = spans_of(kwargs["cu_seq_lens_q"].diff().tolist())
        return AttentionInterface()[PACKED_SDPA](
            module, query, key, value, attention_mask, packed_spans=spans, scaling=kwargs["scaling"]
        )

    before = AttentionInterface()["flash_attention_2"]
    AttentionInterface.register("flash_attention_2", stand_in)
    try:
        padded, packed = batches()
        with torch.no_grad():
            expected = split_model(model).response_hidden(*padded.rows_input)
            model.config._attn_implementation_internal = "flash_attention_2"
            got = split_model(model).response_hidden(*packed.rows_input)
    finally:
        AttentionInterface.register("flash_attention_2", before)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    mask, kwargs = told[0]
    assert mask is None and kwargs["max_length_q"] == kwargs["max_length_k"] == 11
    assert kwargs["cu_seq_lens_k"].tolist() == [0, 8, 16, 18, 26, 37]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32


def test_a_live_teacher_reads_packed_rows_as_padded_ones(new_model: NewModel, tmp_path: Any) -> None:
    new_model("llama_untied").save_pretrained(tmp_path)
    teacher = LiveTeacher(ModelRef(str(tmp_path)))
    padded, packed = batches()
    expected = teacher.hidden(*padded.rows_input)
    assert teacher.try_packing(MAX_TOKENS) is None and teacher.reads_packed
    torch.testing.assert_close(teacher.hidden(*packed.rows_input), expected, rtol=1e-5, atol=1e-5)
