"""What every section of the config shares: frozen, and no key that is not declared."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of the config. Frozen; an undeclared key is an error that names the nearest declared one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


def _numeric(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a finite number is needed")
    return value


Number = Annotated[int | float, BeforeValidator(_numeric)]
"""A number that stays what it was written as: parameters may be counts, and 64 is one where 64.0 is none."""


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("seeds must differ from one another")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_distinct)]
"""Seeds of which no two are alike."""
