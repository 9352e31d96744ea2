"""POCL in TRL's `GKDTrainer`: on-policy distillation, or off-policy with `lmbda=0`, through a curriculum.

    curriculum = Curriculum.from_run("runs", "dolly")
    trainer = CurriculumGKDTrainer(
        student, teacher, GKDConfig("out", lmbda=0.5, beta=0.1), train_dataset=rows, processing_class=tokenizer,
        curriculum=curriculum,
    )
    trainer.train()

What TRL 1.16 leaves out, and is added here: its loss runs at temperature 1 whatever `temperature` says (that one is for
sampling alone, and stays so), it has no kd_ratio, and with several processes its gradient comes out smaller by their
number. Rows, generation with `lmbda` and `seq_kd`, and collation are TRL's own.
"""

from __future__ import annotations

from typing import Any

from pocl_ray.distill.losses import resolve_loss
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
        curriculum: The plan.
        loss: A divergence of `pocl_ray.distill.losses`; None: TRL's own, the generalized JSD with the `beta` of the
            arguments.
        loss_args: Parameters of that loss.
        scale_by_t_squared: Multiply by the temperature squared; None: as the loss's authors do (TRL does not).

    Raises:
        UserError: Data set, batch, arguments or loss do not fit.
    """

    def __init__(
        self,
        *args: Any,
        loss: str | None = None,
        loss_args: dict[str, float] | None = None,
        scale_by_t_squared: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, loss=loss or "generalized_jsd", loss_args=loss_args, scale_by_t_squared=scale_by_t_squared, **kwargs
        )
        if loss is None:
            self.divergence = resolve_loss("generalized_jsd", {"beta": self.beta}, scale_by_t_squared)
