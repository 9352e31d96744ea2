"""From sampled values to a training run: the config of a trial, its stages, and the fingerprint of its student."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from pocl_ray.config import Config, ControlConfig, TrainConfig
from pocl_ray.config.loading import describe
from pocl_ray.config.training import TrainOverrides
from pocl_ray.curriculum.schedule import plan_control, plan_stages
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import distill_dependencies, ranking_dependencies
from pocl_ray.records import Stage
from pocl_ray.run_directory.manifest import step_fingerprint
from pocl_ray.run_directory.storage import fingerprint
from pocl_ray.tuning.space import BUDGET_KEY, Constraint, Settings, apply_settings

Kind = Literal["trial", "control", "confirm"]


@dataclass(frozen=True)
class Candidate:
    """What a trial tries.

    Attributes:
        kind: `trial`, the plain `control`, or `confirm`: one of these again on another seed.
        number: Counted from 0 over the trials; of a confirmation, that of the trial it repeats; -1: the control.
        settings: Dotted keys and their values.
        seed: Of the order of rows and of dropout; None: the run's own.
    """

    kind: Kind
    number: int
    settings: Settings
    seed: int | None = None

    @property
    def is_control(self) -> bool:
        """Whether it is plain distillation, on whatever seed."""
        return self.number < 0

    @property
    def label(self) -> str:
        """Short name for people and directories."""
        base = "control" if self.is_control else f"trial-{self.number:03d}"
        return base if self.seed is None else f"{base}-seed-{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-like value."""
        return asdict(self)

    def again(self, seed: int) -> Candidate:
        """Return the same on another seed."""
        return replace(self, kind="confirm", seed=seed)


@dataclass(frozen=True)
class TrialOrigins:
    """Fingerprints of what all trials start from."""

    signals: str
    student: str


@dataclass(frozen=True)
class PlannedTrial:
    """A candidate that can be trained.

    Attributes:
        candidate: What is tried.
        config: Its whole config: `pocl-ray run` would do the same with it.
        stages: What is trained; of the control, its one stage.
        num_rows: Training rows.
    """

    candidate: Candidate
    config: Config
    stages: tuple[Stage, ...]
    num_rows: int

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return sum(stage.num_steps for stage in self.stages)

    @cached_property
    def num_samples(self) -> int:
        """Training rows that are consumed, each counted as often as it is used."""
        return self.num_steps * self.config.train.global_batch_rows

    def ranking_fingerprint(self, origins: TrialOrigins) -> str:
        """Return the fingerprint of the ranking that this config asks for."""
        return step_fingerprint("ranking", ranking_dependencies(self.config, origins.signals))

    def fingerprint(self, origins: TrialOrigins) -> str:
        """Return the fingerprint that the student has in the manifest of a run with this config."""
        step = "control" if self.candidate.is_control else "distill"
        depends = distill_dependencies(self.config, self.ranking_fingerprint(origins), origins.student, self.stages)
        return step_fingerprint(step, depends)

    def name(self, origins: TrialOrigins) -> str:
        """Return the trial's directory: two searches over the same run never meet in one."""
        return f"{self.candidate.label}-{self.fingerprint(origins)[:8]}"


class Planner:
    """Turns candidates into plans, or says why one cannot be trained."""

    def __init__(self, config: Config, num_rows: int) -> None:
        """Take the base config and the number of training rows.

        Raises:
            ConfigError: A constraint is no expression, or names a key that the config has not.
        """
        assert config.tune is not None
        self.config, self.tune, self.num_rows = config, config.tune, num_rows
        self.constraints = [Constraint(text) for text in config.tune.constraints]

    def plan(self, candidate: Candidate) -> PlannedTrial:
        """Return the candidate's config and stages.

        Raises:
            UserError: The values do not fit together, break a constraint, or do not fit the budget or the rows.
        """
        settings = dict(candidate.settings)
        if candidate.seed is not None:
            settings["train.seed"] = candidate.seed
        try:
            config = apply_settings(self.config, settings)
            config = apply_settings(config, {**self._budget(config.train), **self._pins(config.train)})
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
        """Return plain distillation for the budget, or for as long as the base config's curriculum takes."""
        num_steps = config.curriculum.num_steps  # the base curriculum need not fit into the budget: it is not trained
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

    def _pins(self, train: TrainConfig) -> Settings:
        """Keep supervised fine-tuning as it is in the base config, where the trial changes keys that it shares."""
        pins: Settings = {}
        for role in ("teacher", "student"):
            sft = getattr(self.config, role).sft
            if sft is None:
                continue
            base = self.config.sft_train(sft)
            for key in TrainOverrides.model_fields:
                if getattr(train, key) != getattr(self.config.train, key):
                    pins[f"{role}.sft.train.{key}"] = getattr(base, key)
        return pins


def search_fingerprint(config: Config, origins: TrialOrigins) -> str:
    """Return what the search depends on: another space or scheduler is another search over the same rows."""
    assert config.tune is not None
    tune = config.tune.model_dump(mode="json", exclude={"max_concurrent", "confirm"})
    shared = {"curriculum", "distill", "train", "difficulty", "evaluation", "control", "seed", "other_teachers"}
    return fingerprint([tune, config.model_dump(mode="json", include=shared), asdict(origins)])
