"""Each loss against a float64 formula written out here, its behaviour at the edges, and the registry."""

from __future__ import annotations

import math
import pickle
from functools import partial
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch

from pocl_ray import plugins
from pocl_ray.distill import losses
from pocl_ray.distill.losses import GROUP, LOG_ZERO, LOSSES, Loss, resolve_loss
from pocl_ray.errors import ConfigError, UserError

N, V = 6, 40


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * (np.log(a) - np.log(b))).sum(-1)


def mix(p: np.ndarray, q: np.ndarray, w: float) -> np.ndarray:
    return w * p + (1 - w) * q


def adaptive(p: np.ndarray, q: np.ndarray, head_mass: float) -> np.ndarray:
    values = []
    for p_V, q_V in zip(p, q, strict=True):
        head, mass = [], 0.0
        for token in np.argsort(-p_V, kind="stable"):
            head.append(token)
            mass += p_V[token]
            if mass >= head_mass:
                break
        gap_V = np.abs(p_V - q_V)
        g_head = gap_V[head].sum()
        g_tail = gap_V.sum() - g_head
        values.append((g_head * kl(p_V, q_V) + g_tail * kl(q_V, p_V)) / (g_head + g_tail))
    return np.array(values)


def top_k(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-p, axis=-1)
    p, q = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)

    def merge(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:, :k], x[:, k:].sum(-1, keepdims=True)], -1)

    return kl(merge(p), merge(q))


def sorted_distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    width = max(p.shape[-1], q.shape[-1])
    p, q = (np.pad(x, ((0, 0), (0, width - x.shape[-1]))) for x in (p, q))
    return np.abs(np.sort(p, -1)[:, ::-1] - np.sort(q, -1)[:, ::-1]).sum(-1)


FORMULAS: dict[str, tuple[dict[str, Any], Any]] = {
    "forward_kl": ({}, kl),
    "reverse_kl": ({}, lambda p, q: kl(q, p)),
    "js_distance": ({"lam": 0.9}, lambda p, q: 0.9 * kl(q, mix(p, q, 0.1)) + 0.1 * kl(p, mix(p, q, 0.1))),
    "tv_distance": ({}, lambda p, q: 0.5 * np.abs(p - q).sum(-1)),
    "skewed_forward_kl": ({"alpha": 0.1}, lambda p, q: kl(p, mix(p, q, 0.1))),
    "skewed_reverse_kl": ({"alpha": 0.1}, lambda p, q: kl(q, mix(p, q, 0.9))),
    "symmetric_kl": ({"lam": 0.5}, lambda p, q: 0.5 * (kl(p, q) + kl(q, p))),
    "generalized_jsd": ({"beta": 0.5}, lambda p, q: 0.5 * kl(p, mix(p, q, 0.5)) + 0.5 * kl(q, mix(p, q, 0.5))),
    "adaptive_kl": ({"head_mass": 0.5}, lambda p, q: adaptive(p, q, 0.5)),
    "top_k_kl": ({"k": 5}, lambda p, q: top_k(p, q, 5)),
    "uld": ({}, sorted_distance),
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))


def logits(seed: int, vocabulary: int = V, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(N, vocabulary, generator=torch.Generator().manual_seed(seed))


def probabilities(logits_NV: torch.Tensor, temperature: float) -> np.ndarray:
    x = logits_NV.double().numpy() / temperature
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def value(name: str, student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return LOSSES[name].function(student_NV, teacher_NV, temperature, **FORMULAS[name][0])


def test_every_loss_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(LOSSES)


@every_loss
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_value_and_gradient_equal_the_float64_formula(name: str, temperature: float) -> None:
    student_NV, teacher_NV = logits(1).requires_grad_(), logits(2)
    formula = FORMULAS[name][1]
    p = probabilities(teacher_NV, temperature)

    loss_N = value(name, student_NV, teacher_NV, temperature)
    assert loss_N.shape == (N,) and loss_N.dtype == torch.float32
    np.testing.assert_allclose(
        loss_N.detach().numpy(), formula(p, probabilities(student_NV.detach(), temperature)), rtol=2e-5, atol=1e-6
    )

    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    if name == "adaptive_kl":
        return  # its two weights carry no gradient by definition; tested on its own
    direction_NV, step = logits(3, scale=1.0), 1e-5
    ends = [
        formula(p, probabilities(student_NV.detach().double() + sign * step * direction_NV, temperature)).sum()
        for sign in (1, -1)
    ]
    slope = float((gradient_NV * direction_NV).sum())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_adaptive_kl_treats_its_weights_as_constants() -> None:
    student_NV, teacher_NV = logits(1).requires_grad_(), logits(2)
    forward_N = losses.forward_kl(student_NV, teacher_NV)
    reverse_N = losses.reverse_kl(student_NV, teacher_NV)
    share_N = ((losses.adaptive_kl(student_NV, teacher_NV) - reverse_N) / (forward_N - reverse_N)).detach()
    expected = torch.autograd.grad((share_N * forward_N + (1 - share_N) * reverse_N).sum(), student_NV)[0]
    got = torch.autograd.grad(losses.adaptive_kl(student_NV, teacher_NV).sum(), student_NV)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@every_loss
def test_equal_distributions_have_zero_loss_and_zero_gradient(name: str) -> None:
    student_NV = logits(1).requires_grad_()
    loss_N = value(name, student_NV, student_NV.detach() + 5.0, temperature=1.33)
    assert loss_N.detach().abs().max() < 2e-6
    if name not in ("tv_distance", "uld"):  # they have a kink there
        assert torch.autograd.grad(loss_N.sum(), student_NV)[0].abs().max() < 1e-5


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student_NV, teacher_NV = logits(1).to(dtype).requires_grad_(), logits(2).to(dtype)
    loss_N = value(name, student_NV, teacher_NV, 2.0)
    assert loss_N.dtype == torch.float32
    torch.testing.assert_close(loss_N, value(name, student_NV.float(), teacher_NV.float(), 2.0))
    assert torch.autograd.grad(loss_N.sum(), student_NV)[0].dtype == dtype


@every_loss
def test_entries_masked_on_both_sides_count_for_nothing(name: str) -> None:
    student_NV, teacher_NV = logits(1), logits(2)
    masked_student_NV, masked_teacher_NV = student_NV.clone(), teacher_NV.clone()
    masked_student_NV[:, 25:] = masked_teacher_NV[:, 25:] = -math.inf
    masked_student_NV.requires_grad_()

    loss_N = value(name, masked_student_NV, masked_teacher_NV, 1.5)
    torch.testing.assert_close(loss_N, value(name, student_NV[:, :25], teacher_NV[:, :25], 1.5))
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), masked_student_NV)
    assert torch.isfinite(gradient_NV).all() and not gradient_NV[:, 25:].any()


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_entries_masked_on_one_side_keep_loss_and_gradient_finite(name: str, side: str) -> None:
    student_NV, teacher_NV = logits(1), logits(2)
    (student_NV if side == "student" else teacher_NV)[:, ::3] = -math.inf
    student_NV.requires_grad_()
    loss_N = value(name, student_NV, teacher_NV)
    assert torch.isfinite(loss_N).all() and (loss_N > 0).all()
    assert torch.isfinite(torch.autograd.grad(loss_N.sum(), student_NV)[0]).all()


def test_a_token_that_only_the_student_lacks_costs_its_teacher_mass_times_log_zero() -> None:
    student_NV, teacher_NV = torch.zeros(1, 2), torch.zeros(1, 2)
    student_NV[0, 1] = -math.inf
    expected = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - LOG_ZERO)
    assert float(losses.forward_kl(student_NV, teacher_NV)) == pytest.approx(expected, rel=1e-6)


@every_loss
def test_large_logits_stay_exact(name: str) -> None:
    student_NV = torch.tensor([[1000.0, 0.0, -500.0], [0.0, 3e4, -3e4]], requires_grad=True)
    teacher_NV = torch.tensor([[0.0, 800.0, -500.0], [1e4, 0.0, -3e4]])
    loss_N = value(name, student_NV, teacher_NV)
    assert torch.isfinite(torch.autograd.grad(loss_N.sum(), student_NV)[0]).all()
    if name == "forward_kl":
        assert loss_N.tolist() == [1000.0, 3e4]
    elif name == "tv_distance":
        assert loss_N.tolist() == [1.0, 1.0]


@every_loss
def test_vocabularies_of_different_size_are_cut_to_the_shared_part(name: str) -> None:
    if name == "uld":
        return  # its vocabularies have nothing in common; tested on its own
    student_NV, teacher_NV = logits(1, vocabulary=V + 8), logits(2, vocabulary=V)
    torch.testing.assert_close(value(name, student_NV, teacher_NV), value(name, student_NV[:, :V], teacher_NV))
    torch.testing.assert_close(value(name, teacher_NV, student_NV), value(name, teacher_NV, student_NV[:, :V]))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("num_student", "num_teacher"), [(V, 3 * V), (3 * V, V)])
def test_uld_fills_the_smaller_vocabulary_up_with_zeros(num_student: int, num_teacher: int, temperature: float) -> None:
    student_NV, teacher_NV = logits(1, num_student).requires_grad_(), logits(2, num_teacher)
    p = probabilities(teacher_NV, temperature)
    loss_N = losses.uld(student_NV, teacher_NV, temperature)
    expected = sorted_distance(p, probabilities(student_NV.detach(), temperature))
    np.testing.assert_allclose(loss_N.detach().numpy(), expected, rtol=2e-5)

    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    direction_NV, step = logits(3, num_student, scale=1.0), 1e-6
    ends = [
        sorted_distance(p, probabilities(student_NV.detach().double() + sign * step * direction_NV, temperature)).sum()
        for sign in (1, -1)
    ]
    slope = float((gradient_NV * direction_NV).sum())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_uld_knows_no_token_by_name() -> None:
    student_NV, teacher_NV = logits(1), logits(2, V + 7)
    order = torch.randperm(V + 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.uld(student_NV, teacher_NV[:, order]), losses.uld(student_NV, teacher_NV))
    assert (losses.uld(student_NV, student_NV.flip(-1)) < 1e-6).all()


@every_loss
def test_no_tokens_give_an_empty_loss(name: str) -> None:
    assert value(name, torch.zeros(0, V), torch.zeros(0, V)).shape == (0,)


def test_generalized_jsd_ends_at_the_two_kls() -> None:
    student_NV, teacher_NV = logits(1, scale=1.0), logits(2, scale=1.0)
    forward_N, reverse_N = losses.forward_kl(student_NV, teacher_NV), losses.reverse_kl(student_NV, teacher_NV)
    assert torch.equal(losses.generalized_jsd(student_NV, teacher_NV, beta=0.0), forward_N)
    assert torch.equal(losses.generalized_jsd(student_NV, teacher_NV, beta=1.0), reverse_N)
    near_0_N = losses.generalized_jsd(student_NV.double(), teacher_NV.double(), beta=1e-4) / 1e-4
    torch.testing.assert_close(near_0_N, forward_N, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("beta", [1e-7, 1e-4, 0.03, 0.5, 0.8, 1 - 1e-4])
def test_even_jsd_is_the_generalized_one_over_its_weights_to_the_digit(beta: float) -> None:
    student_NV, teacher_NV = logits(1).requires_grad_(), logits(2)
    p, q = probabilities(teacher_NV, 1.0), probabilities(student_NV.detach(), 1.0)
    rise = np.log1p(beta * (p / q - 1)) if beta <= 0.5 else np.log1p((1 - beta) * (q / p - 1)) + np.log(p / q)
    expected = (p * (np.log(p / q) - rise)).sum(-1) / (1 - beta) - (q * rise).sum(-1) / beta
    loss_N = losses.even_jsd(student_NV, teacher_NV, beta=beta)
    np.testing.assert_allclose(loss_N.detach().numpy(), expected, rtol=2e-5)
    if 0.01 < beta < 0.99:
        plain_N = losses.generalized_jsd(student_NV, teacher_NV, beta=beta)
        torch.testing.assert_close(loss_N, plain_N / (beta * (1 - beta)), rtol=1e-5, atol=1e-6)
    (got_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    double_NV = student_NV.detach().double().requires_grad_()
    exact_N = losses.even_jsd(double_NV, teacher_NV.double(), beta=beta)
    torch.testing.assert_close(got_NV.double(), torch.autograd.grad(exact_N.sum(), double_NV)[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("end", "near"), [(0.0, 1e-6), (1.0, 1 - 1e-6)])
def test_even_jsd_comes_to_its_ends_without_a_jump(end: float, near: float) -> None:
    student_NV, teacher_NV = logits(1, scale=1.0).requires_grad_(), logits(2, scale=1.0)
    kl_of_end = losses.reverse_kl if end else losses.forward_kl
    gradients = []
    for function in (partial(losses.even_jsd, beta=end), partial(losses.even_jsd, beta=near), kl_of_end):
        loss_N = function(student_NV, teacher_NV)
        gradients.append((loss_N.detach(), torch.autograd.grad(loss_N.sum(), student_NV)[0]))
    assert torch.equal(gradients[0][0], gradients[2][0]) and torch.equal(gradients[0][1], gradients[2][1])
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [1e-6, 0.2, 0.9])
def test_even_jsd_stays_finite_with_masks_and_large_logits(beta: float) -> None:
    for scale in (1.0, 300.0):
        student_NV, teacher_NV = logits(1, scale=scale), logits(2, scale=scale)
        student_NV[:, ::3] = teacher_NV[:, 1::5] = -math.inf
        student_NV.requires_grad_()
        loss_N = losses.even_jsd(student_NV, teacher_NV, beta=beta)
        assert torch.isfinite(loss_N).all() and (loss_N > 0).all()
        assert torch.isfinite(torch.autograd.grad(loss_N.sum(), student_NV)[0]).all()


def test_top_k_kl_never_exceeds_forward_kl_and_meets_it_at_the_whole_vocabulary() -> None:
    student_NV, teacher_NV = logits(1), logits(2)
    full_N = losses.forward_kl(student_NV, teacher_NV)
    assert (losses.top_k_kl(student_NV, teacher_NV, k=5) < full_N).all()
    for k in (V - 1, V, V + 10):
        torch.testing.assert_close(losses.top_k_kl(student_NV, teacher_NV, k=k), full_N)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        losses.forward_kl(logits(1), logits(2), temperature=0.0)


@every_loss
def test_t_squared_is_applied_when_asked_and_otherwise_as_the_authors_do(name: str) -> None:
    student_NV, teacher_NV = logits(1), logits(2)
    plain_N = value(name, student_NV, teacher_NV, 2.0)
    params = FORMULAS[name][0]
    torch.testing.assert_close(resolve_loss(name, params, True)(student_NV, teacher_NV, 2.0), 4 * plain_N)
    torch.testing.assert_close(resolve_loss(name, params, False)(student_NV, teacher_NV, 2.0), plain_N)
    factor = 4 if LOSSES[name].scale_by_t_squared else 1
    torch.testing.assert_close(resolve_loss(name, params, None)(student_NV, teacher_NV, 2.0), factor * plain_N)


def test_t_squared_habits_are_those_of_the_authors_code() -> None:
    assert [LOSSES[name].scale_by_t_squared for name in ("forward_kl", "js_distance", "skewed_reverse_kl")] == [
        True
    ] * 3
    assert not any(LOSSES[name].scale_by_t_squared for name in ("reverse_kl", "tv_distance", "skewed_forward_kl"))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("foward_kl", {}, "did you mean 'forward_kl'"),
        ("zzz", {}, "known: forward_kl"),
        ("forward_kl", {"alpha": 0.1}, "no parameter 'alpha'; it takes none"),
        ("js_distance", {"lamb": 0.1}, "did you mean 'lam'"),
        ("js_distance", {"lam": 1.0}, r"lam must be a number in \(0, 1\), not 1.0"),
        ("skewed_forward_kl", {"alpha": -0.1}, r"alpha must be a number in \[0, 1\), not -0.1"),
        ("skewed_forward_kl", {"alpha": "0.1"}, "not '0.1'"),
        ("generalized_jsd", {"beta": float("nan")}, "not nan"),
        ("top_k_kl", {"k": 2.5}, "k must be a whole number"),
        ("top_k_kl", {"k": True}, "not True"),
    ],
)
def test_a_wrong_name_parameter_or_value_is_told_with_what_would_be_right(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_loss(name, params, None)
    assert "\n" not in str(caught.value)


def test_a_resolved_loss_survives_pickling() -> None:
    loss = pickle.loads(pickle.dumps(resolve_loss("js_distance", {"lam": 0.8}, True)))
    assert loss(logits(1), logits(2), 2.0).shape == (N,)


def good_plugin(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float, power: int = 2) -> torch.Tensor:
    return (student_NV / temperature - teacher_NV / temperature).abs().pow(power).mean(-1)


def wrong_shape(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return good_plugin(student_NV, teacher_NV, temperature).mean()


def no_gradient(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return good_plugin(student_NV, teacher_NV, temperature).detach()


def not_finite(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    return good_plugin(student_NV, teacher_NV, temperature) / 0.0


def raising(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    raise RuntimeError("two\nlines")


def not_a_tensor(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> float:
    return 1.0


good_loss = Loss(good_plugin, scale_by_t_squared=True, parameters={"power": losses.Range(1, 4, integer=True)})


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def declare(value: str) -> None:
        entry_point = EntryPoint(name="mine", value=value, group=GROUP)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry_point] if group == GROUP else [])

    return declare


def test_a_plugin_function_is_found_by_its_entry_point_name(install: Any) -> None:
    install(f"{__name__}:good_plugin")
    loss = resolve_loss("mine", {"power": 1}, None)
    torch.testing.assert_close(loss(logits(1), logits(2), 2.0), good_plugin(logits(1), logits(2), 2.0, power=1))


def test_a_plugin_loss_brings_its_ranges_and_its_t_squared(install: Any) -> None:
    install(f"{__name__}:good_loss")
    assert resolve_loss("mine").scale_by_t_squared
    with pytest.raises(ConfigError, match="power must be a whole number"):
        resolve_loss("mine", {"power": 9})
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        resolve_loss("mime")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("wrong_shape", "returns shape"),
        ("no_gradient", "no gradient"),
        ("not_finite", "not finite"),
        ("raising", "RuntimeError: two lines"),
        ("not_a_tensor", "returns float"),
        ("missing", "cannot be imported: AttributeError"),
        ("N", "not callable"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_named(install: Any, attribute: str, message: str) -> None:
    install(f"{__name__}:{attribute}")
    with pytest.raises(UserError, match=message) as caught:
        resolve_loss("mine")
    assert "loss plug-in 'mine'" in str(caught.value) and "\n" not in str(caught.value)
