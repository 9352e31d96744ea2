"""Failures of a training run: whether it is tried again, and the message for the user.

A worker's failure is charged to `scaling.max_failures`. A start that fails because workers or nodes die meanwhile is
charged to a budget of its own, which is full again once workers have started: a long run may lose many nodes, one after
another. Both are finite, so that a run that fails at every try ends, with its cause.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2.api.config import ScalingConfig as RayScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup

from pocl_ray.errors import GaveUpError, ResourceError, StalledError, UserError
from pocl_ray.ray_cluster.capacity import room_for, usable_nodes
from pocl_ray.ray_cluster.internals import draining_nodes
from pocl_ray.ray_cluster.ray_errors import explain_death, one_line
from pocl_ray.ray_train.checkpoints import keep_snapshot
from pocl_ray.ray_train.internals import (
    ControllerCallback,
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    ErroredState,
    FailureDecision,
    FixedScalingPolicy,
    NoopDecision,
    ReportCallback,
    ReschedulingState,
    RestartingState,
    ScalingDecision,
    ShuttingDownState,
    TrainControllerState,
    WorkerGroupCallback,
    WorkerGroupPollStatus,
    WorkerGroupState,
    WorkerHealthCheckFailedError,
)
from pocl_ray.run_directory.storage import RunDirectory

logger = logging.getLogger(__name__)

ANSWER_S = 30.0
LOOK_EVERY_S = 1.0
# Errors of a worker in a collective whose other end is gone: a consequence and never the cause.
_COLLATERAL = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


class RetryPolicy(DefaultFailurePolicy):
    """Decides in Ray Train's controller whether a failed run is tried again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Charge a failure to its budget, and decide."""
        if not isinstance(training_failed_error, ControllerError):
            self._controller_failures = 0  # workers had started, so the earlier failures of starts no longer count
        decision: FailureDecision = super().make_decision(training_failed_error)
        return decision

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        """Whether another try may help; Ray's own policy gives up if a worker dies while others start."""
        if isinstance(training_failed_error, ControllerError):
            failure = training_failed_error.controller_failure
            if isinstance(failure, RayError) and not isinstance(failure, UserError):
                return True
        return bool(super()._is_retryable_error(training_failed_error))


class ReportFailures(ControllerCallback):
    """Reports each failure to the driver's progress actor; it runs in the controller."""

    def __init__(self, progress_actor: Any) -> None:
        """Take the ProgressActor."""
        self.progress_actor = progress_actor

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Report the cause of a failure, and whether the run goes on."""
        if isinstance(current_state, (RestartingState, ReschedulingState)):
            self.progress_actor.fail.remote(cause_of(current_state.training_failed_error), goes_on=True)
        elif isinstance(current_state, ShuttingDownState) and isinstance(current_state.next_state, ErroredState):
            self.progress_actor.fail.remote(cause_of(current_state.next_state.training_failed_error), goes_on=False)


def cause_of(error: BaseException) -> str:
    """Return why a run failed, as one line: the first cause where several workers report consequences of it too."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        if hung := next((each for each in error.worker_failures.values() if isinstance(each, StalledError)), None):
            return str(hung)  # it names the workers, and their lines of code
        rank, failure = min(error.worker_failures.items(), key=lambda item: (_is_consequence(item[1]), item[0]))
        return f"worker {rank} {_said(failure)}"
    if isinstance(error, ControllerError):
        return f"the workers did not start: {_said(error.controller_failure)}"
    return f"the run {_said(error)}"


def give_up(name: str, error: BaseException, failures: Sequence[str]) -> GaveUpError:
    """Return the error for the user at the end.

    Args:
        name: Name of the training run.
        error: Last error of Ray Train.
        failures: Causes of all failures, as far as the progress actor knows them.
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
        return f"died: {explain_death(failure)}"
    return f"failed: {one_line(f'{type(failure).__name__}: {failure}')}"


def _is_consequence(failure: BaseException) -> bool:
    return not isinstance(failure, WorkerHealthCheckFailedError) and any(sign in str(failure) for sign in _COLLATERAL)


def largest_share(num_possible: int, least: int, global_batch_rows: int) -> int:
    """Return the most workers, at most `num_possible`, that share a global batch evenly; 0 for fewer than `least`."""
    fitting = (n for n in range(num_possible, least - 1, -1) if n > 0 and global_batch_rows % n == 0)
    return next(fitting, 0)


class ElasticPolicy(ElasticScalingPolicy):
    """Decides in Ray Train's controller how many workers there are: as many as there is room for.

    Ray Train's own elastic policy takes any number that fits. Ours differs in four points. It keeps to numbers that
    divide the global batch and to the placement that is asked for. It looks at the nodes as they are, not as they were
    up to 20 seconds ago, and does not count one that is about to go. It grows right after a checkpoint, so that hardly
    a step is done twice. And it gives up, with the reason, where too few nodes are left for too long.
    """

    def __init__(self, scaling_config: RayScalingConfig, global_batch_rows: int, patience_s: float) -> None:
        """Set the policy up.

        Args:
            scaling_config: Minimum and maximum number of workers, and their resources.
            global_batch_rows: Rows of an optimizer step.
            patience_s: Seconds to wait for the minimum number of workers.
        """
        super().__init__(scaling_config)
        self._global_batch_rows = global_batch_rows
        self._patience_s = patience_s
        selector = scaling_config.label_selector
        self._labels = selector if isinstance(selector, dict) else {}
        self._waits_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start with as many workers as there is room for, or wait for the fewest.

        Raises:
            ResourceError: They did not come in time.
        """
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._waits_since = None
            return decision
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        if now - self._waits_since > self._patience_s:
            raise ResourceError(
                f"scaling.num_workers: no room for {self.scaling_config.min_workers} workers since "
                f"{self._patience_s:.0f} s, so the run stops; the same command goes on where it stood"
            )
        time.sleep(LOOK_EVERY_S)  # Ray Train's controller asks again at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Grow if there is room, at the moment when a checkpoint has been registered."""
        reports = [status.training_report for status in worker_group_status.worker_statuses.values()]
        if not any(report is not None and report.checkpoint is not None for report in reports):
            self._maybe_send_resource_request()
            return NoopDecision()
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Return the resources that the run may use on each node that stays; None while nobody answers."""
        answer = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            reserved: dict[str, dict[str, float]] = ray.get(answer, timeout=ANSWER_S)
        except RayError:
            logger.warning("the autoscaling coordinator does not answer; the workers stay as they are", exc_info=True)
            return None
        leaving, usable = draining_nodes(), usable_nodes(self._labels)
        if str(self.scaling_config.placement_strategy).startswith("STRICT"):
            # Reserved resources are packed, whatever the placement, so all resources of the nodes are looked at.
            reserved = usable
        return {node: resources for node, resources in reserved.items() if node in usable and node not in leaving}

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        config, nodes = self.scaling_config, list(reserved_resources.values())
        room = room_for(config._resources_per_worker_not_none, nodes, str(config.placement_strategy))
        return largest_share(min(room, config.max_workers), config.min_workers, self._global_batch_rows)


class OneMachinePolicy(FixedScalingPolicy):
    """Decides for a fixed number of workers on one machine, which cannot grow, so no autoscaler is asked for room.

    Ray's own policy asks through an actor. The first training of a cluster would wait for its process to start.
    """

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class BackUpSnapshots(ReportCallback):
    """Keeps a copy of Ray Train's snapshot of the checkpoints; runs in the controller, after Ray Train's part."""

    def __init__(self, run_dir: RunDirectory, folder: str) -> None:
        """Take the run directory and the folder of the checkpoints in it."""
        self.run_dir, self.folder = run_dir, folder

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Copy the snapshot when a checkpoint was registered."""
        if training_report.checkpoint is not None:
            keep_snapshot(self.run_dir, self.folder)


class UpdateProgress(ControllerCallback, WorkerGroupCallback):
    """Reports a run's controller and placement group to progress actors; it runs in the controller."""

    def __init__(self, name: str, *progress_actors: Any) -> None:
        """Take the name of the run, and actors with the method `holds`."""
        self.name, self.progress_actors = name, progress_actors

    def after_controller_start(self, train_run_context: Any) -> None:
        """Report the controller."""
        self._tell(None)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Report the placement group."""
        self._tell(worker_group.get_worker_group_state().placement_group_handle.placement_group)

    def _tell(self, group: PlacementGroup | None) -> None:
        me = ray.get_runtime_context().current_actor
        for progress_actor in self.progress_actors:
            progress_actor.holds.remote(self.name, me, group)
