"""A Ray cluster whose nodes come and go; the head has no CPUs, as on Kubernetes, so all work is on the others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from faults import processes_of
from ray._raylet import Config, GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from tiny import ROOT

PATIENCE_S = 240.0
TOLD = "received preemption signal"
CACHE = "POCL_RAY_CACHE"
START_WAIT = "RAY_raylet_start_wait_time_s"
# A node that is gone refuses connections and is dead after five seconds; one under load may take a minute to answer.
HEALTH = {"health_check_period_ms": 1000, "health_check_timeout_ms": 60000, "health_check_failure_threshold": 5}


class Nodes:
    """Nodes with one CPU each.

    Attributes:
        cluster: Ray's.
        workers: The nodes, the oldest first.
    """

    def __init__(self, caches: Path | None = None) -> None:
        """Start the head alone.

        Args:
            caches: Directory in which each node has its own cache for files of a remote storage; by default they share
                one.
        """
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, "wait": False},
        )
        self.workers: list[Any] = []
        self._caches, self._num_added = caches, 0
        self._wait(1)

    @property
    def address(self) -> str:
        """The value for `RAY_ADDRESS`."""
        return str(self.cluster.address)

    @property
    def logs(self) -> Path:
        """Ray's log directory, of all nodes."""
        return Path(self.cluster.head_node.get_session_dir_path()) / "logs"

    def add(self) -> None:
        """Add a node."""
        self._num_added += 1
        own = {} if self._caches is None else {CACHE: str(self._caches / f"node-{self._num_added}")}
        self.workers.append(self.cluster.add_node(num_cpus=1, wait=False, env_vars=own))
        self._wait(1 + len(self.workers))

    def lose(self, actor: str = "") -> None:
        """End the newest node with all its processes, as if its power had failed; of an `actor`, the one it runs on."""
        node = next(node for node in reversed(self.workers) if not actor or processes_of(actor, self._raylet(node)))
        self.workers.remove(node)
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

    def actors(self, name: str) -> list[psutil.Process]:
        """The processes of an actor on all nodes, those of the newest node last."""
        return [process for node in self.workers for process in processes_of(name, self._raylet(node))]

    def has_told_a_worker(self) -> bool:
        """Whether Ray Train has told a training worker, of any run so far, that a node is announced to go."""
        logs = (self.logs / "train").glob("ray-train-sys-worker-*.log")
        return any(TOLD in log.read_text(errors="replace") for log in logs)

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
def nodes(count: int, caches: Path | None = None) -> Iterator[Nodes]:
    """Start a cluster of so many nodes, besides its head; see `Nodes` for `caches`."""
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_AUTH_MODE", START_WAIT)
    before = {key: os.environ.get(key) for key in names}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else it depends on whether this machine has a token
    os.environ[START_WAIT] = str(int(PATIENCE_S))
    os.environ.pop("RAY_ADDRESS", None)
    Config.initialize("")  # reads the environment again
    made = Nodes(caches)
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
