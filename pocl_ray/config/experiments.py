"""Config of `pocl-ray experiment`: which arms are compared, on which seeds, and which are judged on test rows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pocl_ray.config.base import Section, Seeds

ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def dotted_keys(overrides: Mapping[str, Any], above: str = "") -> list[str]:
    """Return every dotted key of a mapping that may be dotted, nested, or both."""
    keys: list[str] = []
    for key, value in overrides.items():
        own = f"{above}{key}"
        keys.append(own)
        if isinstance(value, Mapping):
            keys += dotted_keys(value, f"{own}.")
    return keys


class ScreenConfig(Section):
    """A first look at all arms on the dev rows, which chooses those that are judged on the test rows."""

    seeds: Seeds = Field(min_length=1, description="training seeds; none of them is used again on the test rows")
    keep: int | None = Field(
        default=None, ge=1, description="arms that go on, the baseline not counted; null: all that are not skipped"
    )
    metric: Literal["rouge_l", "sampled_rouge_l", "exact_match", "ce_loss", "kl"] = Field(
        default="rouge_l", description="dev figure that chooses them, of the student at the end of its training"
    )


class ExperimentConfig(Section):
    """A paired comparison: every arm is trained on every seed, and all arms of a seed start from the same student."""

    arms: dict[str, dict[str, Any]] = Field(
        description="name -> keys that differ from the config, dotted or nested; {}: the config as it is"
    )
    baseline: str = Field(default="plain", description="arm that the others are compared with")
    seeds: Seeds = Field(description="training seeds on which arms are judged on the test rows; at least 2")
    student: Literal["shared", "by_seed"] = Field(
        default="shared",
        description="shared: one student for all seeds; by_seed: each seed makes or fine-tunes its own and scores the "
        "rows with it, so that intervals speak of other students as well",
    )
    screen: ScreenConfig | None = Field(default=None, description="choose the arms on dev rows first; null: judge all")
    equal_flops: bool = Field(
        default=True,
        description="also train the baseline for as many steps as an arm's FLOPs pay for, scoring and refreshing "
        "counted, and compare with that",
    )
    record_dev_rows: bool = Field(
        default=False,
        description="also measure the losses of every dev row at each tenth of a training, for "
        "benchmarks/race_regret.py; two forward passes over the dev rows each time",
    )
    max_concurrent: int | None = Field(
        default=None, ge=1, description="trainings at once; null: as many as the cluster has room for"
    )

    @field_validator("arms")
    @classmethod
    def _names(cls, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if len(arms) < 2:
            raise ValueError("a comparison needs at least two arms, the baseline among them")
        for name in arms:
            if not ARM_NAME.fullmatch(name):
                raise ValueError(f"arm {name!r}: names hold letters, digits, '.', '_' and '-'")
        return arms

    @model_validator(mode="after")
    def _fits_together(self) -> ExperimentConfig:
        if self.baseline not in self.arms:
            near = difflib.get_close_matches(self.baseline, self.arms, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the arms are {', '.join(self.arms)}"
            raise ValueError(f"baseline {self.baseline!r} is none of the arms; {hint}")
        if len(self.seeds) < 2:
            raise ValueError("one seed gives no interval; give seeds at least 2, better 8")
        if self.screen is not None:
            shared = sorted({*self.seeds} & {*self.screen.seeds})
            if shared:
                raise ValueError(
                    f"seed {shared[0]} stands in screen.seeds as well, so its test figures would be of arms that were "
                    "chosen by it; give screening other seeds"
                )
            if self.screen.keep is not None and self.screen.keep >= len(self.arms):
                raise ValueError(
                    f"screen.keep is {self.screen.keep}, and there are {len(self.arms) - 1} arms besides the baseline; "
                    "lower it, or remove screen"
                )
        return self
