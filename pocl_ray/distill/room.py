"""Room for training workers: what one of them needs, how many fit the nodes, and waiting for a cluster that grows."""

from __future__ import annotations

import time

import ray

from pocl_ray.config import ScalingConfig
from pocl_ray.errors import ResourceError


def resources_per_worker(scaling: ScalingConfig, use_gpu: bool) -> dict[str, float]:
    """Return what one training worker asks the cluster for."""
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    return {**resources, "GPU": resources.get("GPU", 1)} if use_gpu else resources


def wait_for_room(scaling: ScalingConfig, use_gpu: bool) -> None:
    """Wait until the cluster has room for the fewest workers allowed; an autoscaling one may still be growing.

    Raises:
        ResourceError: It has not after `scaling.start_timeout_s`.
    """
    needed = resources_per_worker(scaling, use_gpu)
    deadline = time.monotonic() + scaling.start_timeout_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = room_for(needed, nodes, scaling.placement)
        if room >= scaling.min_workers:
            return
        if time.monotonic() > deadline or is_one_machine():
            each = ", ".join(f"{v:g} {k}" for k, v in needed.items())
            listed = "; ".join(", ".join(f"{node.get(k, 0):g} {k}" for k in needed) for node in nodes)
            raise ResourceError(
                f"scaling.num_workers: the cluster has room for {room} of {scaling.min_workers} workers of {each} each "
                f"(its nodes have {listed}); lower scaling.num_workers or scaling.cpus_per_worker"
            )
        time.sleep(1.0)


def room_for(needed: dict[str, float], nodes: list[dict[str, float]], placement: str) -> int:
    """Return how many workers fit, none of them cut across nodes.

    Args:
        needed: What one worker asks for.
        nodes: What each node has.
        placement: Ray's placement strategy.
    """
    fits = [int(min(node.get(k, 0) / v + 1e-6 for k, v in needed.items() if v > 0)) for node in nodes]
    if placement == "STRICT_PACK":
        return max(fits, default=0)
    if placement == "STRICT_SPREAD":
        return sum(fit > 0 for fit in fits)
    return sum(fits)


def is_one_machine() -> bool:
    """Whether this process started the cluster itself, which therefore will not grow."""
    node = ray._private.worker._global_node
    return node is not None and node.head
