"""Config of `pocl-ray tune`: search space, search algorithm, budget, and confirmation of the winner."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pocl_ray.config.base import Section, Seeds

# The metrics that a trial reports at each dev evaluation, and whether higher is better.
METRIC_MODES: dict[str, Literal["max", "min"]] = {
    "rouge_l": "max",
    "exact_match": "max",
    "ce_loss": "min",
    "kd_loss": "min",
    "num_steps": "min",
    "num_samples": "min",
    "num_tokens": "min",
    "seconds": "min",
}


class DomainConfig(Section):
    """The values of one key: exactly one of these forms."""

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1, description="one of these values, of any type")
    grid: tuple[Any, ...] | None = Field(
        default=None, min_length=1, description="one of these values; grid search takes each"
    )
    uniform: tuple[float, float] | None = Field(default=None, description="[low, high]")
    loguniform: tuple[float, float] | None = Field(default=None, description="[low, high], uniform in the logarithm")
    quniform: tuple[float, float, float] | None = Field(default=None, description="[low, high, step]")
    randint: tuple[int, int] | None = Field(default=None, description="[low, high], both included")

    @model_validator(mode="after")
    def _one_form(self) -> DomainConfig:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        form, value = next(iter(given.items()))
        if form in ("choice", "grid"):
            return self
        if value[0] >= value[1]:
            raise ValueError(f"{form} goes from low to high, so the first number must be the smaller one")
        if form == "loguniform" and value[0] <= 0:
            raise ValueError("loguniform starts above 0")
        if form == "quniform" and not 0 < value[2] <= value[1] - value[0]:
            raise ValueError("the step of quniform lies between 0 and high - low")
        return self


class ObjectiveConfig(Section):
    """A metric to optimise; in YAML the name of a metric is enough."""

    metric: str = Field(description=f"one of {', '.join(METRIC_MODES)}")
    mode: Literal["max", "min"] | None = Field(default=None, description="null: max for scores, min for all else")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return {"metric": data} if isinstance(data, str) else data

    @field_validator("metric")
    @classmethod
    def _reported(cls, metric: str) -> str:
        metric = metric.removeprefix("eval/dev/")
        if metric not in METRIC_MODES:
            raise ValueError(f"{metric!r} is never reported; there are {', '.join(METRIC_MODES)}")
        return metric

    @property
    def sign(self) -> int:
        """Return 1 if higher is better, else -1."""
        return 1 if (self.mode or METRIC_MODES[self.metric]) == "max" else -1


class SchedulerConfig(Section):
    """Early stopping of trials; time is counted in training samples."""

    type: str = Field(default="asha", description="asha, median or none")
    grace_samples: int | None = Field(
        default=None,
        ge=1,
        description="no trial is stopped before this time; null: a quarter of the budget, or of the base plan",
    )
    reduction_factor: float = Field(
        default=3.0, gt=1, description="for asha: one trial in so many goes on at each rung"
    )
    min_trials: int = Field(
        default=3, ge=1, description="for median: minimum number of trials that a median is taken over"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return {"type": data} if isinstance(data, str) else data

    @field_validator("type")
    @classmethod
    def _works_with_train(cls, name: str) -> str:
        if name in ("pbt", "pb2", "population_based_training", "pbt_replay"):
            raise ValueError(
                f"{name} moves checkpoints between trials, which Ray Train keeps to itself; use asha, median or none"
            )
        if name not in ("asha", "median", "none"):
            raise ValueError("use asha, median or none")
        return name


class BudgetConfig(Section):
    """The length of every trial: its last stage takes what the others leave."""

    steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    samples: int | None = Field(default=None, ge=1, description="training rows, each counted as often as it is used")

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetConfig:
        if (self.steps is None) == (self.samples is None):
            raise ValueError("give exactly one of steps and samples")
        return self


class ConfirmConfig(Section):
    """The best trials are repeated on new seeds before one of them is called the winner."""

    top_k: int = Field(default=2, ge=1, description="number of best trials that are repeated")
    seeds: Seeds = Field(
        default=(101, 102), min_length=1, description="seeds; each of these trials is repeated on each seed"
    )


class TuneConfig(Section):
    """A search over the curriculum. All trials share rows, scores, ranking and teacher cache."""

    space: dict[str, DomainConfig] = Field(description="dotted key of this config -> its values")
    constraints: tuple[str, ...] = Field(
        default=(),
        description="conditions that a trial must meet, such as `curriculum.interval_epochs * curriculum.num_buckets "
        "<= 12`",
    )
    num_trials: int | None = Field(default=None, ge=1, description="null: all points of a grid, else 16")
    algorithm: Literal["random", "grid", "optuna"] = Field(
        default="optuna", description="random draws, every point of a grid, or Optuna's TPE"
    )
    objectives: tuple[ObjectiveConfig, ...] = Field(
        default=(ObjectiveConfig(metric="rouge_l"),), min_length=1, description="the first one names the winner"
    )
    scheduler: SchedulerConfig = Field(default=SchedulerConfig(), description="which trials are stopped early")
    budget: BudgetConfig | None = Field(default=None, description="null: a trial is as long as its own plan")
    control: bool = Field(default=True, description="also train plain distillation with the same number of steps")
    confirm: ConfirmConfig | None = Field(
        default=ConfirmConfig(), description="repeat the best on new seeds; null: the best single run wins"
    )
    max_concurrent: int | None = Field(default=None, ge=1, description="null: as many as the cluster has room for")

    @field_validator("space")
    @classmethod
    def _not_empty(cls, space: dict[str, DomainConfig]) -> dict[str, DomainConfig]:
        if not space:
            raise ValueError(
                "is empty, so there is nothing to search; give keys such as curriculum.num_buckets: {choice: [2, 4, 8]}"
            )
        return space

    @field_validator("objectives", mode="before")
    @classmethod
    def _single(cls, data: Any) -> Any:
        return [data] if isinstance(data, (str, dict)) else data

    @model_validator(mode="after")
    def _fits_together(self) -> TuneConfig:
        names = [objective.metric for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError("objectives must differ from one another")
        if self.algorithm == "grid":
            for key, domain in self.space.items():
                if domain.choice is None and domain.grid is None:
                    raise ValueError(f"space.{key}: grid search needs values one by one: give grid or choice")
        return self
