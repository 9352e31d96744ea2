"""Room for training workers: what one of them asks for, and waiting until the fewest allowed fit."""

from __future__ import annotations

from pocl_ray.config import ScalingConfig
from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster.capacity import in_words, room_for, usable_nodes, wait_for_room, where, with_accelerator


def resources_per_worker(scaling: ScalingConfig, use_gpu: bool) -> dict[str, float]:
    """Return what one training worker asks the cluster for; the kind of its GPU is said apart."""
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    return {**resources, "GPU": resources.get("GPU", 1)} if use_gpu else resources


def wait_for_workers(scaling: ScalingConfig, use_gpu: bool) -> None:
    """Wait until the cluster has room for the fewest workers allowed.

    Raises:
        ResourceError: It has not after `scaling.start_timeout_s`; at once where it cannot grow.
    """
    needed = with_accelerator(resources_per_worker(scaling, use_gpu), scaling)

    def room() -> int:
        return room_for(needed, list(usable_nodes(scaling.labels).values()), scaling.placement)

    fits = wait_for_room(room, scaling.min_workers, [needed] * scaling.max_workers, scaling)
    if fits < scaling.min_workers:
        nodes = usable_nodes(scaling.labels).values()
        listed = "; ".join(in_words({name: node.get(name, 0) for name in needed}) for node in nodes) or "nothing"
        raise ResourceError(
            f"scaling.num_workers: the cluster has room for {fits} of {scaling.min_workers} workers of "
            f"{in_words(needed)} each{where(scaling)} (its nodes have {listed}); lower scaling.num_workers or "
            "scaling.cpus_per_worker"
        )
