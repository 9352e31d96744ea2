"""The KL of each token without a gradient, which the gaps of rows are made of."""

from __future__ import annotations

import pytest
import torch

from pocl_ray.distill import gaps, losses

N, V = 6, 40


def logits(seed: int, vocabulary: int = V, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(N, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("vocabularies", [(V, V), (V + 4, V), (V, V + 4)])
@pytest.mark.parametrize("block", [1, 3 * V, 2**18])
def test_the_kl_without_a_gradient_is_that_with_one(
    monkeypatch: pytest.MonkeyPatch, temperature: float, vocabularies: tuple[int, int], block: int
) -> None:
    monkeypatch.setattr(gaps, "_BLOCK_ELEMENTS", block)
    student_NV, teacher_NV = (logits(seed, width, scale=8.0) for seed, width in zip((1, 2), vocabularies, strict=True))
    expected_N = losses.forward_kl(student_NV.double(), teacher_NV.double(), temperature)
    torch.testing.assert_close(gaps.plain_kl(student_NV, teacher_NV, temperature), expected_N, rtol=1e-5, atol=1e-5)
    if temperature == 1.0:
        found_N = gaps.plain_kl(student_NV, teacher_NV, log_norm_N=student_NV.logsumexp(-1))
        torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)


def test_masks_and_logits_that_are_no_numbers_in_the_kl_without_a_gradient() -> None:
    student_NV, teacher_NV = logits(1), logits(2)
    teacher_NV[0, :2] = -torch.inf
    student_NV[1, :2], teacher_NV[1, :2] = -torch.inf, -torch.inf
    torch.testing.assert_close(gaps.plain_kl(student_NV, teacher_NV), losses.forward_kl(student_NV, teacher_NV))
    student_NV[2, 0] = -torch.inf  # the student alone: a large number, and not infinity
    assert 1.0 < float(gaps.plain_kl(student_NV, teacher_NV)[2]) < 100.0
    student_NV[3, 0], teacher_NV[4, 0] = torch.nan, torch.nan
    assert gaps.plain_kl(student_NV, teacher_NV).isnan().tolist() == [i in (3, 4) for i in range(N)]


def test_the_kl_of_no_tokens_is_empty() -> None:
    assert gaps.plain_kl(torch.zeros(0, V), torch.zeros(0, V)).shape == (0,)
