"""Weights of tokens: their definition, their mean over a step, and that the chunked loss takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_chunked import gradients, ours, plain, problem

from pocl_ray.config import DistillConfig
from pocl_ray.distill.losses import LOSSES, resolve_loss
from pocl_ray.distill.targets import TokenWeight, TopKTargets, WeightedTargets
from pocl_ray.teacher_cache.top_k import top_k_of

N, V = 12, 30


def teacher_logits(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sharpness_N1 = torch.linspace(0.1, 8.0, N).unsqueeze(1)
    return sharpness_N1 * torch.randn(N, V, generator=generator)


def entropies(logits_NV: torch.Tensor) -> np.ndarray:
    x = logits_NV.double().numpy()
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(p)).sum(-1)


def weights(weight: TokenWeight, logits_NV: torch.Tensor) -> torch.Tensor:
    return weight.with_mean(float(weight.scores(logits_NV).mean()))(logits_NV)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_weights_equal_the_float64_formula_and_have_mean_one(strength: float) -> None:
    logits_NV = teacher_logits()
    entropy = entropies(logits_NV)
    for kind, score in (("teacher_entropy", entropy), ("teacher_certainty", np.exp(-entropy))):
        weight = TokenWeight.of(DistillConfig(token_weight=kind, token_weight_strength=strength))
        assert weight is not None
        got_N = weights(weight, logits_NV)
        assert got_N.dtype == torch.float32 and float(got_N.mean()) == pytest.approx(1.0, abs=1e-6)
        np.testing.assert_allclose(got_N.numpy(), 1 - strength + strength * score / score.mean(), rtol=1e-5, atol=1e-6)


def test_entropy_favours_what_the_teacher_leaves_open_and_certainty_what_it_knows() -> None:
    open_V, sure_V = torch.zeros(V), torch.zeros(V)
    sure_V[3] = 30.0
    logits_NV = torch.stack([open_V, sure_V])
    torch.testing.assert_close(weights(TokenWeight("teacher_entropy"), logits_NV), torch.tensor([2.0, 0.0]))
    certainty_N = weights(TokenWeight("teacher_certainty"), logits_NV)
    torch.testing.assert_close(certainty_N, torch.tensor([2 / (V + 1), 2 * V / (V + 1)]))


def test_masked_tokens_count_for_nothing_and_half_precision_is_computed_in_float32() -> None:
    logits_NV = teacher_logits()
    masked_NV = torch.cat([logits_NV, torch.full((N, 5), -torch.inf)], dim=-1)
    score = TokenWeight("teacher_entropy")
    torch.testing.assert_close(score.scores(masked_NV), score.scores(logits_NV))
    half_NV = logits_NV.bfloat16()
    assert score.scores(half_NV).dtype == torch.float32
    torch.testing.assert_close(score.scores(half_NV), score.scores(half_NV.float()))


def test_tokens_count_alike_where_no_token_has_a_score() -> None:
    logits_NV = torch.full((4, V), -torch.inf)
    logits_NV[:, 2] = 0.0
    assert torch.equal(TokenWeight("teacher_entropy").with_mean(0.0)(logits_NV), torch.ones(4))


def test_without_token_weight_there_is_none() -> None:
    assert TokenWeight.of(DistillConfig()) is None
    with pytest.raises(ValueError, match="token_weight_strength"):
        DistillConfig(token_weight_strength=0.0)
    with pytest.raises(ValueError, match="token_weight"):
        DistillConfig.model_validate({"token_weight": "student_entropy"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cached_top_k_gives_the_entropy_of_the_whole_distribution(dtype: torch.dtype) -> None:
    logits_NV = teacher_logits()
    for k in (1, 5, V):
        got_N = TokenWeight("teacher_entropy").scores(TopKTargets(top_k_of(logits_NV, k, dtype)))
        rtol = 2e-3 if dtype == torch.float16 else 2e-5
        np.testing.assert_allclose(got_N.numpy(), entropies(logits_NV), rtol=rtol, atol=1e-6)


def test_several_teachers_have_the_weighted_mean_of_their_entropies() -> None:
    first_NV, second_NV = teacher_logits(0), teacher_logits(1)
    both = WeightedTargets([(0.25, first_NV), (0.75, TopKTargets(top_k_of(second_NV, 4)))])
    expected_N = 0.25 * entropies(first_NV) + 0.75 * entropies(second_NV)
    np.testing.assert_allclose(TokenWeight("teacher_entropy").scores(both).numpy(), expected_N, rtol=2e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_chunked_loss_weighs_each_tokens_divergence_whatever_the_chunks(name: str) -> None:
    x = problem()
    teacher_NV = x["teacher"].logits(x["teacher_hidden_NK"])
    weight = TokenWeight("teacher_entropy", strength=0.5)
    weight = weight.with_mean(float(weight.scores(teacher_NV).mean()))
    weights_N = weight(teacher_NV)
    kd = resolve_loss(name)

    def weighted_kd(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
        return weights_N * kd(student_NV, teacher_NV, temperature)

    settings = {"kd_ratio": 0.75, "kd_temperature": 1.5}
    expected = plain(x, kd=weighted_kd, **settings)
    expected_gradients = gradients(x, expected[0])
    for chunk_tokens in (1, 7, 1000):
        got = ours(x, chunk_tokens, kd=kd, token_weight=weight, **settings)
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(x, got[0]), expected_gradients, rtol=1e-6, atol=1e-6)


def test_the_mean_is_asked_for_before_the_weights() -> None:
    with pytest.raises(AssertionError, match="before its losses"):
        TokenWeight("teacher_entropy")(teacher_logits())
    assert replace(TokenWeight("teacher_entropy"), mean_score=2.0) == TokenWeight("teacher_entropy").with_mean(2.0)
