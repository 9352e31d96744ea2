"""The progress actor: a small actor through which the training workers report their status to the driver.

Ray Train's controller reports itself and its resources, so that a run can be ended from outside. The actor's process
starts with every run, so it imports almost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from pocl_ray.errors import DivergedError, UserError


@dataclass
class TrainingStatus:
    """The status of a training run.

    Attributes:
        num_steps: Number of optimizer steps of the whole run; None before the workers have started.
        first_step: Step from which this start continued.
        earlier_steps: Steps that were done before the first start of this run, by an earlier one or in a race.
        earlier_tokens: Response tokens of those steps.
        step: Number of steps done.
        num_tokens: Number of response tokens trained on.
        train: Last training record.
        evaluations: Dev figures so far, including those of an earlier start.
        refusal: Mistake of the user, or loss that is not finite, that ended the run.
        num_starts: Number of starts of the workers; more than 1 after a failure.
        failures: Reason of each failure of the workers.
        warnings: Warnings for the user, each once.
        is_finished: Whether the result is written.
        node: Ray's id of the node of the first worker.
        num_looks: Number of times that Ray Train's controller has polled its workers.
        seconds: Wall time of the run, once it has ended.
    """

    num_steps: int | None = None
    first_step: int = 0
    earlier_steps: int = 0
    earlier_tokens: int = 0
    step: int = 0
    num_tokens: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    refusal: UserError | DivergedError | None = None
    num_starts: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    is_finished: bool = False
    node: str = ""
    num_looks: int = 0
    seconds: float = 0.0


@ray.remote(num_cpus=0)
class ProgressActor:
    """Holds the training status of one training run."""

    def __init__(self) -> None:
        self.training_status = TrainingStatus()
        self.controller: Any = None
        self.group: PlacementGroup | None = None

    def begin(
        self, num_steps: int, first_step: int, evaluations: list[dict[str, Any]], node: str = "", num_tokens: int = 0
    ) -> None:
        """Record that workers have started, the first on `node`, at `first_step` and after so many tokens."""
        if self.training_status.num_starts == 0:
            self.training_status.earlier_steps, self.training_status.earlier_tokens = first_step, num_tokens
        self.training_status.node = node
        self.training_status.num_steps, self.training_status.first_step, self.training_status.step = (
            num_steps,
            first_step,
            first_step,
        )
        self.training_status.num_starts += 1
        self.training_status.evaluations = list(evaluations)

    def show(self, step: int, num_tokens: int, record: dict[str, Any]) -> None:
        """Show a logged record."""
        self.training_status.step, self.training_status.num_tokens = step, num_tokens
        if "train/loss" in record:
            self.training_status.train = record
        else:
            self.training_status.evaluations.append(record)

    def finish(self, step: int, num_tokens: int) -> None:
        """Record that the result is written."""
        self.training_status.step, self.training_status.num_tokens, self.training_status.is_finished = (
            step,
            num_tokens,
            True,
        )

    def refuse(self, error: UserError | DivergedError) -> None:
        """Record an error that another try would not change."""
        self.training_status.refusal = error

    def warn(self, text: str) -> None:
        """Record a warning for the user; the run goes on."""
        if text not in self.training_status.warnings:
            self.training_status.warnings.append(text)

    def fail(self, cause: str, goes_on: bool) -> None:
        """Record a failure of the workers, which are started again if the run goes on."""
        self.training_status.failures.append(cause)
        if goes_on:
            self.warn(f"failure {len(self.training_status.failures)}: {cause}; going on from the last checkpoint")

    def controller_lives(self) -> None:
        """Record that the controller has polled its workers."""
        self.training_status.num_looks += 1

    def read(self) -> TrainingStatus:
        """Return the training status."""
        return self.training_status

    def holds(self, name: str, controller: Any, group: PlacementGroup | None) -> None:
        """Record the controller of the run, and the placement group of its workers if one is given."""
        self.controller, self.group = controller, group

    def held(self) -> tuple[Any, PlacementGroup | None]:
        """Return the controller and the placement group of the workers; None for what does not exist."""
        return self.controller, self.group
