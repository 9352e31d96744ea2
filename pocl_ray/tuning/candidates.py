"""A trial as a plan: its config, its stages, and the fingerprint of its student, from sampled values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from pocl_ray.arms import sft_pins
from pocl_ray.config import Config, ControlConfig, TrainConfig
from pocl_ray.config.loading import describe
from pocl_ray.curriculum.schedule import plan_control, plan_stages
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import distill_dependencies, ranking_dependencies
from pocl_ray.records import Stage
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.manifest import step_fingerprint
from pocl_ray.tuning.space import BUDGET_KEY, Constraint, Settings, apply_settings

Kind = Literal["trial", "control", "confirm"]


@dataclass(frozen=True)
class Candidate:
    """The settings that a trial tries.

    Attributes:
        kind: Kind of run: `trial`, the plain `control`, or `confirm`, a repetition of one of these on another seed.
        number: Number of the trial, from 0. A confirmation has the number of the trial that it repeats, the control has
            -1.
        settings: Dotted keys and their values.
        seed: Seed of the order of rows and of dropout; None: the run's seed.
    """

    kind: Kind
    number: int
    settings: Settings
    seed: int | None = None

    @property
    def is_control(self) -> bool:
        """Return whether it is plain distillation, on any seed."""
        return self.number < 0

    @property
    def label(self) -> str:
        """The short name, for people and directories."""
        base = "control" if self.is_control else f"trial-{self.number:03d}"
        return base if self.seed is None else f"{base}-seed-{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Return the candidate as a JSON-like value."""
        return asdict(self)

    def again(self, seed: int) -> Candidate:
        """Return the same candidate on another seed."""
        return replace(self, kind="confirm", seed=seed)


@dataclass(frozen=True)
class TrialOrigins:
    """The fingerprints of the data and models that all trials start from."""

    signals: str
    student: str


@dataclass(frozen=True)
class PlannedTrial:
    """A candidate with the plan of its training.

    Attributes:
        candidate: Candidate that is trained.
        config: Complete config, with which `pocl-ray run` would do the same.
        stages: Stages of the training; the control has one.
        num_rows: Number of training rows.
    """

    candidate: Candidate
    config: Config
    stages: tuple[Stage, ...]
    num_rows: int

    @cached_property
    def num_steps(self) -> int:
        """The number of optimizer steps."""
        return sum(stage.num_steps for stage in self.stages)

    @cached_property
    def num_samples(self) -> int:
        """The number of training rows that are consumed, each counted as often as it is used."""
        return self.num_steps * self.config.train.global_batch_rows

    def ranking_fingerprint(self, origins: TrialOrigins) -> str:
        """Return the fingerprint of this config's ranking."""
        return step_fingerprint("ranking", ranking_dependencies(self.config, origins.signals))

    def fingerprint(self, origins: TrialOrigins) -> str:
        """Return the fingerprint that the student would have in the manifest of a run with this config."""
        step = "control" if self.candidate.is_control else "distill"
        depends = distill_dependencies(self.config, self.ranking_fingerprint(origins), origins.student, self.stages)
        return step_fingerprint(step, depends)

    def name(self, origins: TrialOrigins) -> str:
        """Return the name of the trial's directory, which differs between two searches over the same run."""
        return f"{self.candidate.label}-{self.fingerprint(origins)[:8]}"


class Planner:
    """Turns candidates into plans, or raises an error that says why a candidate cannot be trained."""

    def __init__(self, config: Config, num_rows: int) -> None:
        """Take the base config and the number of training rows.

        Raises:
            ConfigError: A constraint is not an expression, or names a key that is not in the config.
        """
        assert config.tune is not None
        self.config, self.tune, self.num_rows = config, config.tune, num_rows
        self.constraints = [Constraint(text) for text in config.tune.constraints]

    def plan(self, candidate: Candidate) -> PlannedTrial:
        """Return the plan of a candidate.

        Raises:
            UserError: The values contradict each other, violate a constraint, or do not fit the budget or the rows.
        """
        settings = dict(candidate.settings)
        if candidate.seed is not None:
            settings["train.seed"] = candidate.seed
        try:
            config = apply_settings(self.config, settings)
            config = apply_settings(config, {**self._budget(config.train), **sft_pins(self.config, config.train)})
        except ValidationError as error:
            raise ConfigError(describe(error)) from None
        resolve_loss(config.distill.loss, config.distill.loss_args, config.distill.scale_by_t_squared)
        if candidate.is_control:
            return PlannedTrial(candidate, config, self._control_stages(config), self.num_rows)
        tree = config.model_dump(mode="json")
        for constraint in self.constraints:
            if not constraint.holds(tree):
                raise ConfigError(f"tune.constraints: {constraint.text} does not hold")
        return PlannedTrial(candidate, config, plan_stages(config, self.num_rows), self.num_rows)

    def _control_stages(self, config: Config) -> tuple[Stage, ...]:
        """The stage of plain distillation, as long as the budget or as the base config's curriculum."""
        num_steps = (
            config.curriculum.num_steps
        )  # the base curriculum is not trained, so it need not fit into the budget
        if self.tune.budget is None or num_steps is None:
            num_steps = sum(stage.num_steps for stage in plan_stages(config, self.num_rows))
        with_control = config.model_copy(update={"control": config.control or ControlConfig()})
        return plan_control(with_control, self.num_rows, num_steps)

    def _budget(self, train: TrainConfig) -> Settings:
        budget = self.tune.budget
        if budget is None:
            return {}
        if budget.steps is not None:
            return {BUDGET_KEY: budget.steps}
        assert budget.samples is not None
        if budget.samples < train.global_batch_rows:
            raise ConfigError(
                f"tune.budget.samples: {budget.samples} rows are less than a global batch of {train.global_batch_rows}"
            )
        return {BUDGET_KEY: budget.samples // train.global_batch_rows}


def search_fingerprint(config: Config, origins: TrialOrigins) -> str:
    """Return the fingerprint of a search: another space or scheduler is another search over the same rows."""
    assert config.tune is not None
    tune = config.tune.model_dump(mode="json", exclude={"max_concurrent", "confirm"})
    shared = {"curriculum", "distill", "train", "difficulty", "evaluation", "control", "seed", "other_teachers"}
    tree = config.model_dump(mode="json", include=shared)
    del tree["curriculum"]["race"]  # no part of a search
    return fingerprint([tune, tree, asdict(origins)])
