"""The arms of an experiment, and which of them can share a scoring. Pure planning: no row is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocl_ray.arms import Arm, make_arm, scoring_fingerprint
from pocl_ray.config import Config
from pocl_ray.errors import ConfigError

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
    base = config.model_copy(update={"experiment": None, "tune": None, "control": None})
    made = make_arm(base, f"experiment.arms.{name}", name, overrides, COMMON, num_rows)
    if config.experiment is not None and config.experiment.student == "by_seed":
        _check_seeds_differ(name, made.config)
    return made


def _check_seeds_differ(name: str, config: Config) -> None:
    student = config.student
    if student.architecture is None and student.sft is None:
        raise ConfigError(
            f"experiment.arms.{name}: experiment.student by_seed: the student is neither made nor fine-tuned here, so "
            "all seeds would start from the same one; give student.sft, or set experiment.student to shared"
        )


def with_steps(config: Config, arm: Arm, num_steps: int, num_rows: int) -> Arm:
    """Return an arm that differs in its number of optimizer steps alone; schedules stretch with it.

    Raises:
        ConfigError: Its stages do not fit into so few steps.
    """
    overrides = {**arm.overrides, "curriculum.num_steps": num_steps}
    return plan_arm(config, f"{arm.name}-{num_steps}-steps", overrides, num_rows)


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
