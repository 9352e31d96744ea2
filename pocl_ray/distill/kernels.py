"""The kernels of divergences: our code in torch, or Liger's fused kernel on CUDA.

Liger's generalized JSD (the extra `liger`) makes value and gradient of a chunk's divergence in one pass over the
log-probabilities; in torch each step of the formula is an array of its own. It covers the losses that are a generalized
JSD for some beta, with one sum over the tokens. The chunks, the head and the cross-entropy stay ours.

Legend: N response tokens in one flat axis, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pocl_ray.config import DistillConfig, RolloutConfig
from pocl_ray.distill.loss_table import check_liger, fixed_beta
from pocl_ray.distill.losses import ResolvedLoss, log_probs, resolve_loss
from pocl_ray.errors import ConfigError, UserError

# Liger's mixture leaves log space, where both probabilities may be 0 and their logarithm infinite. e^-80 times any beta
# above 1e-3 is a normal float32, and what a token of so little probability adds to a bounded divergence is nothing.
_LOG_FLOOR = -80.0


def resolve_divergence(
    distill: DistillConfig, device: torch.device | None = None, key: str = "distill.loss"
) -> ResolvedLoss | LigerLoss:
    """Return the divergence of the config, with the kernel that it asks for.

    Args:
        distill: Loss, its parameters and the kernel.
        device: Device of the computation; None if it is not known yet, and fewer checks are possible.
        key: Key of the loss in the config, for messages.

    Raises:
        ConfigError: The loss is unknown or its parameters are wrong, or `liger` cannot compute it here.
        UserError: A plug-in cannot be loaded or breaks the contract of a loss.
    """
    loss = _resolved(distill, key)
    beta = fixed_beta(distill.loss, distill.loss_args)
    if distill.kernel == "liger":
        check_liger(distill, beta)
        _check_device(device)
    wanted = distill.kernel == "liger" or (distill.kernel == "auto" and _fits(distill, device))
    return LigerLoss(loss, beta) if wanted and beta is not None else loss


def _resolved(distill: DistillConfig, key: str) -> ResolvedLoss:
    """The loss of the config; an error about it names the key."""
    try:
        return resolve_loss(distill.loss, distill.loss_args, distill.scale_by_t_squared)
    except UserError as error:
        raise type(error)(f"{key}: {error}") from error


def divergences(
    distill: DistillConfig, rollout: RolloutConfig, device: torch.device | None = None
) -> tuple[ResolvedLoss | LigerLoss, ResolvedLoss | LigerLoss]:
    """Return the divergence on the rows' responses, and the divergence on rollouts; see `resolve_divergence`."""
    on_data = resolve_divergence(distill, device)
    if rollout.loss is None:
        return on_data, on_data
    own = distill.model_copy(update={"loss": rollout.loss, "loss_args": rollout.loss_args})
    return on_data, resolve_divergence(own, device, "rollout.loss")


@dataclass(frozen=True)
class LigerLoss:
    """A generalized JSD by Liger's kernel; called as a ResolvedLoss, it returns the sum over the tokens, shape ()."""

    loss: ResolvedLoss
    beta: float

    def at(self, values: Mapping[str, float]) -> LigerLoss:
        """Return the loss of a step, which is the same for all: none of its parameters moves."""
        assert not values, "losses with parameters that move are computed by our own code"
        return self

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float) -> Tensor:
        """Return the sum of the tokens' divergences, times T^2 where the loss is."""
        logq_NV, logp_NV = log_probs(student_logits_NV.float(), teacher_logits_NV.float(), temperature)
        if 0.0 < self.beta < 1.0:
            logq_NV, logp_NV = logq_NV.clamp(min=_LOG_FLOOR), logp_NV.clamp(min=_LOG_FLOOR)
        mean = importlib.import_module("liger_kernel.transformers").LigerJSD(beta=self.beta)(logq_NV, logp_NV)
        scale = temperature**2 if self.loss.scale_by_t_squared else 1.0
        return mean * (len(student_logits_NV) * scale)


def _fits(distill: DistillConfig, device: torch.device | None) -> bool:
    on_cuda = device is not None and device.type == "cuda"
    return on_cuda and distill.token_weight == "none" and _is_installed()


def _check_device(device: torch.device | None) -> None:
    if device is None:
        return
    if device.type != "cuda":
        raise ConfigError(f"distill.kernel: liger runs on CUDA, and this worker computes on {device.type}; set auto")
    if not _is_installed():
        raise ConfigError("distill.kernel: liger-kernel is not installed: pip install 'pocl-ray[liger]', or set auto")


def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
