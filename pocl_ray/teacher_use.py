"""Where a run reads the teacher: what needs none of it neither trains nor loads nor caches one."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_ray.config import Config
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.records import Stage


def reads_teacher(config: Config, stages: Sequence[Stage]) -> bool:
    """Return whether training through these stages reads the teacher.

    It does for its loss, for the dev figure that ends a stage, and for signals that compare the models again.
    """
    watches = config.curriculum.advance == "plateau" and config.curriculum.plateau.metric == "kd_loss"
    compares = any(stage.rescore for stage in stages) and choose_signals(config.difficulty).compares
    return watches or compares or config.rollout.uses_teacher or any(stage.uses_teacher for stage in stages)


def any_training_reads_teacher(config: Config, stages: Sequence[Stage]) -> bool:
    """Return whether anything that a config trains reads the teacher: the curriculum, its control, or a search."""
    has_control = config.control is not None and config.control.kd_ratio > 0
    return has_control or config.tune is not None or reads_teacher(config, stages)
