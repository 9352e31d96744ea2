"""The losses by name: whether T^2 applies, their parameters, and the checks of a config's losses.

`plan` reads this file, which needs no torch. The functions are in `losses`; only a plug-in's loss is called here, and
torch is imported for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pocl_ray import plugins
from pocl_ray.config import DistillConfig, RolloutConfig, ScheduleConfig
from pocl_ray.errors import ConfigError

GROUP = "pocl_ray.losses"
"""The entry points of losses from other packages: functions with the signature of those in `losses`, or a `Loss`, which
also names its parameters and whether T^2 applies."""


@dataclass(frozen=True)
class Range:
    """The values a parameter may take: between `low` and `high`, ends included unless marked open."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False
    integer: bool = False

    def holds(self, value: object) -> bool:
        """Whether `value` is a number of the right kind inside the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.integer:
            return f"a whole number from {self.low:.0f} to {self.high:.0f}"
        brackets = ("(" if self.low_open else "[") + "{}" + (")" if self.high_open else "]")
        return "a number in " + brackets.format(f"{self.low:g}, {self.high:g}")


@dataclass(frozen=True)
class LossFacts:
    """The part of a loss that is known without its function.

    Attributes:
        scale_by_t_squared: Whether its authors multiply by T^2.
        parameters: The values that each parameter may take.
    """

    scale_by_t_squared: bool
    parameters: Mapping[str, Range] = field(default_factory=dict)


_INSIDE = Range(0.0, 1.0, low_open=True, high_open=True)
_SKEW = Range(0.0, 1.0, high_open=True)
_CLOSED = Range(0.0, 1.0)

# T^2 as in the authors' code for the first six, as TRL does (not at all) for generalized_jsd, and no T in the paper of
# uld. The three between are made of KLs with the gradient of forward_kl, which shrinks with 1/T^2, and follow it.
KNOWN: dict[str, LossFacts] = {
    "forward_kl": LossFacts(scale_by_t_squared=True),
    "reverse_kl": LossFacts(scale_by_t_squared=False),
    "js_distance": LossFacts(scale_by_t_squared=True, parameters={"lam": _INSIDE}),
    "tv_distance": LossFacts(scale_by_t_squared=False),
    "skewed_forward_kl": LossFacts(scale_by_t_squared=False, parameters={"alpha": _SKEW}),
    "skewed_reverse_kl": LossFacts(scale_by_t_squared=True, parameters={"alpha": _SKEW}),
    "generalized_jsd": LossFacts(scale_by_t_squared=False, parameters={"beta": _CLOSED}),
    "symmetric_kl": LossFacts(scale_by_t_squared=True, parameters={"lam": _CLOSED}),
    "adaptive_kl": LossFacts(scale_by_t_squared=True, parameters={"head_mass": _INSIDE}),
    "top_k_kl": LossFacts(scale_by_t_squared=True, parameters={"k": Range(1, 2**20, integer=True)}),
    "uld": LossFacts(scale_by_t_squared=False),
}


def check_losses(distill: DistillConfig, rollout: RolloutConfig) -> None:
    """Check the losses of a config, on the rows' responses and on rollouts, before a device is known.

    Raises:
        ConfigError: A loss is unknown, its parameters are wrong, or `liger` cannot compute it.
        UserError: A plug-in cannot be loaded or breaks the contract of a loss.
    """
    names = {distill.loss} if rollout.loss is None else {distill.loss, rollout.loss}
    if not names <= set(KNOWN) and names <= {*KNOWN, *plugins.installed(GROUP)}:
        from pocl_ray.distill.kernels import divergences  # calls the plug-in on a few tokens

        divergences(distill, rollout)
        return
    _check_one("distill.loss", distill, distill.loss, distill.loss_args)
    if rollout.loss is not None:
        _check_one("rollout.loss", distill, rollout.loss, rollout.loss_args)


def _check_one(key: str, distill: DistillConfig, name: str, args: Mapping[str, Any]) -> None:
    try:
        if name not in KNOWN:
            raise unknown_loss(name, plugins.installed(GROUP))
        check_params(name, args, KNOWN[name].parameters)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if distill.kernel == "liger":
        check_liger(distill.model_copy(update={"loss": name, "loss_args": args}), fixed_beta(name, args))


def fixed_beta(name: str, args: Mapping[str, Any]) -> float | None:
    """Return the beta for which a loss is a generalized JSD; None if there is no such beta, or it moves.

    Liger compiles its kernel for a beta: one that moves would be compiled at every step.
    """
    return None if any(isinstance(value, ScheduleConfig) for value in args.values()) else jsd_beta(name, args)


def jsd_beta(name: str, params: Mapping[str, Any]) -> float | None:
    """Return the beta for which a loss with these parameters is a generalized JSD; None if there is no such beta."""
    if name not in KNOWN:
        return None
    of_loss: Mapping[str, Any] = {
        "forward_kl": 0.0,
        "reverse_kl": 1.0,
        "generalized_jsd": params.get("beta", 0.5),
        "js_distance": 1.0 - params.get("lam", 0.9),
    }
    beta = of_loss.get(name)
    return None if beta is not None and 0.0 < min(beta, 1.0 - beta) < 1e-3 else beta


def check_liger(distill: DistillConfig, beta: float | None) -> None:
    """Refuse `kernel: liger` for a loss that Liger does not compute; `beta` is that of `fixed_beta`.

    Raises:
        ConfigError: It does not.
    """
    if beta is None:
        raise ConfigError(
            f"distill.kernel: liger does not cover {distill.loss} with these arguments; it covers forward_kl, "
            "reverse_kl, js_distance and generalized_jsd, with parameters that do not move. Set kernel to auto"
        )
    if distill.token_weight != "none":
        raise ConfigError("distill.kernel: liger gives no value per token, which token_weight needs; set it to auto")


def unknown_loss(name: str, installed: Iterable[str]) -> ConfigError:
    """Return the error for an unknown loss, which names the nearest one here and among the installed plug-ins."""
    return ConfigError(f"loss '{name}' is unknown; {_nearest(name, [*KNOWN, *installed])}")


def check_params(name: str, params: Mapping[str, Any], known: Mapping[str, Range]) -> None:
    """Check the parameters of a loss, numbers or schedules.

    Raises:
        ConfigError: One is unknown, or its value lies outside its range.
    """
    for key, value in params.items():
        if key not in known:
            raise ConfigError(f"loss '{name}' has no parameter '{key}'; {_nearest(key, list(known))}")
        if isinstance(value, ScheduleConfig):
            _check_moving(name, key, value, known[key])
        elif not known[key].holds(value):
            raise ConfigError(f"loss '{name}': {key} must be {known[key]}, not {value!r}")


def _check_moving(name: str, key: str, schedule: ScheduleConfig, known: Range) -> None:
    """Refuse a schedule that leaves the range: between its ends every value is taken, and the range has no hole."""
    for value in schedule.bounds():
        if not known.holds(int(value) if known.integer and value.is_integer() else value):
            raise ConfigError(f"loss '{name}': {key} must be {known} at every step, and its schedule reaches {value:g}")


def _nearest(wrong: str, known: list[str]) -> str:
    if not known:
        return "it takes none"
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
