"""Failures of a training run: which are tried again, and what the user is told of each and of the last one.

A worker's failure is charged to `scaling.max_failures`. A start that fails because workers or nodes die meanwhile is
charged to a budget of its own, which is whole again once workers have stood: a long run may lose many nodes, one after
another. Both are finite, so that what fails at every try ends, with its cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    ReschedulingState,
    RestartingState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from pocl_ray.errors import GaveUpError, StalledError, UserError
from pocl_ray.ray_cluster.ray_errors import died_of, one_line

# What a worker meets in a collective whose other end is gone: a consequence, never the cause.
_COLLATERAL = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


class TryAgain(DefaultFailurePolicy):
    """Decides in Ray Train's controller whether a failed run is tried again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Charge a failure to its budget, and decide."""
        if not isinstance(training_failed_error, ControllerError):
            self._controller_failures = 0  # workers stood, so the starts before this one came to something
        decision: FailureDecision = super().make_decision(training_failed_error)
        return decision

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        """Whether trying again may help; Ray's own policy gives up where a worker dies amid the start of others."""
        if isinstance(training_failed_error, ControllerError):
            failure = training_failed_error.controller_failure
            if isinstance(failure, RayError) and not isinstance(failure, UserError):
                return True
        return bool(super()._is_retryable_error(training_failed_error))


class TellFailures(ControllerCallback):
    """Tells the driver's board of each failure; runs in the controller."""

    def __init__(self, board: Any) -> None:
        """Take the ProgressBoard."""
        self.board = board

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Tell it what ended the workers, and whether the run goes on."""
        if isinstance(current_state, (RestartingState, ReschedulingState)):
            self.board.fail.remote(cause_of(current_state.training_failed_error), goes_on=True)
        elif isinstance(current_state, ShuttingDownState) and isinstance(current_state.next_state, ErroredState):
            self.board.fail.remote(cause_of(current_state.next_state.training_failed_error), goes_on=False)


def cause_of(error: BaseException) -> str:
    """Return why a run failed, as one line: the first cause where several workers report consequences of it too."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        if hung := next((each for each in error.worker_failures.values() if isinstance(each, StalledError)), None):
            return str(hung)  # it names the workers, and where they stand
        rank, failure = min(error.worker_failures.items(), key=lambda item: (_is_consequence(item[1]), item[0]))
        return f"worker {rank} {_said(failure)}"
    if isinstance(error, ControllerError):
        return f"the workers did not start: {_said(error.controller_failure)}"
    return f"the run {_said(error)}"


def give_up(name: str, error: BaseException, failures: Sequence[str]) -> GaveUpError:
    """Return what the user is told at the end.

    Args:
        name: Of the training run.
        error: What Ray Train raised last.
        failures: The causes of all failures, as far as the board was told.
    """
    count = max(1, len(failures))
    tries = "1 try" if count == 1 else f"{count} tries"
    budget = ", as scaling.max_failures says" if isinstance(error, WorkerGroupError) else ""
    which = "" if count == 1 else "the last time "
    return GaveUpError(
        f"{name}: gave up after {tries}{budget}; {which}{cause_of(error)}; the same command goes on from the last "
        "checkpoint"
    )


def _said(failure: BaseException) -> str:
    if isinstance(failure, WorkerHealthCheckFailedError):
        failure = failure.health_check_failure
    if isinstance(failure, RayActorError):
        return f"died: {died_of(failure)}"
    return f"failed: {one_line(f'{type(failure).__name__}: {failure}')}"


def _is_consequence(failure: BaseException) -> bool:
    return not isinstance(failure, WorkerHealthCheckFailedError) and any(sign in str(failure) for sign in _COLLATERAL)
