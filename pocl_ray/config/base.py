"""The base class of all config sections: they are frozen, and only declared keys are allowed."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of the config. It is frozen. An undeclared key is an error that names the nearest declared one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


def _numeric(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a finite number is needed")
    return value


Number = Annotated[int | float, BeforeValidator(_numeric)]
"""A number that keeps the type it was written in: a parameter may be a count, which 64 is and 64.0 is not."""


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("seeds must differ from one another")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_distinct)]
"""Seeds that all differ."""
