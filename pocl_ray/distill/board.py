"""The board: a small actor through which the training workers tell the driver how far they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray

from pocl_ray.errors import UserError


@dataclass
class Standing:
    """What the board shows.

    Attributes:
        num_steps: Optimizer steps of the whole run; None before the workers stand.
        first_step: Step at which this start went on.
        step: Steps done.
        num_tokens: Response tokens trained on.
        train: The last training record.
        evaluation: The last dev figures.
        refusal: The user's mistake that ended the run.
        num_starts: How often the workers began; more than once after a failure.
        warnings: What the user should know of, each once.
    """

    num_steps: int | None = None
    first_step: int = 0
    step: int = 0
    num_tokens: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    refusal: UserError | None = None
    num_starts: int = 0
    warnings: list[str] = field(default_factory=list)


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the standing of one training run."""

    def __init__(self) -> None:
        self.standing = Standing()

    def begin(self, num_steps: int, first_step: int) -> None:
        """Workers stand and start at `first_step`."""
        self.standing.num_steps, self.standing.first_step, self.standing.step = num_steps, first_step, first_step
        self.standing.num_starts += 1

    def show(self, step: int, num_tokens: int, record: dict[str, Any]) -> None:
        """A record was logged."""
        self.standing.step, self.standing.num_tokens = step, num_tokens
        if "train/loss" in record:
            self.standing.train = record
        else:
            self.standing.evaluation = record

    def finish(self, step: int, num_tokens: int) -> None:
        """The result is written."""
        self.standing.step, self.standing.num_tokens = step, num_tokens

    def refuse(self, error: UserError) -> None:
        """A worker met a user's mistake."""
        self.standing.refusal = error

    def warn(self, text: str) -> None:
        """The user should know of something that the run goes on in spite of."""
        if text not in self.standing.warnings:
            self.standing.warnings.append(text)

    def read(self) -> Standing:
        """Return the standing."""
        return self.standing
