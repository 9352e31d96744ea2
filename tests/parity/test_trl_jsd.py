"""`generalized_jsd` against the one of TRL's GKDTrainer, where both define it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from pocl_ray.distill.losses import generalized_jsd, resolve_loss

B, T, V = 2, 7, 41


@pytest.fixture(scope="module")
def trl_jsd() -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="trl, of the extra `trl`, is not installed")
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        pytest.skip(f"this trl has no GKDTrainer: {error}")
    return GKDTrainer.generalized_jsd_loss


def logits(seed: int) -> torch.Tensor:
    return 3.0 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS_BT = torch.where(torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.3, -100, 1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_value_and_gradient_are_those_of_trl(trl_jsd: Any, beta: float, temperature: float) -> None:
    student_BTV, teacher_BTV = logits(1).requires_grad_(), logits(2)
    theirs = trl_jsd(student_BTV, teacher_BTV, LABELS_BT, beta=beta, temperature=temperature)
    theirs_grad = torch.autograd.grad(theirs, student_BTV)[0]

    chosen = LABELS_BT != -100
    loss_N = generalized_jsd(student_BTV[chosen], teacher_BTV[chosen], temperature, beta=beta)
    ours = loss_N.double().mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(ours, student_BTV)[0], theirs_grad, rtol=1e-6, atol=1e-8)


def test_neither_multiplies_by_the_square_of_the_temperature(trl_jsd: Any) -> None:
    student_BTV, teacher_BTV = logits(1), logits(2)
    ours = resolve_loss("generalized_jsd", {"beta": 0.5})(student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1), 2.0)
    theirs = trl_jsd(student_BTV, teacher_BTV, torch.ones(B, T, dtype=torch.long), beta=0.5, temperature=2.0)
    assert float(ours.double().mean()) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_trls_loss_are_our_kls(trl_jsd: Any, beta: float, name: str) -> None:
    student_BTV, teacher_BTV = logits(1), logits(2)
    theirs = trl_jsd(student_BTV, teacher_BTV, torch.ones(B, T, dtype=torch.long), beta=beta)
    ours = resolve_loss(name)(student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1), 1.0)
    assert float(ours.double().mean()) == pytest.approx(float(theirs), rel=1e-6)
