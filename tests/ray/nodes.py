"""A Ray cluster whose nodes come and go; the head has no CPUs, as on Kubernetes, so all work is on the others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from faults import processes_of
from ray._raylet import Config, GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from tiny import ROOT

PATIENCE_S = 240.0
START_WAIT = "RAY_raylet_start_wait_time_s"
# A node that is gone refuses connections and is dead after five seconds; one under load may take a minute to answer.
HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 60000, "health_check_failure_threshold": 5}


class Nodes:
    """Nodes with one CPU each.

    Attributes:
        cluster: Ray's.
        workers: The nodes, the oldest first.
    """

    def __init__(self) -> None:
        """Start the head alone."""
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, "wait": False},
        )
        self.workers: list[Any] = []
        self._wait(1)

    @property
    def address(self) -> str:
        """What `RAY_ADDRESS` is to be."""
        return str(self.cluster.address)

    def add(self) -> None:
        """Add a node."""
        self.workers.append(self.cluster.add_node(num_cpus=1, wait=False))
        self._wait(1 + len(self.workers))

    def lose(self) -> None:
        """End the newest node with all its processes, as if its power had failed."""
        node = self.workers.pop()
        family = self._raylet(node).children(recursive=True)
        self.cluster.remove_node(node, allow_graceful=False)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def announce_loss(self, within_s: float) -> None:
        """Tell Ray that the newest node is going to be taken away, as `ray drain-node` does."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + within_s) * 1000)
        is_accepted, why_not = GcsClient(address=self.address).drain_node(
            self.workers[-1].node_id, reason, "spot instance reclaimed", deadline_ms
        )
        assert is_accepted, why_not

    def training_workers(self) -> list[psutil.Process]:
        """The processes of Ray Train's workers on all nodes."""
        return [process for node in self.workers for process in processes_of("RayTrainWorker", self._raylet(node))]

    def actors(self, name: str) -> list[psutil.Process]:
        """The processes of an actor on all nodes."""
        return [process for node in self.workers for process in processes_of(name, self._raylet(node))]

    def end(self) -> None:
        """End all nodes."""
        while self.workers:
            self.lose()
        self.cluster.shutdown()

    def _raylet(self, node: Any) -> psutil.Process:
        (info,) = node.all_processes["raylet"]
        return psutil.Process(info.process.pid)

    def _wait(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.cluster.global_state._live_node_ids()) < count:
            assert time.monotonic() < deadline, f"{count} nodes do not stand"
            time.sleep(0.1)


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """Start a cluster of so many nodes, besides its head."""
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_AUTH_MODE", START_WAIT)
    before = {key: os.environ.get(key) for key in names}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it depends on whether this machine has a token
    os.environ[START_WAIT] = str(int(PATIENCE_S))
    os.environ.pop("RAY_ADDRESS", None)
    Config.initialize("")  # reads the environment again
    made = Nodes()
    try:
        for _ in range(count):
            made.add()
        yield made
    finally:
        made.end()
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
