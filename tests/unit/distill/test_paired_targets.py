"""A teacher with another tokenizer: pairs of tokens through the chunked loss, against a float64 loop over responses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocl_ray.data.batching import TeacherOutput
from pocl_ray.data.row_store import Pairs
from pocl_ray.distill.chunked import HeadLoss, chunked_head_loss
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.targets import PairedTargets, teacher_logits
from pocl_ray.models.heads import HeadWeights

STUDENT_LENGTHS, TEACHER_LENGTHS = [5, 1, 7, 3, 4], [3, 4, 7, 1, 6]
N, M, V, W, H, K = sum(STUDENT_LENGTHS), sum(TEACHER_LENGTHS), 40, 90, 8, 6
KD = resolve_loss("uld")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Problem:
    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_MK: Tensor
    head: HeadWeights
    targets_N: Tensor


@pytest.fixture
def problem() -> Problem:
    return Problem(
        draw(N, H, seed=0).requires_grad_(),
        draw(V, H, seed=1).requires_grad_(),
        draw(M, K, seed=2),
        HeadWeights(2 * draw(W, K, seed=3)),
        torch.randint(V, (N,), generator=torch.Generator().manual_seed(4)),
    )


def taught_of(problem: Problem) -> TeacherOutput:
    pairs = Pairs.of(np.array(STUDENT_LENGTHS), np.array(TEACHER_LENGTHS))
    return TeacherOutput(
        problem.teacher_MK[torch.from_numpy(pairs.teacher_M)], paired_N=torch.from_numpy(pairs.student_N)
    )


def by_hand(problem: Problem, temperature: float) -> list[Tensor]:
    """The distance of each of the student's tokens, response by response, in plain float64."""
    student_NV, teacher_MW = problem.hidden_NH @ problem.weight_VH.T, problem.head.logits(problem.teacher_MK)
    responses = zip(student_NV.split(STUDENT_LENGTHS), teacher_MW.split(TEACHER_LENGTHS), strict=True)
    values = []
    for student_TV, teacher_TW in responses:
        for place, logits_V in enumerate(student_TV):
            if place >= len(teacher_TW):
                values.append(torch.zeros((), dtype=torch.float64))
                continue
            q_V = torch.softmax(logits_V / temperature, -1).sort(descending=True).values
            p_W = torch.softmax(teacher_TW[place] / temperature, -1).sort(descending=True).values
            values.append((p_W - F.pad(q_V, (0, W - V))).abs().sum())
    return values


@pytest.mark.parametrize("kd_ratio", [0.75, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_loss_and_gradients_are_those_of_the_loop_for_every_chunking(
    problem: Problem, temperature: float, kd_ratio: float
) -> None:
    kd_sum = torch.stack(by_hand(problem, temperature)).sum()
    ce = F.cross_entropy(problem.hidden_NH @ problem.weight_VH.T, problem.targets_N, reduction="sum")
    parameters = [problem.hidden_NH, problem.weight_VH]
    expected = (1 - kd_ratio) * ce + kd_ratio * kd_sum
    expected_gradients = torch.autograd.grad(expected, parameters)
    for chunk_tokens in (1, 2, 7, 100):
        loss = HeadLoss(
            problem.targets_N,
            kd_ratio=kd_ratio,
            kd=KD,
            kd_temperature=temperature,
            teacher_logits=teacher_logits((taught_of(problem),), (problem.head,)),
            chunk_bytes=chunk_tokens * V * 4,
        )
        got = chunked_head_loss(problem.hidden_NH, problem.weight_VH, None, loss)
        torch.testing.assert_close(got, (expected, ce, kd_sum), check_dtype=False, rtol=1e-6, atol=1e-6)
        gradients = torch.autograd.grad(got[0], parameters)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-7)


def test_a_token_without_a_counterpart_has_no_divergence_and_no_gradient_of_it(problem: Problem) -> None:
    student_NV = (problem.hidden_NH @ problem.weight_VH.T).detach().requires_grad_()
    teaching = teacher_logits((taught_of(problem),), (problem.head,))(slice(0, N))
    assert isinstance(teaching, PairedTargets)
    kd_N = teaching.divergence(KD, student_NV, 1.5)
    (gradient_NV,) = torch.autograd.grad(kd_N.sum(), student_NV)
    paired_N = taught_of(problem).paired_N
    assert paired_N is not None and int((~paired_N).sum()) == 2 + 0 + 0 + 2 + 0
    assert (kd_N[paired_N] > 0).all() and not kd_N[~paired_N].any() and not gradient_NV[~paired_N].any()
    entropy_N = teaching.entropy()
    assert (entropy_N[paired_N] > 0).all() and not entropy_N[~paired_N].any()


def test_with_equal_lengths_it_is_the_plain_loss(problem: Problem) -> None:
    lengths = np.array(STUDENT_LENGTHS)
    pairs = Pairs.of(lengths, lengths)
    assert pairs.student_N.all() and pairs.teacher_M.all()
    student_NV, tokens_NK = (problem.hidden_NH @ problem.weight_VH.T).detach(), draw(N, K, seed=5)
    paired = teacher_logits((TeacherOutput(tokens_NK, paired_N=torch.from_numpy(pairs.student_N)),), (problem.head,))
    teaching = paired(slice(3, 9))
    assert isinstance(teaching, PairedTargets)
    expected = KD(student_NV[3:9], problem.head.logits(tokens_NK)[3:9], 2.0)
    torch.testing.assert_close(teaching.divergence(KD, student_NV[3:9], 2.0), expected)
