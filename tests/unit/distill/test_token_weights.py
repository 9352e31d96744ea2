"""Weights of tokens: their definition, their mean over a step, and that the chunked loss takes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from test_chunked import gradients, ours, plain, problem

from pocl_ray.config import DistillConfig
from pocl_ray.config.training import STUDENT_SCORES
from pocl_ray.distill.losses import LOSSES, resolve_loss
from pocl_ray.distill.targets import TopKTargets, WeightedTargets
from pocl_ray.distill.token_weights import TokenWeight
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


def weights(weight: TokenWeight, logits_NV: torch.Tensor, student_NV: torch.Tensor | None = None) -> torch.Tensor:
    return weight.fitted(weight.parts(logits_NV, student_NV))(logits_NV, student_NV)


def scores(weight: TokenWeight, teacher: Any, student_NV: torch.Tensor | None = None) -> torch.Tensor:
    return weight.scores(weight.parts(teacher, student_NV))


def probabilities(logits_NV: torch.Tensor) -> np.ndarray:
    e = np.exp(logits_NV.double().numpy())
    return e / e.sum(-1, keepdims=True)


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
    torch.testing.assert_close(scores(score, masked_NV), scores(score, logits_NV))
    half_NV = logits_NV.bfloat16()
    assert scores(score, half_NV).dtype == torch.float32
    torch.testing.assert_close(scores(score, half_NV), scores(score, half_NV.float()))


def test_tokens_count_alike_where_no_token_has_a_score() -> None:
    logits_NV = torch.full((4, V), -torch.inf)
    logits_NV[:, 2] = 0.0
    assert torch.equal(weights(TokenWeight("teacher_entropy"), logits_NV), torch.ones(4))


def test_without_token_weight_there_is_none() -> None:
    assert TokenWeight.of(DistillConfig()) is None
    with pytest.raises(ValueError, match="token_weight_strength"):
        DistillConfig(token_weight_strength=0.0)
    with pytest.raises(ValueError, match="token_weight"):
        DistillConfig.model_validate({"token_weight": "entropy"})
    with pytest.raises(ValueError, match="token_keep keeps the tokens of the highest token_weight, which is none"):
        DistillConfig(token_keep=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cached_top_k_gives_the_entropy_of_the_whole_distribution(dtype: torch.dtype) -> None:
    logits_NV = teacher_logits()
    for k in (1, 5, V):
        got_N = scores(TokenWeight("teacher_entropy"), TopKTargets(top_k_of(logits_NV, k, dtype)))
        rtol = 2e-3 if dtype == torch.float16 else 2e-5
        np.testing.assert_allclose(got_N.numpy(), entropies(logits_NV), rtol=rtol, atol=1e-6)


def test_several_teachers_have_the_weighted_mean_of_their_entropies() -> None:
    first_NV, second_NV = teacher_logits(0), teacher_logits(1)
    both = WeightedTargets([(0.25, first_NV), (0.75, TopKTargets(top_k_of(second_NV, 4)))])
    expected_N = 0.25 * entropies(first_NV) + 0.75 * entropies(second_NV)
    np.testing.assert_allclose(scores(TokenWeight("teacher_entropy"), both).numpy(), expected_N, rtol=2e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_chunked_loss_weighs_each_tokens_divergence_whatever_the_chunks(name: str) -> None:
    x = problem()
    teacher_NV = x["teacher"].logits(x["teacher_hidden_NK"])
    weight = TokenWeight("teacher_entropy", strength=0.5)
    weight = weight.fitted(weight.parts(teacher_NV))
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


# Scores of the student, and of both


def float64_score(kind: str, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    entropy, divergence = -(q * np.log(q)).sum(-1), (p * np.log(p / q)).sum(-1)
    if kind == "tip":
        entropy = np.minimum(entropy, np.sort(entropy)[math.ceil(0.98 * len(q)) - 1])
        h, d = ((x - x.min()) / (x.max() - x.min()) for x in (entropy, divergence))
        return h + d - h * d
    distance = np.sqrt(((np.sqrt(p) - np.sqrt(q)) ** 2).sum(-1) / 2)
    return {"student_entropy": entropy, "divergence": divergence, "hellinger": distance}[kind]


@pytest.mark.parametrize("kind", STUDENT_SCORES)
def test_weights_by_the_student_equal_the_float64_formula(kind: Any) -> None:
    student_NV, teacher_NV = teacher_logits(3), teacher_logits(0)
    score = float64_score(kind, probabilities(teacher_NV), probabilities(student_NV))
    got_N = weights(TokenWeight(kind, strength=0.7), teacher_NV, student_NV)
    np.testing.assert_allclose(got_N.numpy(), 0.3 + 0.7 * score / score.mean(), rtol=2e-4, atol=2e-5)
    assert float(got_N.mean()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", STUDENT_SCORES)
def test_kept_are_the_tokens_of_the_highest_scores_all_alike(kind: Any) -> None:
    student_NV, teacher_NV = teacher_logits(3), teacher_logits(0)
    score = float64_score(kind, probabilities(teacher_NV), probabilities(student_NV))
    got_N = weights(TokenWeight(kind, keep=0.25), teacher_NV, student_NV)
    expected = np.zeros(N)
    expected[np.argsort(-score)[: N // 4]] = 4.0
    np.testing.assert_allclose(got_N.numpy(), expected)


@pytest.mark.parametrize("kind", STUDENT_SCORES)
def test_weights_of_a_step_do_not_depend_on_its_chunks_and_let_no_gradient_through(kind: Any) -> None:
    x = problem()
    teacher_NV = x["teacher"].logits(x["teacher_hidden_NK"])
    student_NV = torch.nn.functional.linear(x["hidden_NH"], x["weight_VH"], x["bias_V"]).detach()
    weight = TokenWeight(kind, strength=0.5, keep=0.5)
    fitted = weight.fitted(weight.parts(teacher_NV, student_NV))
    weights_N = fitted(teacher_NV, student_NV)
    kd = resolve_loss("forward_kl")
    expected = plain(x, kd=lambda s, t, temperature: weights_N * kd(s, t, temperature), kd_ratio=0.75)
    expected_gradients = gradients(x, expected[0])
    for chunk_tokens in (1, 7, 1000):
        got = ours(x, chunk_tokens, kd=kd, token_weight=fitted, kd_ratio=0.75)
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(x, got[0]), expected_gradients, rtol=1e-6, atol=1e-6)


def test_a_confident_and_wrong_student_is_seen_by_the_soft_or_and_not_by_its_entropy() -> None:
    teacher_NV, student_NV = torch.zeros(3, V), torch.zeros(3, V)
    teacher_NV[:, 1] = 20.0
    student_NV[0, 1], student_NV[1, 2] = 20.0, 20.0  # right and sure; wrong and sure; unsure
    assert float(weights(TokenWeight("student_entropy"), teacher_NV, student_NV)[1]) < 1e-3
    tip_N = weights(TokenWeight("tip"), teacher_NV, student_NV)
    assert float(tip_N[0]) < 1e-3 and float(tip_N[1]) == pytest.approx(1.5, rel=1e-2) == float(tip_N[2])


def test_a_cached_top_k_gives_the_distance_over_its_events_which_is_no_larger() -> None:
    student_NV, teacher_NV = teacher_logits(3), teacher_logits(0)
    for kind in ("divergence", "hellinger"):
        whole_N = scores(TokenWeight(kind), teacher_NV, student_NV)
        part_N = scores(TokenWeight(kind), TopKTargets(top_k_of(teacher_NV, 4)), student_NV)
        assert (part_N <= whole_N + 1e-5).all() and (part_N > 0).all()
        all_N = scores(TokenWeight(kind), TopKTargets(top_k_of(teacher_NV, V)), student_NV)
        torch.testing.assert_close(all_N, whole_N, rtol=1e-3, atol=1e-4)
