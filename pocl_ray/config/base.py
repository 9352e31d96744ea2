"""The base class of all config sections: they are frozen, and only declared keys are allowed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Larger numbers overflow in the libraries that receive them, and loops over them do not end. A field whose values make
# sense in a narrower range says so itself.
MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_FLOAT = 1e9  # of seconds, three decades


class Section(BaseModel):
    """A part of the config. It is frozen. An undeclared key is an error that names the nearest declared one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        for name in type(self).model_fields:
            for number in _numbers(getattr(self, name)):
                largest = MAX_FLOAT if isinstance(number, float) else MAX_SEED if "seed" in name else MAX_INT
                if abs(number) > largest:
                    raise ValueError(f"{name} is {number:.3g}, and no number here is larger than {largest:.3g}")
        return self


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers of a field's value; sections within it check their own."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)


def numeric(value: Any) -> int | float:
    """Return a value that is a finite number, of the type it was written in.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a finite number is needed")
    return value


Number = Annotated[int | float, BeforeValidator(numeric)]
"""A number that keeps the type it was written in: a parameter may be a count, which 64 is and 64.0 is not."""


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("seeds must differ from one another")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_distinct)]
"""Seeds that all differ."""


def _token_budget(given: Any) -> Any:
    """Check a token budget here, so that a mistake is one line and not one for each kind of value."""
    is_whole = isinstance(given, (int, float)) and not isinstance(given, bool) and given % 1 == 0
    if given != "auto" and not (is_whole and given >= 1):
        raise ValueError("a whole number of tokens, 1 or more, or auto")
    return given if given == "auto" else int(given)


TokenBudget = Annotated[int | Literal["auto"], BeforeValidator(_token_budget)]
"""The tokens of a forward pass, or `auto`: as many as a GPU holds."""
