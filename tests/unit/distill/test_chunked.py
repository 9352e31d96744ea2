"""The chunked head loss against plain autograd over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocl_ray.distill.chunked import HeadLoss, chunked_head_loss
from pocl_ray.distill.losses import LOSSES, resolve_loss
from pocl_ray.models.heads import HeadWeights, LogitTransform

N, V, H, K, TEACHER_V = 23, 50, 8, 12, 46


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden_NH": draw(N, H).requires_grad_(),
        "weight_VH": draw(V, H).requires_grad_(),
        "bias_V": draw(V).requires_grad_(),
        "targets_N": torch.randint(V, (N,), generator=generator),
        "teacher_hidden_NK": draw(N, K),
        "teacher": HeadWeights(draw(TEACHER_V, K), draw(TEACHER_V)),
    }


def ours(x: dict[str, Any], chunk_tokens: int, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = HeadLoss(
        x["targets_N"],
        teacher_logits=lambda rows: x["teacher"].logits(x["teacher_hidden_NK"][rows]),
        chunk_bytes=chunk_tokens * V * 4,
        **settings,
    )
    return chunked_head_loss(x["hidden_NH"], x["weight_VH"], x["bias_V"], loss)


def plain(
    x: dict[str, Any], kd_ratio: float, kd: Any = None, kd_temperature: float = 1.0, transform: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NV = F.linear(x["hidden_NH"], x["weight_VH"], x["bias_V"])
    logits_NV = transform(logits_NV) if transform else logits_NV
    ce = F.cross_entropy(logits_NV, x["targets_N"], reduction="sum")
    if kd_ratio == 0.0:
        return ce, ce, torch.zeros(())
    kd_sum = kd(logits_NV, x["teacher"].logits(x["teacher_hidden_NK"]), kd_temperature).sum()
    return (1 - kd_ratio) * ce + kd_ratio * kd_sum, ce, kd_sum


def gradients(x: dict[str, Any], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(3.0 * loss, [x["hidden_NH"], x["weight_VH"], x["bias_V"]]))


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("kd_ratio", [0.0, 0.75, 1.0])  # numbers that float32, the dtype of kd, holds exactly
def test_values_and_gradients_equal_plain_autograd_for_every_chunking(name: str, kd_ratio: float) -> None:
    settings = {"kd_ratio": kd_ratio, "kd": resolve_loss(name), "kd_temperature": 1.5}
    x = problem()
    expected = plain(x, **settings)
    expected_gradients = gradients(x, expected[0])
    for chunk_tokens in (1, 7, N, 1000):
        got = ours(x, chunk_tokens, **settings)
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(x, got[0]), expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_float32_equals_plain_autograd(chunk_tokens: int) -> None:
    x = problem(torch.float32)
    settings = {"kd_ratio": 0.8, "kd": resolve_loss("forward_kl"), "kd_temperature": 2.0}
    expected, got = plain(x, **settings), ours(x, chunk_tokens, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradients(x, got[0]), gradients(x, expected[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_half_precision_loses_no_more_than_plain_autograd_does(dtype: torch.dtype, chunk_tokens: int) -> None:
    x = problem(dtype)
    exact = {
        key: value.detach().double().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in x.items()
    }
    settings = {"kd_ratio": 0.8, "kd": resolve_loss("forward_kl"), "kd_temperature": 2.0}
    truth = gradients(exact, plain(exact | {"teacher": x["teacher"]}, **settings)[0])

    def error(gradient: Tensor, true: Tensor) -> float:
        return float((gradient.double() - true).norm() / true.norm())

    half = gradients(x, plain(x, **settings)[0])
    got = gradients(x, ours(x, chunk_tokens, **settings)[0])
    for ours_, plains, true in zip(got, half, truth, strict=True):
        assert ours_.dtype == dtype
        assert error(ours_, true) < 1.5 * error(plains, true) + 1e-3


def test_float16_keeps_gradients_that_would_underflow() -> None:
    x = problem(torch.float16)
    x["weight_VH"].data[:, 0], x["hidden_NH"].data[:, 0] = 0.0, 1.0
    x["bias_V"].data[5] = -18.0  # a probability near e^-18, below half the smallest float16
    got = ours(x, 7, kd_ratio=0.0)[0]
    (gradient_V,) = torch.autograd.grad(got * 1024, x["bias_V"])
    assert 0 < float(gradient_V[5]) < 1e-3 or 5 in x["targets_N"]


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
def test_autocast_runs_the_head_in_its_dtype_and_returns_gradients_in_the_weights(kd_ratio: float) -> None:
    x = problem(torch.float32)
    settings = {"kd_ratio": kd_ratio, "kd": resolve_loss("forward_kl")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(x, 7, **settings)
    low = {key: value.detach().bfloat16().requires_grad_() if key[-2:] == "_V" or key[-1] == "H" else value
           for key, value in x.items()}  # fmt: skip
    torch.testing.assert_close(got[0], ours(low, 7, **settings)[0])
    got_gradients = gradients(x, got[0])
    assert all(gradient.dtype == torch.float32 for gradient in got_gradients)
    torch.testing.assert_close(got_gradients, gradients(x, plain(x, **settings)[0]), rtol=0.1, atol=0.2)


def test_without_grad_mode_only_values_are_computed() -> None:
    x = problem()
    settings = {"kd_ratio": 0.5, "kd": resolve_loss("reverse_kl")}
    with torch.no_grad():
        got = ours(x, 7, **settings)
    assert not any(total.requires_grad for total in got)
    torch.testing.assert_close(got, plain(x, **settings), check_dtype=False, rtol=1e-6, atol=1e-6)


def test_only_the_loss_carries_a_gradient() -> None:
    loss_sum, ce_sum, kd_sum = ours(problem(), 7, kd_ratio=0.5, kd=resolve_loss("forward_kl"))
    assert loss_sum.requires_grad and not ce_sum.requires_grad and not kd_sum.requires_grad


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_still_do() -> None:
    x = problem()
    expected = gradients(x, ours(x, 7, kd_ratio=0.0)[0])[0]
    x["weight_VH"].requires_grad_(False)
    x["bias_V"] = None
    assert x["weight_VH"].grad is None
    (got,) = torch.autograd.grad(ours(x, 7, kd_ratio=0.0)[0], x["hidden_NH"])
    assert got.shape == expected.shape and torch.isfinite(got).all()


def test_kd_ratio_0_never_asks_the_teacher() -> None:
    x = problem()

    def refuse(rows: slice) -> Tensor:
        raise AssertionError("the teacher was asked")

    loss = HeadLoss(x["targets_N"], kd_ratio=0.0, kd=resolve_loss("forward_kl"), teacher_logits=refuse)
    loss_sum, ce_sum, kd_sum = chunked_head_loss(x["hidden_NH"], x["weight_VH"], None, loss)
    assert float(kd_sum) == 0.0 and loss_sum.detach() == ce_sum


def test_no_tokens_give_zero_losses_and_zero_gradients() -> None:
    x = problem()
    empty = x | {key: x[key][:0] for key in ("targets_N", "teacher_hidden_NK")}
    empty["hidden_NH"] = x["hidden_NH"][:0]
    loss_sum, *_ = ours(empty, 7, kd_ratio=0.5, kd=resolve_loss("forward_kl"))
    assert loss_sum.detach() == 0.0
    assert not torch.autograd.grad(loss_sum, x["weight_VH"])[0].any()


@pytest.mark.parametrize(
    "transform", [LogitTransform(softcap=3.0), LogitTransform(0.25), LogitTransform(0.5, softcap=2.0)]
)
def test_scales_and_caps_of_a_family_are_differentiated(transform: LogitTransform) -> None:
    x = problem()
    settings = {"kd_ratio": 0.5, "kd": resolve_loss("forward_kl"), "transform": transform}
    expected, got = plain(x, **settings), ours(x, 7, **settings)
    torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(x, got[0]), gradients(x, expected[0]), rtol=1e-12, atol=1e-12)


def test_a_masked_target_does_not_spoil_a_pure_distillation_loss() -> None:
    x = problem()
    x["bias_V"].data[0] = -torch.inf
    x["targets_N"][0] = 0
    loss_sum, ce_sum, _ = ours(x, 7, kd_ratio=1.0, kd=resolve_loss("tv_distance"))
    assert torch.isinf(ce_sum) and torch.isfinite(loss_sum)


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    x = problem()
    loss_sum = ours(x, 7, kd_ratio=0.0)[0]
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss_sum.backward()


def test_chunks_cover_all_tokens_evenly_and_hold_at_most_the_bytes_asked_for() -> None:
    loss = HeadLoss(torch.zeros(301, dtype=torch.long), kd_ratio=0.0, chunk_bytes=100 * 4 * V)
    lengths = [rows.stop - rows.start for rows in loss.chunks(V)]
    assert sum(lengths) == 301 and max(lengths) <= 100 and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("settings", [{"kd_ratio": 1.1}, {"kd_ratio": 0.5}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kd_ratio"):
        HeadLoss(torch.zeros(3, dtype=torch.long), **settings)
