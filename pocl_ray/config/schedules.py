"""Config of a value that moves over the run, by stage or by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pocl_ray.config.base import Section, numeric


class ScheduleConfig(Section):
    """A value that moves, up or down, from `start` to `end` or through `values`.

    In YAML a number stands for a constant and a list for `values`.
    """

    shape: Literal["linear", "cosine", "constant", "list"] = "linear"
    by: Literal["stage", "step"] = Field(
        default="stage", description="stage: one value a stage; step: moving over the optimizer steps of the whole run"
    )
    start: float | None = None
    end: float | None = None
    values: tuple[float, ...] | None = Field(
        default=None, min_length=1, description="one value for each stage; by step: points, evenly spaced over the run"
    )
    decimals: int | None = Field(
        default=2,
        ge=0,
        le=9,
        description="decimal places of a stage's value: the paper rounds to two; null: no rounding",
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            return {"shape": "constant", "start": data, "end": data, "decimals": None}
        if isinstance(data, str) or (isinstance(data, (list, tuple)) and not data):
            raise ValueError("a schedule is a number, a list of one number a stage, or {start: ..., end: ...}")
        if isinstance(data, (list, tuple)):
            return {"shape": "list", "values": data, "decimals": None}
        if isinstance(data, dict) and "values" in data and "shape" not in data:
            return {**data, "shape": "list"}
        return data

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if self.shape == "list":
            if self.values is None or self.start is not None or self.end is not None:
                raise ValueError("a list schedule takes values, and neither start nor end")
        elif self.start is None or self.values is not None:
            raise ValueError(f"a {self.shape} schedule takes start and end, and no values")
        elif self.shape == "constant":
            if self.end not in (None, self.start):
                raise ValueError("a constant schedule takes one value; for a ramp set shape to linear")
        elif self.end is None:
            raise ValueError(f"a {self.shape} schedule takes start and end")
        return self

    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest value that the schedule can take, rounded as the stages' values are."""
        return min(self.numbers), max(self.numbers)

    @property
    def last(self) -> float:
        """The value that the schedule ends at."""
        return self.numbers[-1]

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values that are written in the config, rounded as the stages' values are."""
        numbers = self.values or tuple(x for x in (self.start, self.end) if x is not None)
        if self.values is None and self.decimals is not None and self.by == "stage":
            numbers = tuple(round(x, self.decimals) for x in numbers)
        return numbers


def _loss_arg(given: Any) -> Any:
    """Return a parameter of a loss as a number, or as a schedule if it moves; a constant stays a number."""
    if not isinstance(given, (Mapping, list, tuple, ScheduleConfig)):
        return numeric(given)
    schedule = ScheduleConfig.model_validate(given)
    return schedule.start if schedule.shape == "constant" else schedule


LossArg = Annotated[int | float | ScheduleConfig, BeforeValidator(_loss_arg)]
"""A parameter of a loss: a number, or a schedule as `curriculum.kd_temperature` has it."""
