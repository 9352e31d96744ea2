"""POCL in TRL's `GKDTrainer`: on-policy distillation, or off-policy with `lmbda=0`, with a curriculum.

    curriculum = Curriculum.from_run("runs", "dolly")
    trainer = CurriculumGKDTrainer(
        student, teacher, GKDConfig("out", lmbda=0.5, beta=0.1), train_dataset=rows, processing_class=tokenizer,
        curriculum=curriculum,
    )
    trainer.train()

This class adds three things that TRL 1.16 lacks. TRL's loss always has temperature 1 (its `temperature` is for sampling
alone, here too). TRL has no kd_ratio. And with several processes its gradient is too small by a factor of their number.
Rows, generation with `lmbda` and `seq_kd`, and collation are TRL's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError
from pocl_ray.integrations.huggingface import DistillationMixin

try:
    from trl.experimental.gkd import GKDTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "pocl_ray.integrations.gkd needs TRL: pip install 'pocl-ray[trl]', with Python 3.11 or newer"
    ) from error


class CurriculumGKDTrainer(DistillationMixin, GKDTrainer):
    """`GKDTrainer` with the rows, stages, temperature and kd_ratio of a curriculum.

    Args:
        curriculum: Plan of the stages.
        loss: Divergence of `pocl_ray.distill.losses`; None for TRL's own, the generalized JSD with the arguments'
            `beta`.
        loss_args: Parameters of that loss, numbers or schedules; a `beta` here goes before the arguments' own.
        scale_by_t_squared: Whether to multiply by the temperature squared; None: as the authors of the loss do (TRL
            does not).

    Raises:
        UserError: Data set, batch, arguments or loss do not fit the plan.
    """

    def __init__(
        self,
        *args: Any,
        loss: str | None = None,
        loss_args: Mapping[str, Any] | None = None,
        scale_by_t_squared: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, loss=loss or "generalized_jsd", loss_args=loss_args, scale_by_t_squared=scale_by_t_squared, **kwargs
        )
        if self.curriculum.frontier is not None and (self.lmbda >= 1.0 or self.seq_kd):
            raise ConfigError(
                "curriculum.pacing frontier needs steps on the data's responses, whose gaps it draws rows by, and with "
                "lmbda 1 or seq_kd there is none; lower lmbda and set seq_kd to false"
            )
        if loss is None and not loss_args:
            self.divergence = resolve_loss("generalized_jsd", {"beta": self.beta}, scale_by_t_squared)
