"""Divergences between the teacher's and the student's next-token distributions, one value per response token.

Throughout, p is the teacher's distribution and q the student's, both softened by `kd_temperature`. Every function
is true to its definition: zero for equal inputs, constants of the teacher included, no factor T^2 (`resolve_loss`
applies that where asked). The gradient reaches both sides; a frozen teacher simply does not require one.

Numbers are computed in float32 (float64 for float64 logits) whatever the dtype of the logits. A logit of -inf is a
mask: masked on both sides, the entry contributes nothing. Masked on one side, the definition of a KL is infinite; an
infinite loss would end a training run, so a masked log-probability is read as `LOG_ZERO`, the logarithm of the
smallest normal float32: the loss stays finite and still pushes the student off what the teacher forbids.

Legend: N response tokens in one flat axis, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pocl_ray import plugins
from pocl_ray.config import ScheduleConfig
from pocl_ray.distill.loss_table import GROUP, KNOWN, Range, check_params, unknown_loss
from pocl_ray.errors import UserError
from pocl_ray.plugins import reason


def probe(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Call a plug-in on three tokens, and check its result: a mistake shows before training, and names the plug-in.

    Raises:
        UserError: The plug-in raises an error, returns no float tensor of shape (N,), is not finite, or has no
            gradient.
    """
    generator = torch.Generator().manual_seed(0)
    student_logits_NV = torch.randn(3, 7, generator=generator).requires_grad_()
    teacher_logits_NV = torch.randn(3, 7, generator=generator)
    try:
        with torch.enable_grad():
            loss_N = function(student_logits_NV, teacher_logits_NV, 2.0, **params)
    except Exception as error:  # code of others: every failure is reported under the plug-in's name
        raise UserError(f"loss plug-in '{name}' fails when called: {reason(error)}; check its parameters") from error
    wrong = _problem_of(loss_N)
    if wrong:
        raise UserError(f"loss plug-in '{name}' {wrong}; a loss returns one finite float per token, shape (N,)")


def _problem_of(loss_N: object) -> str:
    if not isinstance(loss_N, Tensor):
        return f"returns {type(loss_N).__name__}, not a tensor"
    if loss_N.shape != (3,):
        return f"returns shape {tuple(loss_N.shape)} for 3 tokens"
    if not loss_N.is_floating_point() or not bool(torch.isfinite(loss_N).all()):
        return "returns values that are not finite floats"
    return "" if loss_N.requires_grad else "has no gradient for the student"


LossFunction = Callable[..., Tensor]
LOG_ZERO = math.log(torch.finfo(torch.float32).tiny)


def forward_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p||q) = sum p log(p/q), the loss of Hinton et al. (arXiv 1503.02531); shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(logp_NV, logq_NV).float()


def reverse_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q||p) = sum q log(q/p), as in MiniLLM (arXiv 2306.08543); shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(logq_NV, logp_NV).float()


def js_distance(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, lam: float = 0.9
) -> Tensor:
    """Skewed Jensen-Shannon: lam KL(q||m) + (1-lam) KL(p||m) with m = (1-lam) p + lam q; shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return _jensen_shannon(logp_NV, logq_NV, teacher_weight=1.0 - lam).float()


def tv_distance(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Total variation, 0.5 sum |p - q|, as in f-distill (arXiv 2307.15190); shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return (0.5 * (logp_NV.exp() - logq_NV.exp()).abs().sum(-1)).float()


def skewed_forward_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(p||m) with m = alpha p + (1-alpha) q, of DistiLLM (arXiv 2402.03898, eq. 4); shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(logp_NV, _log_mixture(logp_NV, logq_NV, teacher_weight=alpha)).float()


def skewed_reverse_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """KL(q||m) with m = (1-alpha) p + alpha q, of DistiLLM (arXiv 2402.03898); shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    return _kl(logq_NV, _log_mixture(logp_NV, logq_NV, teacher_weight=1.0 - alpha)).float()


def symmetric_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, lam: float = 0.5
) -> Tensor:
    """(1-lam) KL(p||q) + lam KL(q||p), at lam 0.5 half the Jeffreys divergence; shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    weight_NV = (1.0 - lam) * logp_NV.exp() - lam * logq_NV.exp()
    return (weight_NV * (logp_NV - logq_NV)).sum(-1).float()


def generalized_jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q, of GKD (arXiv 2306.13649); shape (N,), float32.

    The ends are the limits after division by beta (1-beta): beta 0 is exactly KL(p||q), beta 1 exactly KL(q||p).
    """
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    if beta == 0.0:
        return _kl(logp_NV, logq_NV).float()
    if beta == 1.0:
        return _kl(logq_NV, logp_NV).float()
    return _jensen_shannon(logp_NV, logq_NV, teacher_weight=beta).float()


def even_jsd(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """`generalized_jsd` over beta (1-beta): continuous from KL(p||q) at 0 to KL(q||p) at 1; shape (N,), float32.

    The plain one falls to 0 towards both ends and jumps there, so a beta that moves would switch the loss off and on.
    With d = log p - log q, log m = log q + log(1 + beta (e^d - 1)), which keeps its precision for a small beta, where
    the difference of logarithms would lose all of it; above 1/2 the two sides change places.
    """
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    if beta > 0.5:
        return _even_jsd(logq_NV, logp_NV, 1.0 - beta).float()
    return _even_jsd(logp_NV, logq_NV, beta).float()


_LARGE = 60.0


def _even_jsd(log_a_NV: Tensor, log_b_NV: Tensor, weight: float) -> Tensor:
    """KL(a||m) / (1-w) + KL(b||m) / w with m = w a + (1-w) b and w <= 1/2."""
    if weight <= 0.0:
        return _kl(log_a_NV, log_b_NV)
    d_NV = log_a_NV - log_b_NV
    # e^d overflows where b has next to nothing; far below that the 1 in log(1 + w (e^d - 1)) is lost anyway.
    log_rise_NV = torch.log1p(weight * torch.expm1(d_NV.clamp(max=_LARGE)))
    log_rise_NV = torch.where(d_NV > _LARGE, d_NV + math.log(weight), log_rise_NV)
    to_a_NV = log_a_NV.exp() * (d_NV - log_rise_NV)
    return (to_a_NV / (1.0 - weight) - log_b_NV.exp() * log_rise_NV / weight).sum(-1)


def adaptive_kl(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, head_mass: float = 0.5
) -> Tensor:
    """Forward KL where the student misses the teacher's head, reverse KL where it misses the tail (arXiv 2404.02657).

    The head is the fewest tokens that hold `head_mass` of p. With g_head and g_tail the sums of |p - q| over head and
    tail: (g_head KL(p||q) + g_tail KL(q||p)) / (g_head + g_tail); no gradient flows through the two weights.

    Returns:
        Shape (N,), float32.
    """
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    with torch.no_grad():
        p_NV, order_NV = logp_NV.exp().sort(dim=-1, descending=True)
        gap_NV = (p_NV - logq_NV.exp().gather(-1, order_NV)).abs_()
        mass_before_NV = p_NV.cumsum(-1).sub_(p_NV)
        gap_all_N = gap_NV.sum(-1)
        gap_head_N = gap_NV.masked_fill_(mass_before_NV >= head_mass, 0.0).sum(-1)
        # Equal distributions have no gap at all; both KLs are zero there, so any weight will do.
        head_share_N = gap_head_N / gap_all_N.clamp(min=torch.finfo(gap_all_N.dtype).tiny)
    forward_N, reverse_N = _kl(logp_NV, logq_NV), _kl(logq_NV, logp_NV)
    return (head_share_N * forward_N + (1.0 - head_share_N) * reverse_N).float()


def top_k_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0, k: int = 64) -> Tensor:
    """KL(p||q) over the teacher's k likeliest tokens and one bucket that holds all others; shape (N,), float32.

    Merging the tail can only lower the divergence, so `forward_kl` is never less; for k >= V - 1 they are equal.
    """
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    top_logp_NK, top_NK = logp_NV.topk(min(k, logp_NV.shape[-1]), dim=-1)
    head_N = _kl(top_logp_NK, logq_NV.gather(-1, top_NK))
    tail_logp_N = logp_NV.scatter(-1, top_NK, LOG_ZERO).logsumexp(-1)
    tail_logq_N = logq_NV.scatter(-1, top_NK, LOG_ZERO).logsumexp(-1)
    return (head_N + tail_logp_N.exp() * (tail_logp_N - tail_logq_N)).float()


def uld(student_logits_NV: Tensor, teacher_logits_NW: Tensor, temperature: float = 1.0) -> Tensor:
    """Universal Logit Distillation (arXiv 2402.12030): sum_i |p_(i) - q_(i)|, both sorted from the likeliest down.

    It is the closed form of the Wasserstein-1 distance at equal costs, and asks nothing of the vocabularies V and W:
    the smaller is filled up with zeros. So it compares models with different tokenizers, but knows no token by name.

    Returns:
        Shape (N,), float32.
    """
    q_NV, p_NW = _sorted_probs(student_logits_NV, temperature), _sorted_probs(teacher_logits_NW, temperature)
    shared = min(q_NV.shape[-1], p_NW.shape[-1])
    rest_N = q_NV[..., shared:].sum(-1) + p_NW[..., shared:].sum(-1)  # one of them is empty
    return ((p_NW[..., :shared] - q_NV[..., :shared]).abs().sum(-1) + rest_N).float()


def log_probs(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log q, log p) over the shared vocabulary: embeddings are padded at their end, to sizes that differ."""
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    num_shared = min(student_logits_NV.shape[-1], teacher_logits_NV.shape[-1])
    return (
        _log_softmax(student_logits_NV[..., :num_shared], temperature),
        _log_softmax(teacher_logits_NV[..., :num_shared], temperature),
    )


def _sorted_probs(logits_NV: Tensor, temperature: float) -> Tensor:
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    probs_NV = torch.softmax(logits_NV.to(dtype) / temperature, dim=-1)
    return probs_NV.sort(dim=-1, descending=True, stable=True).values  # stable sort: ties keep their order


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    if temperature != 1.0:
        logits_NV = logits_NV.to(dtype) / temperature
    log_probs_NV = torch.log_softmax(logits_NV, dim=-1, dtype=dtype)
    # In place for the teacher saves one (N, V) temporary; the student's log_softmax keeps its output for backward.
    floor = torch.nan_to_num if log_probs_NV.requires_grad else torch.nan_to_num_
    return floor(log_probs_NV, nan=math.nan, neginf=LOG_ZERO)


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def _log_mixture(logp_NV: Tensor, logq_NV: Tensor, teacher_weight: float) -> Tensor:
    """log(w p + (1-w) q) without leaving log space, where small probabilities would vanish."""
    if teacher_weight <= 0.0:
        return logq_NV
    if teacher_weight >= 1.0:
        return logp_NV
    return torch.logaddexp(logp_NV + math.log(teacher_weight), logq_NV + math.log1p(-teacher_weight))


def _jensen_shannon(logp_NV: Tensor, logq_NV: Tensor, teacher_weight: float) -> Tensor:
    """w KL(p||m) + (1-w) KL(q||m) with m = w p + (1-w) q."""
    log_mixture_NV = _log_mixture(logp_NV, logq_NV, teacher_weight)
    return teacher_weight * _kl(logp_NV, log_mixture_NV) + (1.0 - teacher_weight) * _kl(logq_NV, log_mixture_NV)


@dataclass(frozen=True)
class Loss:
    """One entry of the registry.

    Attributes:
        function: The divergence.
        scale_by_t_squared: Whether its authors multiply by T^2.
        parameters: The values that each parameter may take.
        moving: The divergence in its place while a parameter moves, if its scale would move too.
    """

    function: LossFunction
    scale_by_t_squared: bool
    parameters: Mapping[str, Range] = field(default_factory=dict)
    moving: LossFunction | None = None


_FUNCTIONS: dict[str, LossFunction] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js_distance": js_distance,
    "tv_distance": tv_distance,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "generalized_jsd": generalized_jsd,
    "symmetric_kl": symmetric_kl,
    "adaptive_kl": adaptive_kl,
    "top_k_kl": top_k_kl,
    "uld": uld,
}
_MOVING: dict[str, LossFunction] = {"generalized_jsd": even_jsd}

LOSSES: dict[str, Loss] = {
    name: Loss(_FUNCTIONS[name], facts.scale_by_t_squared, facts.parameters, _MOVING.get(name))
    for name, facts in KNOWN.items()
}


@dataclass(frozen=True)
class ResolvedLoss:
    """A loss with its parameters bound; picklable, so that a config step can hand it to a worker.

    A parameter that moves over the run is bound to its last value: dev losses are taken there, so that they can be
    compared over the run. Steps take the loss `at` their own values.
    """

    name: str
    function: LossFunction
    params: Mapping[str, Any]
    scale_by_t_squared: bool
    moving: LossFunction | None = None

    def at(self, values: Mapping[str, float]) -> ResolvedLoss:
        """Return the loss of a step, given its values of the parameters that move; whole numbers are rounded to."""
        if not values:
            return self
        step = {key: round(value) if isinstance(self.params[key], int) else value for key, value in values.items()}
        return replace(self, function=self.moving or self.function, params={**self.params, **step})

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
        """Return the divergence of each token, shape (N,), times T^2 where asked."""
        loss_N = self.function(student_logits_NV, teacher_logits_NV, temperature, **self.params)
        return loss_N * temperature**2 if self.scale_by_t_squared and temperature != 1.0 else loss_N


def resolve_loss(
    name: str, params: Mapping[str, Any] | None = None, scale_by_t_squared: bool | None = None
) -> ResolvedLoss:
    """Look a loss up by name, first here, then among installed plug-ins, and bind its parameters.

    Args:
        name: A key of `LOSSES`, or the name of an entry point in the group `pocl_ray.losses`.
        params: Parameters of the loss, such as `{"alpha": 0.1}`, numbers or schedules; those left out keep their
            defaults.
        scale_by_t_squared: Multiply by the square of the temperature; None does as the loss's authors do.

    Raises:
        ConfigError: The name or a parameter is unknown, or a value lies outside its range.
        UserError: A plug-in cannot be loaded or breaks the contract of a loss.
    """
    given = dict(params or {})
    if name in LOSSES:
        loss = LOSSES[name]
        check_params(name, given, loss.parameters)
    elif name in (installed := plugins.installed(GROUP)):
        found = plugins.load("loss", installed[name])
        loss = found if isinstance(found, Loss) else Loss(found, scale_by_t_squared=False)
        if loss.parameters:
            check_params(name, given, loss.parameters)
        probe(name, loss.function, _bound(given, loss.parameters, lambda schedule: schedule.bounds()[0]))
        if any(isinstance(value, ScheduleConfig) for value in given.values()):
            probe(name, loss.function, _bound(given, loss.parameters, lambda schedule: schedule.bounds()[1]))
    else:
        raise unknown_loss(name, installed)
    scaled = loss.scale_by_t_squared if scale_by_t_squared is None else scale_by_t_squared
    return ResolvedLoss(name, loss.function, _bound(given, loss.parameters, lambda s: s.last), scaled, loss.moving)


def _bound(
    params: Mapping[str, Any], known: Mapping[str, Range], value_of: Callable[[ScheduleConfig], float]
) -> dict[str, Any]:
    """The parameters as numbers: of a schedule the value that `value_of` takes."""
    numbers = {key: value_of(value) if isinstance(value, ScheduleConfig) else value for key, value in params.items()}
    return {key: int(value) if key in known and known[key].integer else value for key, value in numbers.items()}
