"""The dependencies of steps that more than one place must know, such as the pipeline and a trial of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pocl_ray.config import Config
from pocl_ray.config.neutral import neutral_free
from pocl_ray.config.race import RACE
from pocl_ray.config.training import FRONTIER
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.records import Stage

LOSS_KEYS = {"loss", "loss_args", "scale_by_t_squared", "token_weight", "token_weight_strength"}


def ranking_dependencies(config: Config, signals: str) -> list[Any]:
    """Return everything that the ranking depends on, given the fingerprint of the signals."""
    settings = config.difficulty.model_dump(mode="json", include={"columns", "rrf_k", "tie_break"})
    settings["signals"] = list(config.difficulty.signals.items())  # their order decides ties
    return [signals, settings, config.seed]


def distill_dependencies(config: Config, ranking: str, student: str, stages: Sequence[Stage]) -> list[Any]:
    """Return everything that a distilled student depends on, given the fingerprints of ranking and untuned student."""
    train = _train(config)
    seed = train.pop("seed")
    return [
        *_teaching(config, len(stages)),
        ranking,
        student,
        [stage.to_json() for stage in stages],
        train,
        _loss(config),
        config.evaluation.model_dump(mode="json", include={"dev_generation", "max_dev_rows"}),
        config.curriculum.hand_off,
        config.curriculum.plateau.model_dump(mode="json") if config.curriculum.advance == "plateau" else None,
        config.seed if seed is None else seed,
        *_lora(config),
        *([config.curriculum.frontier.model_dump(mode="json")] if config.curriculum.pacing == FRONTIER else []),
        *([config.rollout.model_dump(mode="json")] if config.rollout.is_on else []),
    ]


def _loss(config: Config) -> dict[str, Any]:
    """The keys of the loss. A newer key counts only if it is used."""
    newer = {"token_keep"} if config.distill.token_keep is not None else set()
    return config.distill.model_dump(mode="json", include=LOSS_KEYS | newer)


def _teaching(config: Config, num_stages: int) -> list[Any]:
    """The shares of several teachers in the loss; an empty list for a single teacher."""
    if not config.other_teachers:
        return []
    teachers = (config.teacher, *config.other_teachers)
    return [[[teacher.weight, teacher.stages_of(num_stages)] for teacher in teachers]]


def sft_dependencies(config: Config, role: Literal["teacher", "student"]) -> Any:
    """Return the dependencies that supervised fine-tuning adds to a model's; None if there is no fine-tuning."""
    sft = getattr(config, role).sft
    if sft is None:
        return None
    merged = _train(config.model_copy(update={"train": config.sft_train(sft)}))
    del merged["seed"]
    lora = _lora(config, exclude={"merge"}) if role == "student" else []
    return [sft.model_dump(mode="json", exclude={"train"}), merged, *lora]


def _train(config: Config) -> dict[str, Any]:
    """The keys of `train` that a result depends on. A newer key counts only if it is used."""
    train: dict[str, Any] = neutral_free(config)["train"]
    if config.train.lr_schedule != "wsd":
        del train["decay_ratio"]
    used = {"none": set[str](), "ema": {"average", "average_decay"}, "last_k": {"average", "average_last"}}
    for key in {"average", "average_decay", "average_last"} - used[config.train.average]:
        del train[key]
    return train


def _lora(config: Config, exclude: set[str] | None = None) -> list[Any]:
    lora = config.student.lora
    if lora is None:
        return []
    unused = {"target_parameters"} if lora.target_parameters is None else set()  # a newer key counts only if it is set
    return [lora.model_dump(mode="json", exclude=unused | (exclude or set()))]


# The parts of a run that read the teacher. Where none does, no teacher is trained, loaded or cached.


def reads_teacher(config: Config, stages: Sequence[Stage]) -> bool:
    """Return whether training through these stages reads the teacher.

    It does for the loss, for the dev figure that ends a stage, and for signals that compare the models again.
    """
    watches = config.curriculum.advance == "plateau" and config.curriculum.plateau.metric == "kd_loss"
    compares = any(stage.rescore for stage in stages) and choose_signals(config.difficulty).compares
    return watches or compares or config.rollout.uses_teacher or any(stage.uses_teacher for stage in stages)


def any_training_reads_teacher(config: Config, stages: Sequence[Stage]) -> bool:
    """Return whether anything that a config trains reads the teacher: curriculum, control, search, experiment, race."""
    has_control = config.control is not None and config.control.kd_ratio > 0
    has_others = config.tune is not None or config.experiment is not None or config.curriculum.pacing == RACE
    return has_control or has_others or reads_teacher(config, stages)
