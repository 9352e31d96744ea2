"""How many trials the cluster has room for at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pocl_ray.config import ScalingConfig
from pocl_ray.distill.room import resources_per_worker, wait_for_workers
from pocl_ray.ray_cluster.capacity import usable_nodes, wants_gpu, with_accelerator


def trials_at_once(
    nodes: Sequence[Mapping[str, float]],
    per_worker: Mapping[str, float],
    num_workers: int,
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"],
) -> int:
    """Return how many groups of workers fit on the nodes side by side.

    A trial needs nothing but its workers: trial and controller are actors without resources.

    Args:
        nodes: What each node has, by resource.
        per_worker: What a worker needs.
        num_workers: Workers of a trial.
        placement: STRICT_PACK: the workers of a trial share a node; STRICT_SPREAD: no two of them do.
    """
    needed = {name: amount for name, amount in per_worker.items() if amount > 0}
    slots = [min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items()) for node in nodes]
    if placement == "STRICT_PACK":
        return sum(free // num_workers for free in slots)
    if placement == "STRICT_SPREAD":
        groups = sum(slots) // num_workers
        while groups and sum(min(free, groups) for free in slots) < groups * num_workers:
            groups -= 1
        return groups
    return sum(slots) // num_workers


def wait_for_trials(scaling: ScalingConfig, most: int | None) -> int:
    """Return how many trials run at once on the cluster that is connected; at least one.

    Args:
        scaling: Of a trial.
        most: What the user allows; None: whatever fits.

    Raises:
        ResourceError: Not one fits, after `scaling.start_timeout_s`; at once where the cluster cannot grow.
    """
    use_gpu = wants_gpu(scaling)
    wait_for_workers(scaling, use_gpu)
    nodes = list(usable_nodes(scaling.labels).values())
    needed = with_accelerator(resources_per_worker(scaling, use_gpu), scaling)
    fitting = trials_at_once(nodes, needed, scaling.max_workers, scaling.placement)
    return max(1, fitting if most is None else min(most, fitting))
