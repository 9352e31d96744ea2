"""Arms: the keys that each changes in the config, the stages that follow, and the arms that share a scoring.

Pure planning: nothing is started, and no row is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray.config import Config
from pocl_ray.config.loading import with_overrides
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.distill.kernels import divergences
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.fingerprints import sft_dependencies
from pocl_ray.records import Stage
from pocl_ray.run_directory.storage import fingerprint
from pocl_ray.tuning.candidates import sft_pins

# Keys that belong to the experiment as a whole: arms that differed in them could not be compared.
COMMON = {
    "name": "the experiment has one directory",
    "storage_path": "the experiment has one directory",
    "evaluation": "all arms are judged alike",
    "scaling": "all arms run on the same machines",
    "train.seed": "experiment.seeds sets it",
    "student.seed": "all arms of a seed start from the same student",
    "tune": "an experiment holds no search",
    "experiment": "an experiment holds no other",
}


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        name: Name of the arm in the config.
        overrides: Keys that differ from the experiment's config.
        config: Whole config of the arm; `pocl-ray run` trains the same student with it.
        stages: Plan of the arm.
        scoring: Fingerprint of everything that scores, caches and models depend on; arms with the same one share these.
    """

    name: str
    overrides: Mapping[str, Any]
    config: Config
    stages: tuple[Stage, ...]
    scoring: str

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps; the maximum if a stage ends on convergence."""
        return sum(stage.num_steps for stage in self.stages)


def plan_arms(config: Config, num_rows: int) -> dict[str, Arm]:
    """Return the arms of an experiment, in the order of the config.

    Args:
        config: Config of the experiment.
        num_rows: Training rows of the config as it is.

    Raises:
        ConfigError: There is no `experiment` section, or an arm cannot be trained; the message names the arm.
    """
    if config.experiment is None:
        raise ConfigError("experiment: the config has no such section; give at least experiment.arms and .seeds")
    return {name: plan_arm(config, name, given, num_rows) for name, given in config.experiment.arms.items()}


def plan_arm(config: Config, name: str, overrides: Mapping[str, Any], num_rows: int) -> Arm:
    """Return one arm.

    Raises:
        ConfigError: It sets a key that all arms share, or its values do not work together.
    """
    place = f"experiment.arms.{name}"
    for key in _flat(overrides):
        for common, why in COMMON.items():
            if key == common or key.startswith(f"{common}."):
                raise ConfigError(f"{place}: {key} cannot differ between arms, since {why}; remove it")
    base = config.model_copy(update={"experiment": None, "tune": None, "control": None})
    try:
        own = with_overrides(base, overrides)
        # Supervised fine-tuning takes its defaults from `train`; an arm with another learning rate keeps the student.
        own = with_overrides(with_overrides(base, sft_pins(base, own.train)), overrides)
        choose_signals(own.difficulty)
        divergences(own.distill, own.rollout)
        if config.experiment is not None and config.experiment.student == "by_seed":
            _check_seeds_differ(own)
        return Arm(name, overrides, own, plan_stages(own, num_rows), scoring_fingerprint(own))
    except UserError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_seeds_differ(config: Config) -> None:
    student = config.student
    if student.architecture is None and student.sft is None:
        raise ConfigError(
            "experiment.student by_seed: the student is neither made nor fine-tuned here, so all seeds would start "
            "from the same one; give student.sft, or set experiment.student to shared"
        )


def with_steps(config: Config, arm: Arm, num_steps: int, num_rows: int) -> Arm:
    """Return an arm that differs in its number of optimizer steps alone; schedules stretch with it.

    Raises:
        ConfigError: Its stages do not fit into so few steps.
    """
    overrides = {**arm.overrides, "curriculum.num_steps": num_steps}
    return plan_arm(config, f"{arm.name}-{num_steps}-steps", overrides, num_rows)


def scoring_fingerprint(config: Config) -> str:
    """Return a digest of what rows, models, signals and teacher caches depend on; arms that agree share them all."""
    difficulty = config.difficulty
    chosen = choose_signals(difficulty)
    sections = {"data", "tokenizer", "other_teachers", "seed"}
    return fingerprint(
        [
            config.model_dump(mode="json", include=sections),
            config.teacher.model_dump(mode="json", exclude={"weight", "stages", "sharded", "sft"}),
            config.student.model_dump(mode="json", exclude={"gradient_checkpointing", "sft"}),
            [sft_dependencies(config, "teacher"), sft_dependencies(config, "student")],
            difficulty.model_dump(mode="json", include={"generation", "shard_rows", "columns"}),
            [*chosen.plugins, *chosen.origins],
            config.distill.model_dump(mode="json", include={"teacher_cache", "cache_dtype", "top_k"}),
        ]
    )


def by_scoring(config: Config, arms: Mapping[str, Arm]) -> dict[str, list[str]]:
    """Group arms by their scoring.

    Returns:
        Name of the run directory -> arms that start from what lies there. Arms that need no other scoring than the
        config's own are under its name, those of another one under `<name>--<first of these arms>`.
    """
    own = scoring_fingerprint(config)
    names: dict[str, str] = {own: config.name}
    groups: dict[str, list[str]] = {}
    for arm in arms.values():
        directory = names.setdefault(arm.scoring, f"{config.name}--{arm.name}")
        groups.setdefault(directory, []).append(arm.name)
    return groups


def notes(config: Config, arms: Mapping[str, Arm]) -> list[str]:
    """Return notes for a reader of the comparison: arms with another scoring, or another number of steps."""
    assert config.experiment is not None
    baseline, found = arms[config.experiment.baseline], []
    for directory, names in by_scoring(config, arms).items():
        if directory != config.name:
            found.append(f"{_listed(names)}: needs another scoring, which is made in {directory}")
    if config.experiment.student == "by_seed":
        found.append(
            "each seed has a student of its own, which all arms start from and which scores the rows: in "
            f"{config.name}--seed-{config.experiment.seeds[0]} and so on"
        )
    others = {name: arm.num_steps for name, arm in arms.items() if arm.num_steps != baseline.num_steps}
    if others:
        shown = ", ".join(f"{name} {steps:,}" for name, steps in others.items())
        found.append(
            f"arms differ in optimizer steps: {baseline.name} {baseline.num_steps:,}, {shown}; for these the first "
            "comparison is not at equal steps (curriculum.num_steps makes them equal)"
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _flat(overrides: Mapping[str, Any], above: str = "") -> list[str]:
    """Every dotted key of a mapping that may be dotted, nested, or both."""
    keys: list[str] = []
    for key, value in overrides.items():
        own = f"{above}{key}"
        keys.append(own)
        if isinstance(value, Mapping):
            keys += _flat(value, f"{own}.")
    return keys
