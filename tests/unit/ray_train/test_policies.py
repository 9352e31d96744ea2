"""Failures of a run: which are tried again and how often, and what is told of them; decisions alone, no cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    FinishedState,
    ReschedulingState,
    RestartingState,
    RunningState,
    ShuttingDownState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from pocl_ray.errors import ResourceError
from pocl_ray.ray_train.policies import OneMachinePolicy, ReportFailures, RetryPolicy, cause_of, give_up
from pocl_ray.ray_train.progress import ProgressActor

LIMIT = 2
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


def died(text: str = "The actor died because its node has died.") -> WorkerHealthCheckFailedError:
    error = ActorDiedError()
    error.error_msg = text
    return WorkerHealthCheckFailedError("a worker died", error)


def failed(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("text", {int(rank[1:]): failure for rank, failure in failures.items()})


def decisions(*errors: TrainingFailedError) -> list[bool]:
    """Whether each is tried again."""
    policy = RetryPolicy(FailureConfig(max_failures=LIMIT, controller_failure_limit=LIMIT))
    return [policy.make_decision(error) == FailureDecision.RETRY for error in errors]


def test_a_worker_that_fails_at_every_try_ends_the_run_after_as_many_as_are_allowed() -> None:
    assert decisions(*[failed(r0=RuntimeError("boom"))] * 4) == [True, True, False, False]


def test_starts_without_room_end_the_run_too() -> None:
    assert decisions(*[NO_ROOM] * 4) == [True, True, False, False]


def test_nodes_lost_one_after_another_do_not_use_up_the_failed_starts() -> None:
    lost = failed(r1=died())
    assert decisions(NO_ROOM, NO_ROOM, lost, NO_ROOM, NO_ROOM, lost, NO_ROOM) == [True] * 7


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (ActorDiedError(), True),
        (RayTaskError("set_up", "traceback", RuntimeError("connection closed")), True),
        (ResourceError("no room"), False),
        (ValueError("a bug"), False),
    ],
)
def test_a_start_is_tried_again_where_a_worker_died_amid_it_and_not_where_it_would_fail_again(
    failure: Exception, again: bool
) -> None:
    assert decisions(ControllerError(failure)) == [again]


def test_the_cause_is_the_worker_that_died_and_not_those_that_missed_it() -> None:
    missed = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert cause_of(failed(r0=missed, r1=died())) == "worker 1 died: The actor died because its node has died."
    assert cause_of(failed(r0=missed, r1=ValueError("bad\nrow"))) == "worker 1 failed: ValueError: bad row"
    assert cause_of(failed(r0=missed)).startswith("worker 0 failed: RuntimeError: [pair.cc:534] Connection closed")


def test_the_last_line_names_tries_budget_cause_and_remedy() -> None:
    cause = "worker 0 failed: RuntimeError: boom"
    error = give_up("distill", failed(r0=RuntimeError("boom")), [cause] * 3)
    assert str(error) == (
        f"distill: gave up after 3 tries, as scaling.max_failures says; the last time {cause}; the same command goes "
        "on from the last checkpoint"
    )
    assert str(give_up("control", NO_ROOM, [])).startswith("control: gave up after 1 try; the workers did not start: ")


class _Board:
    """A board that is told at once."""

    def __init__(self) -> None:
        self.training_status = ProgressActor.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
        self.fail = SimpleNamespace(remote=self.training_status.fail)

    def read(self) -> Any:
        return self.training_status.read()


def test_the_user_is_told_of_each_failure_once_and_that_the_run_goes_on() -> None:
    progress_actor, error = _Board(), failed(r1=RuntimeError("boom"))
    tell = ReportFailures(progress_actor)
    states: list[TrainControllerState] = [
        RestartingState(error),
        RunningState(),
        ReschedulingState(ControllerError(ActorDiedError())),
        RunningState(),
        ShuttingDownState(FinishedState()),
        ShuttingDownState(ErroredState(error)),
        ErroredState(error),
    ]
    for state in states:
        tell.after_controller_state_update(RunningState(), state)
    training_status = progress_actor.read()
    boom = "worker 1 failed: RuntimeError: boom"
    assert [cause.partition(":")[0] for cause in training_status.failures] == [
        "worker 1 failed",
        "the workers did not start",
        "worker 1 failed",
    ]
    assert training_status.warnings[0] == f"failure 1: {boom}; going on from the last checkpoint"
    assert len(training_status.warnings) == 2


def test_what_was_done_before_the_first_start_is_kept_apart_from_what_a_failure_repeats() -> None:
    board = ProgressActor.__ray_metadata__.modified_class()  # type: ignore[attr-defined]
    board.begin(240, 96, [], num_tokens=19_200)
    board.begin(240, 120, [], num_tokens=24_000)  # after a failure of the workers
    status = board.read()
    assert (status.first_step, status.earlier_steps, status.earlier_tokens) == (120, 96, 19_200)


def test_on_one_machine_no_autoscaler_is_asked_for_room() -> None:
    policy, had_ray = OneMachinePolicy(ScalingConfig(num_workers=2)), ray.is_initialized()
    policy.after_controller_start(SimpleNamespace(run_id="run"))  # type: ignore[arg-type]
    assert ray.is_initialized() == had_ray, "a question to Ray would have started it"
    policy._coordinator_client = client = Mock()
    decision: Any = policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 2
    policy._send_resource_request()  # as at the start, with a client that remembers
    policy.before_controller_abort()
    assert client.mock_calls == []
