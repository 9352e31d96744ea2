"""The free resources of the cluster, and requests to an autoscaler for more.

Only nodes count that are alive and have the labels of `scaling.labels`. An autoscaler adds nodes for work that waits to
start. Our steps check the room before they start anything. So they request what they need, and wait until it has come
or `scaling.start_timeout_s` is over.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import ray
from ray.autoscaler.sdk import request_resources

from pocl_ray.config import ScalingConfig
from pocl_ray.console import console
from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster.internals import started_the_cluster

LOOK_EVERY_S = 1.0
SETTLE_S = 30.0
"""The time within which nodes of one request join the cluster."""


def is_one_machine() -> bool:
    """Return whether this process started the cluster, which therefore cannot grow."""
    return started_the_cluster()


def usable_nodes(labels: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return the resources, by node id, of each node that is alive and matches these label selectors."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return {
        node["NodeID"]: node["Resources"]
        for node in nodes
        if node["Alive"] and carries(node.get("Labels") or {}, labels)
    }


def carries(node: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a node's labels match selectors in Ray's forms `a`, `!a`, `in(a,b)`, `!in(a,b)`.

    A node without the label matches the two forms that exclude.
    """
    for key, selector in labels.items():
        value = selector.removeprefix("!")
        among = re.fullmatch(r"in\((.*)\)", value)
        values = {each.strip() for each in among[1].split(",")} if among else {value}
        if (node.get(key) in values) == selector.startswith("!"):
            return False
    return True


def wants_gpu(scaling: ScalingConfig) -> bool:
    """Return whether workers and actors run on GPUs; with `scaling.use_gpu` null, whether a usable node has one now.

    Raises:
        ResourceError: GPUs are requested, and no usable node has one after `scaling.start_timeout_s`.
    """

    def num_gpus() -> int:
        return int(sum(node.get("GPU", 0) for node in usable_nodes(scaling.labels).values()))

    if not scaling.use_gpu:
        return scaling.use_gpu is None and num_gpus() > 0
    if wait_for_room(num_gpus, 1, [{"GPU": 1.0}], scaling) == 0:
        raise ResourceError(
            f"scaling.use_gpu: the cluster has no GPU{where(scaling)}; set it to false, or to null for what there is"
        )
    return True


def where(scaling: ScalingConfig) -> str:
    """Return the labels that nodes must have, as the end of a sentence about the cluster."""
    chosen = ", ".join(f"{key}={value}" for key, value in scaling.labels.items())
    return f" on nodes labelled {chosen}" if chosen else ""


def with_accelerator(needed: Mapping[str, float], scaling: ScalingConfig) -> dict[str, float]:
    """Return the resources of a GPU user, including the type of the GPU."""
    kind = {} if scaling.accelerator_type is None else {f"accelerator_type:{scaling.accelerator_type}": 0.001}
    return {**needed, **(kind if needed.get("GPU", 0) > 0 else {})}


def room_for(needed: Mapping[str, float], nodes: Sequence[Mapping[str, float]], placement: str = "PACK") -> int:
    """Return how many workers or actors fit, where each must fit on one node.

    Args:
        needed: Resources of one worker or actor.
        nodes: Resources of each node.
        placement: Ray's placement strategy.
    """
    fits = [int(min(node.get(k, 0) / v + 1e-6 for k, v in needed.items() if v > 0)) for node in nodes]
    if placement == "STRICT_PACK":
        return max(fits, default=0)
    if placement == "STRICT_SPREAD":
        return sum(fit > 0 for fit in fits)
    return sum(fits)


def wait_for_room(
    room: Callable[[], int], least: int, wanted: Sequence[Mapping[str, float]], scaling: ScalingConfig
) -> int:
    """Return the number that fits; if it is below the minimum, ask a cluster that may grow for all that is wanted.

    On an autoscaling cluster, wait until all wanted resources fit, or until the minimum fits and no node has joined for
    `SETTLE_S`.

    Args:
        room: Function that returns the number that fits now.
        least: Minimum number to go on.
        wanted: Resources of each worker or actor that is wanted.
        scaling: Config with the labels of the nodes and the time to wait.
    """
    now = room()
    if now >= least or is_one_machine():
        return now
    console.print(
        f"  waiting {scaling.start_timeout_s:.0f} s at most for the cluster to grow: "
        f"{len(wanted)} x {resources_text(wanted[0])}{where(scaling)}"
    )
    _ask(wanted, scaling.labels)
    try:
        changed = start = time.monotonic()
        while time.monotonic() < start + scaling.start_timeout_s:
            time.sleep(LOOK_EVERY_S)
            before, now = now, room()
            changed = time.monotonic() if now != before else changed
            if now >= len(wanted) or (now >= least and time.monotonic() > changed + SETTLE_S):
                break
        return now
    finally:
        _ask([], {})


def resources_text(resources: Mapping[str, float]) -> str:
    """Return resources as text."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _ask(wanted: Sequence[Mapping[str, float]], labels: Mapping[str, str]) -> None:
    """Request resources from the autoscaler, if there is one; it replaces no earlier request."""
    request_resources(bundles=[dict(each) for each in wanted], bundle_label_selectors=[dict(labels) for _ in wanted])


def resources_per_worker(scaling: ScalingConfig, use_gpu: bool) -> dict[str, float]:
    """Return the resources of one training worker, without the type of its GPU."""
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    return {**resources, "GPU": resources.get("GPU", 1)} if use_gpu else resources


def wait_for_workers(scaling: ScalingConfig, use_gpu: bool) -> None:
    """Wait until the cluster has room for the minimum number of workers.

    Raises:
        ResourceError: There is no room after `scaling.start_timeout_s`, or at once if the cluster cannot grow.
    """
    needed = with_accelerator(resources_per_worker(scaling, use_gpu), scaling)

    def room() -> int:
        return room_for(needed, list(usable_nodes(scaling.labels).values()), scaling.placement)

    fits = wait_for_room(room, scaling.min_workers, [needed] * scaling.max_workers, scaling)
    if fits < scaling.min_workers:
        nodes = usable_nodes(scaling.labels).values()
        listed = "; ".join(resources_text({name: node.get(name, 0) for name in needed}) for node in nodes) or "nothing"
        raise ResourceError(
            f"scaling.num_workers: the cluster has room for {fits} of {scaling.min_workers} workers of "
            f"{resources_text(needed)} each{where(scaling)} (its nodes have {listed}); lower scaling.num_workers or "
            "scaling.cpus_per_worker"
        )


def trials_at_once(
    nodes: Sequence[Mapping[str, float]],
    per_worker: Mapping[str, float],
    num_workers: int,
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"],
) -> int:
    """Return how many groups of workers fit on the nodes at the same time.

    Only the workers of a trial need resources; its trial actor and its controller need none.

    Args:
        nodes: Resources of each node.
        per_worker: Resources of a worker.
        num_workers: Number of workers of a trial.
        placement: Placement strategy. STRICT_PACK: the workers of a trial share a node; STRICT_SPREAD: no two of them
            do.
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
    """Return how many trials run at once on the connected cluster; at least one.

    Args:
        scaling: Resources of a trial.
        most: Maximum that the user allows; None for all that fit.

    Raises:
        ResourceError: No trial fits after `scaling.start_timeout_s`, or at once if the cluster cannot grow.
    """
    use_gpu = wants_gpu(scaling)
    wait_for_workers(scaling, use_gpu)
    nodes = list(usable_nodes(scaling.labels).values())
    needed = with_accelerator(resources_per_worker(scaling, use_gpu), scaling)
    fitting = trials_at_once(nodes, needed, scaling.max_workers, scaling.placement)
    return max(1, fitting if most is None else min(most, fitting))
