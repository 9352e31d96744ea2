"""The training state by parameter name: fp32 weights and Adam moments, for every ZeRO stage and number of workers.

DeepSpeed cuts its optimizer state into partitions whose layout depends on the stage and on the number of workers.
Here the state is gathered parameter by parameter instead, so what one layout wrote any other reads, exactly.
Gathering and setting are collective: every worker calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from pocl_ray.distill.engine import Engine
from pocl_ray.errors import ConfigError
from pocl_ray.heartbeat import beat

WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)


class TrainingState:
    """Reads and writes the weights and moments of an engine, whatever its ZeRO stage."""

    def __init__(self, engine: Engine) -> None:
        """Allocate the moments, which torch would do at the first step only."""
        self.engine = engine
        self.stage = engine.train.zero_stage
        self.wrapper = engine.deepspeed.optimizer
        self.adam = self.wrapper if self.stage == 0 else self.wrapper.optimizer
        known = {
            0: "AdamW",
            1: "DeepSpeedZeroOptimizer",
            2: "DeepSpeedZeroOptimizer",
            3: "DeepSpeedZeroOptimizer_Stage3",
        }
        if type(self.wrapper).__name__ != known[self.stage]:
            raise ConfigError(
                f"train.deepspeed: it makes DeepSpeed use {type(self.wrapper).__name__}, whose state cannot be "
                "checkpointed here; remove data_types"
            )
        for partition in self._partitions():
            if not self.adam.state[partition]:
                self.adam.state[partition] = {
                    "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                    EXP_AVG: torch.zeros_like(partition),
                    EXP_AVG_SQ: torch.zeros_like(partition),
                }
        if self.stage in (1, 2):
            self.wrapper._lazy_init_hp_params_optimizer_state()

    @property
    def parameters(self) -> list[tuple[str, Any]]:
        """The trained parameters by name, tied ones once."""
        return [(n, p) for n, p in self.engine.module.named_parameters() if p.requires_grad]

    @property
    def num_adam_steps(self) -> int:
        """The number of optimizer steps since the moments were reset."""
        return int(self.adam.state[self._partitions()[0]]["step"].item())

    def reset_moments(self) -> None:
        """Reset the moments in place, since DeepSpeed's fragments are views of them."""
        self._fill_steps(0)
        for partition in self._partitions():
            self.adam.state[partition][EXP_AVG].zero_()
            self.adam.state[partition][EXP_AVG_SQ].zero_()

    def gather(self, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (kind, parameter name, full fp32 tensor), on every worker, one at a time."""
        for name, parameter in self.parameters:
            for kind in kinds:
                beat("gathering the state")
                yield kind, name, self._get(parameter, kind)

    def load(
        self, read: Callable[[str, str], torch.Tensor], kinds: tuple[str, ...], num_adam_steps: int | None
    ) -> None:
        """Set the state from the tensors that rank 0 reads.

        Args:
            read: Function that returns the fp32 tensor of (kind, parameter name); it is called on rank 0 alone.
            kinds: Kinds of tensors to set.
            num_adam_steps: Number of steps that the moments have seen; None does not change the count.
        """
        if self.stage == 3:
            self.wrapper.checkpoint_event_prologue()
        for name, parameter in self.parameters:
            shape = parameter.ds_shape if self.stage == 3 else parameter.shape
            for kind in kinds:
                beat("loading the state")
                value = torch.empty(tuple(shape), dtype=torch.float32, device=self.engine.device)
                if self.engine.rank == 0:
                    value.copy_(read(kind, name))
                dist.broadcast(value, src=0)
                self._set(parameter, kind, value)
        if num_adam_steps is not None:
            self._fill_steps(num_adam_steps)
        if self.stage in (1, 2):
            self.wrapper.update_lp_params()
        if self.stage == 3:
            self.wrapper.checkpoint_event_epilogue()

    def weights(self) -> list[torch.Tensor]:
        """Return this worker's part of the fp32 weights, as the engine holds them."""
        return [partition.detach() for partition in self._partitions()]

    def exchange(self, other: list[torch.Tensor]) -> None:
        """Let the fp32 weights of this worker and `other` change places; `refresh` shows the model its new ones."""
        for own, theirs in zip(self.weights(), other, strict=True):
            before = own.clone()
            own.copy_(theirs)
            theirs.copy_(before)

    def refresh(self) -> None:
        """Give the model the fp32 weights, in its own precision; collective."""
        if self.stage in (1, 2):
            self.wrapper.update_lp_params()
        elif self.stage == 3:
            self.wrapper.checkpoint_event_prologue()
            for _, parameter in self.parameters:
                part = self._fp32_part(parameter)
                parameter.ds_tensor.data.view(-1)[: part.numel()].copy_(part)
            self.wrapper.checkpoint_event_epilogue()

    def loss_scaler(self) -> dict[str, Any]:
        """Return the numbers of the fp16 loss scaler; empty if there is none."""
        scaler = getattr(self.wrapper, "loss_scaler", None)
        if self.engine.train.precision != "fp16" or scaler is None:
            return {}
        return {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float, bool))}

    def set_loss_scaler(self, numbers: dict[str, Any]) -> None:
        """Restore the numbers that `loss_scaler` returned."""
        for key, value in numbers.items():
            setattr(self.wrapper.loss_scaler, key, value)

    def _partitions(self) -> list[torch.Tensor]:
        if self.stage == 0:
            return [p for _, p in self.parameters]
        return (
            self.wrapper.single_partition_of_fp32_groups
            if self.stage < 3
            else self.wrapper.fp32_partitioned_groups_flat
        )

    def _fill_steps(self, value: int) -> None:
        for partition in self._partitions():
            self.adam.state[partition]["step"].fill_(value)

    def _get(self, parameter: Any, kind: str) -> torch.Tensor:
        if self.stage == 0:
            return (parameter if kind == WEIGHT else self.adam.state[parameter][kind]).detach()
        key = None if kind == WEIGHT else kind
        if self.stage == 3:
            return self.wrapper.get_full_hp_param(parameter, key)
        return parameter.get_full_hp_param(key)

    def _set(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        if self.stage == 0:
            (parameter.data if kind == WEIGHT else self.adam.state[parameter][kind]).copy_(value)
        elif self.stage < 3:
            parameter.set_full_hp_param(value, None if kind == WEIGHT else kind)
        else:
            self._set_partition(parameter, kind, value)

    def _fp32_part(self, parameter: Any, key: str | None = None) -> torch.Tensor:
        """This worker's part of a ZeRO-3 parameter, or of its moment `key`."""
        part, _ = self.wrapper._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        return part

    def _set_partition(self, parameter: Any, kind: str, value: torch.Tensor) -> None:
        """Set this worker's part of a ZeRO-3 parameter, whose last part is padded."""
        part = self._fp32_part(parameter, None if kind == WEIGHT else kind)
        padded = torch.zeros(part.numel() * self.engine.world_size, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, part.numel() * self.engine.rank, part.numel())
        part.data.copy_(mine)
        if kind == WEIGHT:
            parameter.ds_tensor.data.view(-1)[: part.numel()].copy_(mine)
