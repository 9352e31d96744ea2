"""The names that this package takes from inside Ray Train 2.60; no other file imports `ray.train.v2._internal`.

They are not part of Ray's public interface and may move with any release, which is why pyproject.toml holds Ray below
2.61. For another Ray, this is the file to correct first. It is imported in the controller's process, so nothing here
may load torch.
"""

from __future__ import annotations

# Our trainer leaves this callback out, since workers read rows by themselves.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

# Our trainer leaves this one out on a cluster without a dashboard, where it would make `fit` wait at the end.
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# The retry policy tells a worker that does not answer from one that raised an error.
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

# Our callbacks in the controller: they report failures, keep snapshots and watch for workers that hang.
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback

# A worker finds three things only in this context: the notice of its node, the thread of uploads and their storage.
from ray.train.v2._internal.execution.context import get_train_context

# The callback that reports failures receives the controller's states.
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    ReschedulingState,
    RestartingState,
    ShuttingDownState,
    TrainControllerState,
)

# The retry policy is Ray's policy with a second budget, which is for starts that fail.
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision

# The elastic policy is Ray's policy with numbers of workers that divide the global batch. On one machine the policy of
# a fixed number of workers asks no autoscaler.
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingDecision,
)

# The controller's records about the workers, for policies and callbacks.
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

# The name of the framework that the dashboard's Train page shows.
from ray.train.v2._internal.util import TrainingFramework

__all__ = [
    "ControllerCallback",
    "DatasetsCallback",
    "DefaultFailurePolicy",
    "ElasticScalingPolicy",
    "ErroredState",
    "FailureDecision",
    "FixedScalingPolicy",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "ReportCallback",
    "ReschedulingState",
    "RestartingState",
    "ScalingDecision",
    "ShuttingDownState",
    "TrainControllerState",
    "TrainingFramework",
    "WorkerGroupCallback",
    "WorkerGroupPollStatus",
    "WorkerGroupState",
    "WorkerHealthCheckFailedError",
    "get_train_context",
]
