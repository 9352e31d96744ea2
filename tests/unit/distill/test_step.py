"""The step on tiny models of the supported families: which positions it reads, and what its sums depend on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from pocl_ray.data.batching import MicroBatch, TeacherOutput
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.errors import ModelError
from pocl_ray.models.heads import head_of, split_model

V, PAD = 61, 0
SIZES = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"intermediate_size": 24, "num_key_value_heads": 1}
OPT = SIZES | {"ffn_dim": 24, "max_position_embeddings": 32, "dropout": 0.0}
TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS),
    "opt": OPTConfig(**OPT, word_embed_proj_dim=16, **TOKENS),
    "opt_projected": OPTConfig(**OPT, word_embed_proj_dim=10, do_layer_norm_before=False, **TOKENS),
    "llama_tied": LlamaConfig(**LLAMA, tie_word_embeddings=True, **TOKENS),
    "llama_untied": LlamaConfig(**LLAMA, tie_word_embeddings=False, **TOKENS),
    "qwen2": Qwen2Config(**LLAMA, tie_word_embeddings=True, **TOKENS),
    "gemma2_softcapped": Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=0.5, **TOKENS),
    "granite_scaled": GraniteConfig(**LLAMA, logits_scaling=8.0, **TOKENS),
}
every_family = pytest.mark.parametrize("family", list(CONFIGS))
KD = StepSettings(kd_temperature=2.0, kd_ratio=0.7, kd=resolve_loss("forward_kl"))


def response_hidden(model: PreTrainedModel, x: MicroBatch) -> Tensor:
    return split_model(model).response_hidden(x.input_ids_BT, x.attention_mask_BT, x.response_index_N)


def model(family: str, seed: int = 0, **changes: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = type(CONFIGS[family])(**CONFIGS[family].to_diff_dict() | changes)
    built = Auto.from_config(config, attn_implementation="eager" if "gemma" in family else "sdpa")
    for parameter in built.parameters():  # fresh weights of 0.02 give nearly uniform logits, which test little
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return built.eval()


def batch(rows: tuple[tuple[int, int], ...] = ((3, 5), (6, 2), (2, 7)), padding: int = 0) -> MicroBatch:
    """Rows of (prompt tokens, response tokens), padded on the right to the longest and `padding` more."""
    generator = torch.Generator().manual_seed(1)
    length = max(prompt + response for prompt, response in rows) + padding
    ids_BT = torch.full((len(rows), length), PAD)
    mask_BT = torch.zeros_like(ids_BT)
    index: list[int] = []
    for row, (prompt, response) in enumerate(rows):
        end = prompt + response
        ids_BT[row, :end] = torch.randint(3, V, (end,), generator=generator)
        mask_BT[row, :end] = 1
        index += range(row * length + prompt - 1, row * length + end - 1)
    index_N = torch.tensor(index, dtype=torch.long)
    return MicroBatch(ids_BT, mask_BT, index_N, ids_BT.flatten()[index_N + 1])


def with_teacher(x: MicroBatch, teacher: PreTrainedModel) -> MicroBatch:
    with torch.no_grad():
        return dataclasses.replace(x, teacher_outputs=(TeacherOutput(response_hidden(teacher, x)),))


def by_hand(student: PreTrainedModel, teacher: PreTrainedModel, x: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at every position, then those that predict a response token."""

    def logits_NV(m: PreTrainedModel) -> Tensor:
        return m(x.input_ids_BT, attention_mask=x.attention_mask_BT).logits.flatten(0, 1)[x.response_index_N]

    student_NV, teacher_NV = logits_NV(student), logits_NV(teacher).detach()
    ce = F.cross_entropy(student_NV, x.targets_N, reduction="sum")
    kd = 4.0 * F.kl_div(torch.log_softmax(student_NV / 2, -1), torch.softmax(teacher_NV / 2, -1), reduction="sum")
    return 0.3 * ce + 0.7 * kd, ce, kd


@every_family
def test_head_of_selected_hidden_states_equals_the_models_own_logits(family: str) -> None:
    student, x = model(family), batch(padding=2)
    with torch.no_grad():
        own_NV = student(x.input_ids_BT, attention_mask=x.attention_mask_BT).logits.flatten(0, 1)[x.response_index_N]
        got_NV = head_of(student).logits(response_hidden(student, x))
    torch.testing.assert_close(got_NV, own_NV, rtol=1e-5, atol=1e-5)


@every_family
def test_sums_and_weight_gradients_equal_the_full_logits_by_hand(family: str) -> None:
    student, teacher = model(family), model(family, seed=1)
    x = with_teacher(batch(), teacher)
    module = DistillationModule(student, chunk_bytes=5 * V * 4)
    module.attach_teacher_heads(head_of(teacher))

    expected = by_hand(student, teacher, x)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    expected_gradients = torch.autograd.grad(expected[0], parameters, allow_unused=True)
    got = module(x, KD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], parameters, allow_unused=True), expected_gradients, rtol=1e-3, atol=1e-4
    )


@every_family
def test_padding_and_splitting_into_micro_batches_change_nothing(family: str) -> None:
    student = model(family)
    module = DistillationModule(student)
    settings = StepSettings(kd_temperature=1.0, kd_ratio=0.0)
    rows = ((3, 5), (6, 2), (2, 7))
    whole = batch(rows)
    with torch.no_grad():
        loss_sum = module(whole, settings)[0]
        torch.testing.assert_close(module(batch(rows, padding=4), settings)[0], loss_sum, rtol=1e-5, atol=1e-5)
        parts = torch.stack([module(part, settings)[0] for part in split(whole)])
    torch.testing.assert_close(parts.sum(), loss_sum, rtol=1e-5, atol=1e-5)


def split(x: MicroBatch) -> list[MicroBatch]:
    """One micro-batch a row, each without padding."""
    parts, length = [], x.input_ids_BT.shape[1]
    for row in range(x.input_ids_BT.shape[0]):
        end = int(x.attention_mask_BT[row].sum())
        mine_N = x.response_index_N.div(length, rounding_mode="floor") == row
        parts.append(
            MicroBatch(
                x.input_ids_BT[row : row + 1, :end],
                x.attention_mask_BT[row : row + 1, :end],
                x.response_index_N[mine_N] - row * length,
                x.targets_N[mine_N],
            )
        )
    return parts


def test_a_padded_vocabulary_of_the_student_is_cut_to_the_shared_part() -> None:
    student, teacher = model("qwen2", vocab_size=V + 3), model("qwen2", seed=1)
    module = DistillationModule(student)
    module.attach_teacher_heads(head_of(teacher))
    x = with_teacher(batch(), teacher)
    student_NV = head_of(student).logits(response_hidden(student, x))[:, :V]
    teacher_NV = head_of(teacher).logits(response_hidden(teacher, x))
    torch.testing.assert_close(module(x, KD)[2], resolve_loss("forward_kl")(student_NV, teacher_NV, 2.0).sum())


def test_rows_without_response_tokens_still_give_every_parameter_a_gradient() -> None:
    """Otherwise the workers of a ZeRO engine would wait for each other for ever."""
    module = DistillationModule(model("llama_tied"))
    module(batch(((4, 0),)), StepSettings(1.0, 0.0))[0].backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_the_teacher_head_is_no_parameter_and_in_no_state_dict() -> None:
    module = DistillationModule(model("llama_untied"))
    before = set(module.state_dict())
    module.attach_teacher_heads(head_of(model("llama_untied", seed=1)))
    assert set(module.state_dict()) == before
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"student"}


def test_a_missing_teacher_is_told_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="no teacher"):
        DistillationModule(model("llama_tied"))(batch(), KD)


def test_a_model_without_lm_head_is_refused() -> None:
    with pytest.raises(ModelError, match="head of its own"):
        DistillationModule(model("llama_tied").base_model)


def test_moving_a_batch_keeps_what_is_absent_absent() -> None:
    moved = batch().to("cpu")
    assert moved.teacher_outputs == () and moved.targets_N.shape == moved.response_index_N.shape
