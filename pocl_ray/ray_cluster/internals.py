"""The parts of Ray 2.60 outside its public interface that this package uses; no other file names `ray._private`.

They may move with any release, which is why pyproject.toml holds Ray below 2.61. For another Ray, this file and
`ray_train/internals.py` are the ones to correct first.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import ray

# The cluster's key-value store takes the heartbeats of actors; the public ways need an actor of their own.
from ray.experimental import internal_kv

__all__ = ["draining_nodes", "internal_kv", "quieten_packing", "started_the_cluster", "use_this_clusters_store"]


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


def quieten_packing() -> None:
    """Make Ray report only files that are too large while it packs, and not each `.gitignore` and excluded file."""
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)
