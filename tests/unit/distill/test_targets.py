"""The teachers' targets in the chunked loss: top k against full logits, and several teachers against a sum."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pocl_ray.data.batching import TeacherOutput
from pocl_ray.distill.chunked import HeadLoss, chunked_head_loss
from pocl_ray.distill.losses import LOSSES, resolve_loss, top_k_kl
from pocl_ray.distill.targets import TopKTargets, student_events, teacher_logits
from pocl_ray.models.heads import HeadWeights
from pocl_ray.teacher_cache.top_k import top_k_of

N, V, H = 19, 60, 8
every_loss = pytest.mark.parametrize("name", [name for name in LOSSES if name != "top_k_kl"])
# Those that merging events can only lower: the f-divergences, and mixtures of them with fixed weights.
F_DIVERGENCES = [name for name in LOSSES if name not in ("top_k_kl", "adaptive_kl", "uld")]


def draw(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(function: Callable[[Tensor], Tensor], logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    logits_NV = logits_NV.clone().requires_grad_()
    loss_N = function(logits_NV)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), logits_NV)[0]


@every_loss
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.37, 2.0])
def test_with_all_tokens_kept_every_loss_is_the_one_on_full_logits(name: str, temperature: float) -> None:
    student_NV, teacher_NV, kd = draw(N, V), draw(N, V, seed=1, spread=2.0), resolve_loss(name)
    expected = value_and_gradient(lambda s: kd(s, teacher_NV, temperature), student_NV)
    teaching = TopKTargets(top_k_of(teacher_NV, V))
    got = value_and_gradient(lambda s: teaching.divergence(kd, s, temperature), student_NV)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4 / 3, 2.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 5, 59])
def test_forward_kl_over_the_events_is_top_k_kl_of_full_logits(temperature: float, top_k: int) -> None:
    student_NV, teacher_NV = draw(N, V), draw(N, V, seed=1, spread=2.0)
    kd = resolve_loss("forward_kl", scale_by_t_squared=False)
    teaching = TopKTargets(top_k_of(teacher_NV, top_k))
    got = value_and_gradient(lambda s: teaching.divergence(kd, s, temperature), student_NV)
    expected = value_and_gradient(lambda s: top_k_kl(s, teacher_NV, temperature, k=top_k), student_NV)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_merging_the_tail_only_lowers_a_divergence_and_more_tokens_only_raise_it(name: str) -> None:
    student_NV, teacher_NV, kd = draw(N, V), draw(N, V, seed=1, spread=2.0), resolve_loss(name)
    losses = [TopKTargets(top_k_of(teacher_NV, k)).divergence(kd, student_NV, 2.0) for k in (1, 4, 16, 40, V)]
    for fewer_N, more_N in pairwise(losses):
        assert (fewer_N <= more_N + 1e-5).all() and (fewer_N > 0).all()
    torch.testing.assert_close(losses[-1], kd(student_NV, teacher_NV, 2.0), rtol=1e-4, atol=1e-5)


@every_loss
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    logits_NV = draw(N, V, spread=2.0)
    teaching = TopKTargets(top_k_of(logits_NV, 7))
    loss_N, gradient_NV = value_and_gradient(lambda s: teaching.divergence(resolve_loss(name), s, 1.0), logits_NV)
    assert float(loss_N.abs().max()) < 1e-5
    assert name in ("tv_distance", "uld") or float(gradient_NV.abs().max()) < 1e-5  # |p - q| has a kink there


@pytest.mark.parametrize("name", ["forward_kl", "skewed_reverse_kl", "adaptive_kl"])
def test_the_chunked_loss_and_its_gradients_do_not_depend_on_the_chunks(name: str) -> None:
    hidden_NH, weight_VH = draw(N, H).requires_grad_(), draw(V, H, seed=2).requires_grad_()
    teacher_outputs = (TeacherOutput(top_k_of(draw(N, V, seed=1), 9)),)
    kd = resolve_loss(name)
    student_NV = hidden_NH @ weight_VH.T
    ce = torch.nn.functional.cross_entropy(student_NV, torch.arange(N), reduction="sum")
    expected = 0.25 * ce + 0.75 * TopKTargets(teacher_outputs[0].tokens).divergence(kd, student_NV, 1.5).sum()
    expected_gradients = torch.autograd.grad(expected, [hidden_NH, weight_VH])
    for chunk_tokens in (1, 7, 100):
        settings: dict[str, Any] = {"kd_ratio": 0.75, "kd": kd, "kd_temperature": 1.5}
        loss = HeadLoss(
            torch.arange(N),
            teacher_logits=teacher_logits(teacher_outputs, (None,)),
            chunk_bytes=chunk_tokens * V * 4,
            **settings,
        )
        got = chunked_head_loss(hidden_NH, weight_VH, None, loss)[0]
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(got, [hidden_NH, weight_VH]), expected_gradients)


def test_what_lies_beyond_the_shared_vocabulary_is_cut_from_the_student() -> None:
    teacher_NV, padded_NV = draw(N, V, seed=1), draw(N, V + 4)
    kd, teaching = resolve_loss("forward_kl"), TopKTargets(top_k_of(teacher_NV, 5))
    loss_N, gradient_NV = value_and_gradient(lambda s: teaching.divergence(kd, s, 2.0), padded_NV)
    torch.testing.assert_close(loss_N, teaching.divergence(kd, padded_NV[:, :V], 2.0))
    assert not gradient_NV[:, V:].any()
    with pytest.raises(ValueError, match="59 logits, the cached teacher 60"):
        teaching.divergence(kd, padded_NV[:, :59], 2.0)


def test_a_student_that_masks_the_whole_tail_keeps_finite_gradients() -> None:
    top_k = top_k_of(draw(N, V, seed=1), 5)
    student_NV = draw(N, V).scatter(-1, top_k.ids_NK.long(), 1.0)
    student_NV = student_NV.masked_fill(student_NV != 1.0, -torch.inf)
    value = value_and_gradient(lambda s: TopKTargets(top_k).divergence(resolve_loss("reverse_kl"), s, 1.0), student_NV)
    assert all(torch.isfinite(part).all() for part in value)


def test_a_temperature_of_0_is_no_temperature() -> None:
    with pytest.raises(ValueError, match="above 0"):
        student_events(draw(N, V), top_k_of(draw(N, V), 5), 0.0)


@every_loss
def test_several_teachers_give_the_weighted_sum_of_their_divergences(name: str) -> None:
    kd, student_NV = resolve_loss(name), draw(N, V)
    heads = [HeadWeights(draw(V, H, seed=seed)) for seed in (2, 3)]
    hidden = [draw(N, H, seed=seed) for seed in (4, 5)]
    kept = top_k_of(draw(N, V, seed=6), 8)
    teacher_outputs = (
        TeacherOutput(hidden[1], 1, 0.5),
        TeacherOutput(hidden[0], 0, 0.25),
        TeacherOutput(kept, 2, 0.25),
    )
    rows = slice(3, 11)
    teaching = teacher_logits(teacher_outputs, (*heads, None))(rows)
    assert not isinstance(teaching, Tensor)
    expected_N = (
        0.5 * kd(student_NV[rows], heads[1].logits(hidden[1][rows]), 1.4)
        + 0.25 * kd(student_NV[rows], heads[0].logits(hidden[0][rows]), 1.4)
        + 0.25 * TopKTargets(kept[rows]).divergence(kd, student_NV[rows], 1.4)
    )
    torch.testing.assert_close(teaching.divergence(kd, student_NV[rows], 1.4), expected_N)


def test_hidden_states_without_a_head_are_told() -> None:
    with pytest.raises(ValueError, match="no teacher head"):
        teacher_logits((TeacherOutput(draw(N, H)),), ())(slice(0, 2))
