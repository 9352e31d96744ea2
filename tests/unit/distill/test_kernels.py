"""The choice of the kernel for a divergence; Liger's kernel and ours give the same values.

As a script, it holds Liger's kernels against ours on the CPU; Triton then interprets them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocl_ray.config import DistillConfig
from pocl_ray.distill import kernels
from pocl_ray.distill.chunked import HeadLoss, chunked_head_loss
from pocl_ray.distill.kernels import LigerLoss, resolve_divergence
from pocl_ray.distill.loss_table import jsd_beta
from pocl_ray.distill.losses import LOSSES, ResolvedLoss, resolve_loss
from pocl_ray.errors import ConfigError
from pocl_ray.models.heads import HeadWeights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COVERED: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "js_distance": {"lam": 0.7},
    "generalized_jsd": {"beta": 0.3},
}


class MadeUpJSD:
    """Liger's public contract: the mean over rows of the generalized JSD of log-probabilities, student first."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        assert logq_NV.dtype == logp_NV.dtype == torch.float32
        kd = resolve_loss("generalized_jsd", {"beta": self.beta})
        return kd(logq_NV, logp_NV, 1.0).mean()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A liger_kernel that computes as the real one promises, on any device."""
    module: Any = types.ModuleType("liger_kernel.transformers")
    module.LigerJSD = MadeUpJSD
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(kernels, "_is_installed", lambda: True)


def config(loss: str = "forward_kl", **keys: Any) -> DistillConfig:
    return DistillConfig(loss=loss, loss_args=COVERED.get(loss, {}), **keys)


# The choice


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("loss", list(LOSSES))
def test_auto_takes_liger_on_cuda_where_it_covers_the_loss(loss: str) -> None:
    assert isinstance(resolve_divergence(config(loss), CUDA), LigerLoss if loss in COVERED else ResolvedLoss)
    assert isinstance(resolve_divergence(config(loss), CPU), ResolvedLoss)
    assert isinstance(resolve_divergence(config(loss, kernel="torch"), CUDA), ResolvedLoss)
    assert isinstance(resolve_divergence(config(loss, token_weight="teacher_entropy"), CUDA), ResolvedLoss)


def test_auto_does_without_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_installed", lambda: False)
    assert isinstance(resolve_divergence(config(), CUDA), ResolvedLoss)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'pocl-ray\[liger\]'"):
        resolve_divergence(config(kernel="liger"), CUDA)


@pytest.mark.usefixtures("installed")
def test_what_liger_cannot_do_is_refused_where_it_is_asked_for() -> None:
    for device in (None, CUDA):
        with pytest.raises(ConfigError, match="liger does not cover tv_distance"):
            resolve_divergence(config("tv_distance", kernel="liger"), device)
        with pytest.raises(ConfigError, match="no value per token, which token_weight needs"):
            resolve_divergence(config(kernel="liger", token_weight="teacher_entropy"), device)
    with pytest.raises(ConfigError, match="runs on CUDA, and this worker computes on cpu"):
        resolve_divergence(config(kernel="liger"), CPU)
    assert isinstance(resolve_divergence(config(kernel="liger"), None), LigerLoss)


def test_the_covered_losses_are_generalized_jsds_of_that_beta() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (3 * torch.randn(5, 20, generator=generator) for _ in range(2))
    for name, params in COVERED.items():
        loss = resolve_loss(name, params, scale_by_t_squared=False)
        jsd = resolve_loss("generalized_jsd", {"beta": jsd_beta(name, loss.params)})
        torch.testing.assert_close(loss(student_NV, teacher_NV, 1.5), jsd(student_NV, teacher_NV, 1.5))
    for name in set(LOSSES) - set(COVERED):
        assert jsd_beta(name, {}) is None
    assert jsd_beta("generalized_jsd", {"beta": 1e-5}) is None, "its float32 mixture would underflow"


# The values


def head_loss(kd: Any, device: torch.device, chunk_tokens: int, scale: float = 3.0) -> tuple[Tensor, list[Tensor]]:
    """The loss of some tokens, masked entries among them, and its gradients."""
    num_tokens, vocabulary, width = 23, 50, 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    teacher = HeadWeights(scale * draw(vocabulary - 4, width))
    teacher_hidden_NK, targets_N = draw(num_tokens, width), torch.zeros(num_tokens, dtype=torch.long, device=device)
    hidden_NH, weight_VH = draw(num_tokens, width).requires_grad_(), (scale * draw(vocabulary, width)).requires_grad_()
    loss = HeadLoss(
        targets_N,
        kd_ratio=0.75,
        kd=kd,
        kd_temperature=1.5,
        teacher_logits=lambda rows: teacher.logits(teacher_hidden_NK[rows]),
        chunk_bytes=chunk_tokens * vocabulary * 4,
    )
    total = chunked_head_loss(hidden_NH, weight_VH, None, loss)[0]
    return total.detach(), list(torch.autograd.grad(total, [hidden_NH, weight_VH]))


def assert_equal(name: str, device: torch.device, scale: float) -> None:
    kd = resolve_loss(name, COVERED[name])
    beta = jsd_beta(name, kd.params)
    assert beta is not None
    expected = head_loss(kd, device, 1000, scale)
    for chunk_tokens in (7, 1000):
        got = head_loss(LigerLoss(kd, beta), device, chunk_tokens, scale)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
        for gradient, true in zip(got[1], expected[1], strict=True):
            assert float((gradient - true).norm()) < 1e-5 * float(true.norm())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", list(COVERED))
@pytest.mark.parametrize("scale", [3.0, 60.0])
def test_a_mean_over_rows_becomes_the_sum_with_the_factor_of_the_loss(name: str, scale: float) -> None:
    assert_equal(name, CPU, scale)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel, of the extra `liger`, is not installed")
def test_ligers_own_kernels_agree_as_triton_interprets_them_on_the_cpu() -> None:
    paths = os.pathsep.join([str(Path(kernels.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(COVERED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels run on CUDA, and this machine has none")
@pytest.mark.parametrize("name", list(COVERED))
@pytest.mark.parametrize("scale", [3.0, 60.0])
def test_liger_gives_the_values_and_gradients_of_ours(name: str, scale: float) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel, of the extra `liger`, is not installed")
    assert_equal(name, CUDA, scale)


if __name__ == "__main__":
    for covered in COVERED:
        for scale_of_logits in (3.0, 60.0):
            assert_equal(covered, CPU, scale_of_logits)
        print(covered)
