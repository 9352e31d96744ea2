"""The parts of Ray 2.60 outside its public interface that this package uses; no other file names `ray._private`.

They may move with any release, which is why pyproject.toml holds Ray below 2.61. For another Ray, this file and
`ray_train/internals.py` are the ones to correct first.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import ray

# The cluster's key-value store takes the heartbeats of actors; the public ways need an actor of their own.
from ray.experimental import internal_kv

__all__ = [
    "draining_nodes",
    "hide_process_counts",
    "internal_kv",
    "quieten_packing",
    "started_the_cluster",
    "use_this_clusters_store",
]

_PROCESS_COUNT = "worker processes have been started on node"


def started_the_cluster() -> bool:
    """Return whether this process started Ray's head node; no public function returns that."""
    node = ray._private.worker._global_node
    return node is not None and node.head


def draining_nodes() -> Collection[str]:
    """Return the ids of nodes that are about to go; `ray.nodes()` does not show that."""
    nodes: Collection[str] = ray._private.state.state.get_draining_nodes()
    return nodes


def use_this_clusters_store() -> None:
    """Let `internal_kv` use the cluster that this process is connected to.

    In a process that knows several clusters, Ray's key-value functions may use another cluster, or none.
    """
    internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)  # type: ignore[attr-defined]


def hide_process_counts() -> None:
    """Keep the raylet's remark on how many processes a node has started off the terminal.

    It comes as soon as there are three times as many processes as CPUs, which actors with a share of a CPU are, and it
    asks nothing of the user. All else that the raylet says, such as how a worker died, is printed as before. Ray's own
    switch, `RAY_worker_maximum_startup_concurrency`, would start more processes at once, and is the cluster's to set.
    """
    module = ray._private.worker
    shown = module.print_to_stdstream
    if getattr(shown, "hides_process_counts", False):
        return

    def show_the_rest(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        lines = [line for line in data["lines"] if _PROCESS_COUNT not in line]
        if lines:
            shown({**data, "lines": lines}, *args, **kwargs)

    show_the_rest.hides_process_counts = True  # type: ignore[attr-defined]
    module.print_to_stdstream = show_the_rest


def quieten_packing() -> None:
    """Make Ray report only files that are too large while it packs, and not each `.gitignore` and excluded file."""
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
