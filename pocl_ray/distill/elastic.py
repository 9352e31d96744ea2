"""How many workers an elastic run has: as many as there is room for, of which each gets an equal share of a batch.

Ray Train's own elastic policy takes any number that fits. Ours differs in four points. It keeps to numbers that divide
the global batch and to the placement that is asked for. It looks at the nodes as they are, not as they were up to 20
seconds ago, and does not count one that is about to go. It grows right after a checkpoint, so that hardly a step is
done twice. And it gives up, with the reason, where too few nodes are left for too long.
"""

from __future__ import annotations

import logging
import time

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig as RayScalingConfig

from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster.capacity import room_for, usable_nodes

logger = logging.getLogger(__name__)

ANSWER_S = 30.0
LOOK_EVERY_S = 1.0


def largest_share(num_possible: int, least: int, global_batch_rows: int) -> int:
    """Return the most workers, at most `num_possible`, that share a global batch evenly; 0 for fewer than `least`."""
    fitting = (n for n in range(num_possible, least - 1, -1) if n > 0 and global_batch_rows % n == 0)
    return next(fitting, 0)


class DividingPolicy(ElasticScalingPolicy):
    """Decides in Ray Train's controller how many workers there are."""

    def __init__(self, scaling_config: RayScalingConfig, global_batch_rows: int, patience_s: float) -> None:
        """Set the policy up.

        Args:
            scaling_config: Fewest and most workers, and what each needs.
            global_batch_rows: Rows of an optimizer step.
            patience_s: How long to wait for the fewest workers.
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
        """Grow where there is room, at the moment when a checkpoint has been taken over."""
        reports = [status.training_report for status in worker_group_status.worker_statuses.values()]
        if not any(report is not None and report.checkpoint is not None for report in reports):
            self._maybe_send_resource_request()
            return NoopDecision()
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Return what the run may use of each node that stays; None while nobody answers, and nothing changes."""
        answer = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            reserved: dict[str, dict[str, float]] = ray.get(answer, timeout=ANSWER_S)
        except RayError:
            logger.warning("the autoscaling coordinator does not answer; the workers stay as they are", exc_info=True)
            return None
        leaving, usable = ray._private.state.state.get_draining_nodes(), usable_nodes(self._labels)
        if str(self.scaling_config.placement_strategy).startswith("STRICT"):
            # What is reserved is packed, whatever the placement; so all that the nodes have is looked at.
            reserved = usable
        return {node: resources for node, resources in reserved.items() if node in usable and node not in leaving}

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        config, nodes = self.scaling_config, list(reserved_resources.values())
        room = room_for(config._resources_per_worker_not_none, nodes, str(config.placement_strategy))
        return largest_share(min(room, config.max_workers), config.min_workers, self._global_batch_rows)
