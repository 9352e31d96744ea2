"""The board: a small actor through which the training workers tell the driver how far they are.

Ray Train's controller tells it who it is and what it holds, so that a run can be ended from outside. Its process starts
with every run, so it imports next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from pocl_ray.errors import UserError


@dataclass
class TrainingStatus:
    """What the board shows.

    Attributes:
        num_steps: Optimizer steps of the whole run; None before the workers stand.
        first_step: Step at which this start went on.
        step: Steps done.
        num_tokens: Response tokens trained on.
        train: The last training record.
        evaluations: The dev figures so far, those of an earlier start included.
        refusal: The user's mistake that ended the run.
        num_starts: How often the workers began; more than once after a failure.
        failures: Why the workers failed, each time.
        warnings: What the user should know of, each once.
        is_finished: Whether the result is written.
        node: Ray's id of the node of the first worker.
        num_looks: How often Ray Train's controller has looked at its workers.
    """

    num_steps: int | None = None
    first_step: int = 0
    step: int = 0
    num_tokens: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    refusal: UserError | None = None
    num_starts: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_finished: bool = False
    node: str = ""
    num_looks: int = 0


@ray.remote(num_cpus=0)
class ProgressActor:
    """Holds the training status of one training run."""

    def __init__(self) -> None:
        self.training_status = TrainingStatus()
        self.controller: Any = None
        self.group: PlacementGroup | None = None

    def begin(self, num_steps: int, first_step: int, evaluations: list[dict[str, Any]], node: str = "") -> None:
        """Workers stand, the first on `node`, and start at `first_step`, before which there were these evaluations."""
        self.training_status.node = node
        self.training_status.num_steps, self.training_status.first_step, self.training_status.step = (
            num_steps,
            first_step,
            first_step,
        )
        self.training_status.num_starts += 1
        self.training_status.evaluations = list(evaluations)

    def show(self, step: int, num_tokens: int, record: dict[str, Any]) -> None:
        """A record was logged."""
        self.training_status.step, self.training_status.num_tokens = step, num_tokens
        if "train/loss" in record:
            self.training_status.train = record
        else:
            self.training_status.evaluations.append(record)

    def finish(self, step: int, num_tokens: int) -> None:
        """The result is written."""
        self.training_status.step, self.training_status.num_tokens, self.training_status.is_finished = (
            step,
            num_tokens,
            True,
        )

    def refuse(self, error: UserError) -> None:
        """A worker met a user's mistake."""
        self.training_status.refusal = error

    def warn(self, text: str) -> None:
        """The user should know of something that the run goes on in spite of."""
        if text not in self.training_status.warnings:
            self.training_status.warnings.append(text)

    def fail(self, cause: str, goes_on: bool) -> None:
        """The workers failed, and are started again if the run goes on."""
        self.training_status.failures.append(cause)
        if goes_on:
            self.warn(f"failure {len(self.training_status.failures)}: {cause}; going on from the last checkpoint")

    def controller_lives(self) -> None:
        """The controller looks at its workers."""
        self.training_status.num_looks += 1

    def read(self) -> TrainingStatus:
        """Return the training status."""
        return self.training_status

    def holds(self, name: str, controller: Any, group: PlacementGroup | None) -> None:
        """The controller of the run stands, and its workers in a placement group where one is given."""
        self.controller, self.group = controller, group

    def held(self) -> tuple[Any, PlacementGroup | None]:
        """Return the controller and the placement group of the workers, where they stand."""
        return self.controller, self.group
