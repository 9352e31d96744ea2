"""Config of pacing `race`: which curricula run against plain distillation, and what that may cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator

from pocl_ray.config.base import Section
from pocl_ray.config.experiments import ARM_NAME, dotted_keys

RACE = "race"
PLAIN = "plain"
"""The arm of plain distillation, which every race has."""

RAMP = {"start": 1.0, "end": 2.0, "by": "step"}
DEFAULT_ARMS: dict[str, dict[str, Any]] = {
    "frontier": {"curriculum.pacing": "frontier", "curriculum.kd_temperature": RAMP},
    "temperature": {"curriculum.kd_temperature": RAMP},
}


class RaceConfig(Section):
    """Pacing `race`: plain distillation and some curricula are trained from one start, and losers are dropped early."""

    arms: dict[str, dict[str, Any]] = Field(
        default=DEFAULT_ARMS,
        description="name -> keys that differ from the config, dotted or nested; plain distillation, the config as it "
        "is with pacing none, is always an arm",
    )
    max_cost: float = Field(
        default=1.6, gt=1, description="optimizer steps of the whole race at most, as a multiple of those of one run"
    )
    rungs: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        description="shares of the steps at which arms are compared, rising; null: equal distances, as max_cost allows",
    )
    confidence: float = Field(
        default=0.95,
        ge=0.5,
        lt=1,
        description="confidence of the whole race, shared by all its tests: 1 - confidence bounds the probability that "
        "an arm is handed out that is no better on the dev rows' population",
    )
    figure: Literal["kl", "ce_loss"] = Field(
        default="kl",
        description="dev loss that is compared, at temperature 1 whatever arms train on: KL(teacher || student), or "
        "cross-entropy on the references",
    )
    margin: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of plain's dev loss by which an arm must be ahead beyond that, since seeds differ as well",
    )

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not arms:
            raise ValueError("a race needs an arm besides plain distillation; name one, or leave arms out")
        for name, keys in arms.items():
            if name == PLAIN:
                raise ValueError(
                    f"arm {PLAIN!r} is plain distillation, which every race has; give the arm another name"
                )
            if not ARM_NAME.fullmatch(name):
                raise ValueError(f"arm {name!r}: names hold letters, digits, '.', '_' and '-'")
            if not keys:
                raise ValueError(f"arm {name!r} changes no key, so it is plain distillation; name keys, or remove it")
            if any(key == "curriculum.race" or key.startswith("curriculum.race.") for key in dotted_keys(keys)):
                raise ValueError(f"arm {name!r} holds a race of its own; name the arms of that one here")
        return arms

    @field_validator("rungs")
    @classmethod
    def _rise(cls, rungs: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if rungs is not None and not (rungs[0] > 0 and rungs[-1] <= 1 and all(a < b for a, b in pairwise(rungs))):
            raise ValueError("rungs are shares of the steps, above 0, at most 1, each above the one before")
        return rungs
