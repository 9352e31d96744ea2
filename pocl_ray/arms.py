"""Arms: configs that differ from one config by some keys, the stages that follow from them, and which share a scoring.

An experiment compares arms over seeds; a race drops them during one run. Pure planning: nothing is started, and no row
is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocl_ray.config import Config, TrainConfig
from pocl_ray.config.experiments import dotted_keys
from pocl_ray.config.loading import with_overrides
from pocl_ray.config.race import PLAIN, RACE, RaceConfig
from pocl_ray.config.training import TrainOverrides
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.distill.loss_table import check_losses
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.fingerprints import sft_dependencies
from pocl_ray.records import Stage
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.trainings.race import RacePlan, plan_rungs

# Keys that belong to a race as a whole: arms that differed in them could not be compared, or have not one start.
SHARED_BY_RACE = {
    "name": "a run has one directory",
    "storage_path": "a run has one directory",
    "seed": "all arms start alike",
    "difficulty": "all arms start from one scoring and its ranking",
    "evaluation": "all arms are judged alike",
    "report": "a run has one report",
    "scaling": "all arms run on the same machines",
    "control": "a run has one control",
    "train.seed": "arms are compared in one order of rows",
    "train.global_batch_rows": "all arms take equal steps",
    "tune": "a race holds no search",
    "experiment": "a race holds no experiment",
}


@dataclass(frozen=True)
class Arm:
    """One of the configs that are compared.

    Attributes:
        name: Its name in the config.
        overrides: The keys that differ from the base config.
        config: Its whole config; `pocl-ray run` trains the same student with it.
        stages: Its plan.
        scoring: Fingerprint of what scores, caches and models depend on; arms that share it share them.
    """

    name: str
    overrides: Mapping[str, Any]
    config: Config
    stages: tuple[Stage, ...]
    scoring: str

    @property
    def num_steps(self) -> int:
        """Optimizer steps; the most of them where a stage ends on convergence."""
        return sum(stage.num_steps for stage in self.stages)


def make_arm(
    base: Config, place: str, name: str, overrides: Mapping[str, Any], shared: Mapping[str, str], num_rows: int
) -> Arm:
    """Return the arm that differs from a config by some keys.

    Args:
        base: The config as it is for an arm without keys.
        place: Key of the arm in the config, for messages.
        name: Its name.
        overrides: Keys, dotted or nested.
        shared: Keys that no arm may set, with the reason.
        num_rows: Training rows.

    Raises:
        ConfigError: It sets a shared key or is a race, or its values do not work together.
    """
    for key in dotted_keys(overrides):
        for common, why in shared.items():
            if key == common or key.startswith(f"{common}."):
                raise ConfigError(f"{place}: {key} cannot differ between arms, since {why}; remove it")
    try:
        own = with_overrides(base, overrides)
        # Supervised fine-tuning takes its defaults from `train`; an arm with another learning rate keeps the student.
        own = with_overrides(with_overrides(base, sft_pins(base, own.train)), overrides)
        if own.curriculum.pacing == RACE:
            raise ConfigError("curriculum.pacing race trains arms of its own; name these arms here, each by its keys")
        choose_signals(own.difficulty)
        check_losses(own.distill, own.rollout)
        return Arm(name, overrides, own, plan_stages(own, num_rows), scoring_fingerprint(own))
    except UserError as error:
        raise ConfigError(f"{place}: {error}") from None


def scoring_fingerprint(config: Config) -> str:
    """Return what rows, models, signals and teacher caches depend on: arms that agree in it share all of them."""
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


def sft_pins(base: Config, train: TrainConfig) -> dict[str, Any]:
    """Return the settings that keep supervised fine-tuning as it is in the base config.

    Args:
        base: The base config.
        train: The section of a config that differs, whose keys supervised fine-tuning would take over.
    """
    pins: dict[str, Any] = {}
    for role in ("teacher", "student"):
        sft = getattr(base, role).sft
        if sft is None:
            continue
        merged = base.sft_train(sft)
        for key in TrainOverrides.model_fields:
            if getattr(train, key) != getattr(base.train, key):
                pins[f"{role}.sft.train.{key}"] = getattr(merged, key)
    return pins


# A race.


@dataclass(frozen=True)
class Race:
    """A planned race: its arms by name, plain distillation first, and its rungs."""

    arms: dict[str, Arm]
    plan: RacePlan
    figure: str


def plan_race(config: Config, num_rows: int) -> Race:
    """Return the race of a config whose `curriculum.pacing` is `race`.

    Raises:
        ConfigError: An arm cannot be trained, takes another number of steps or another scoring than plain
            distillation, or the race has too few steps or costs too much.
    """
    race = config.curriculum.race or RaceConfig()
    without = config.curriculum.model_copy(update={"pacing": "none", "race": None})
    base = config.model_copy(update={"curriculum": without, "control": None})
    plain = make_arm(base, "curriculum", PLAIN, {}, {}, num_rows)
    arms = {PLAIN: plain}
    for name, keys in race.arms.items():
        place = f"curriculum.race.arms.{name}"
        arm = make_arm(base, place, name, keys, SHARED_BY_RACE, num_rows)
        if arm.config == plain.config:
            raise ConfigError(
                f"{place}: nothing in it differs from plain distillation, which has the keys next to it as well; give "
                "what only this arm is to have under its name alone, or leave the arm out of curriculum.race.arms"
            )
        if arm.config.curriculum.advance == "plateau":
            raise ConfigError(f"{place}: curriculum.advance plateau leaves its steps open; set it to interval")
        if arm.num_steps != plain.num_steps:
            raise ConfigError(
                f"{place}: it takes {arm.num_steps:,} optimizer steps and plain distillation {plain.num_steps:,}, and "
                "arms are compared at equal steps; give curriculum.num_steps for all, and none in the arm"
            )
        if arm.scoring != plain.scoring:
            raise ConfigError(
                f"{place}: it needs another scoring than plain distillation, since its rows, models or teacher cache "
                "differ, and a race starts from one; compare such arms with pocl-ray experiment"
            )
        arms[name] = arm
    plan = plan_rungs(len(arms), plain.num_steps, race.max_cost, race.rungs, race.confidence, race.margin)
    return Race(arms, plan, race.figure)
