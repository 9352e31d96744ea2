"""What scoring and evaluation share of Ray Data: pools of actors that fit the cluster, one progress bar, clear errors.

Actors load their models with the first batch and not in their constructor: Ray Data would create a failing actor anew,
whereas an exception in a batch travels to the driver as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from pocl_ray.config import ScalingConfig
from pocl_ray.console import progress_bar
from pocl_ray.errors import GaveUpError, ResourceError
from pocl_ray.ray_cluster.capacity import (
    in_words,
    room_for,
    usable_nodes,
    wait_for_room,
    wants_gpu,
    where,
    with_accelerator,
)
from pocl_ray.ray_cluster.ray_errors import explain_death, find_actor_death, find_user_error

_TASKS_IN_FLIGHT = 2  # one runs, one waits: an actor never idles, and tasks stay free for actors that come later


@dataclass(frozen=True)
class ActorPool:
    """The actors of one step of a Ray Data job.

    Attributes:
        size: How many, at most.
        num_cpus: Logical CPUs of each.
        num_gpus: GPUs of each; 0 runs on the CPU.
        scaling: Kind of GPU, custom resources and labels that are asked for, and how many failures are allowed.
    """

    size: int
    num_cpus: float
    num_gpus: float
    scaling: ScalingConfig

    @property
    def use_gpu(self) -> bool:
        """Whether the actors run on a GPU."""
        return self.num_gpus > 0

    def options(self) -> dict[str, Any]:
        """Return the arguments of `Dataset.map_batches`: a batch is a whole block of the input."""
        strategy = ActorPoolStrategy(
            min_size=1, max_size=self.size, initial_size=self.size, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT
        )
        options = {
            "compute": strategy,
            "num_cpus": self.num_cpus,
            "batch_size": None,
            "batch_format": "pyarrow",
        }
        if self.use_gpu:
            options["num_gpus"] = self.num_gpus
            if self.scaling.accelerator_type is not None:
                options["accelerator_type"] = self.scaling.accelerator_type
        if self.scaling.resources_per_actor:
            options["resources"] = dict(self.scaling.resources_per_actor)
        if self.scaling.labels:
            options["label_selector"] = dict(self.scaling.labels)
        return options


def plan_pools(scaling: ScalingConfig, wanted: Sequence[int], num_tasks: int) -> list[ActorPool]:
    """Size the pools of a job so that all of them fit the cluster at once.

    Args:
        scaling: What an actor asks for.
        wanted: Actors of each pool, at most.
        num_tasks: Tasks of the job; more actors than tasks would idle.

    Returns:
        One pool for each of `wanted`, of at least one actor.

    Raises:
        ResourceError: The cluster has no room for one actor of each pool, or no GPU where one is asked for.
    """
    num_gpus = _gpus_per_actor(scaling, len(wanted)) if wants_gpu(scaling) else 0.0
    needed = {"CPU": scaling.cpus_per_actor, "GPU": num_gpus, **scaling.resources_per_actor}
    needed = with_accelerator({name: amount for name, amount in needed.items() if amount > 0}, scaling)
    sizes = [min(size, max(1, num_tasks)) for size in wanted]

    def room() -> int:
        return room_for(needed, list(usable_nodes(scaling.labels).values()))

    fits = wait_for_room(room, len(wanted), [needed] * sum(sizes), scaling)
    if fits < len(wanted):
        keys = "scaling.cpus_per_actor or scaling.gpus_per_actor" if num_gpus else "scaling.cpus_per_actor"
        raise ResourceError(
            f"{len(wanted)} actors of {in_words(needed)} each must run at once, but the cluster has room for "
            f"{fits}{where(scaling)}; lower {keys}"
        )
    while sum(sizes) > fits:
        sizes[sizes.index(max(sizes))] -= 1
    return [ActorPool(size, scaling.cpus_per_actor, num_gpus, scaling) for size in sizes]


def _gpus_per_actor(scaling: ScalingConfig, num_pools: int) -> float:
    """One GPU each, or an equal share of them where the pools outnumber the GPUs."""
    num_gpus = sum(node.get("GPU", 0) for node in usable_nodes(scaling.labels).values())
    return scaling.gpus_per_actor or min(1.0, num_gpus / num_pools)


def collect(dataset: Dataset, name: str, num_rows: int, unit: str) -> pa.Table:
    """Run a Ray Data job and gather its (small) output: what `stream` yields, in one table."""
    return pa.concat_tables(stream(dataset, name, num_rows, unit), promote_options="default")


def stream(dataset: Dataset, name: str, num_rows: int, unit: str) -> Iterator[pa.Table]:
    """Run a Ray Data job behind a progress bar.

    Args:
        dataset: The lazy job.
        name: What is being done.
        num_rows: Rows that the job will give.
        unit: What a row is.

    Yields:
        Its output, in the order in which it comes.

    Raises:
        UserError: One that an actor raised.
        GaveUpError: A task lost its actor more often than it is done again.
    """
    done = 0
    with progress_bar(name, num_rows, unit) as bar:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                table = cast(pa.Table, batch)
                has_begun, done = done > 0, done + table.num_rows
                yield table
                if not has_begun:  # before that, processes started and models loaded
                    bar.begin(done)
                bar.update(done)
        except RayError as error:
            if (end := find_user_error(error)) is not None:
                raise end from None
            if (death := find_actor_death(error)) is not None:
                raise GaveUpError(f"{name}: {explain_death(death)}; the same command does the step again") from error
            raise


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Make and run Ray Data jobs without Ray Data's own bars and messages; what it had is restored."""
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    quiet = {"enable_progress_bars": False, "enable_operator_progress_bars": False, "print_on_execution_start": False}
    before, level = {name: getattr(context, name) for name in quiet}, logger.level
    for name, value in quiet.items():
        setattr(context, name, value)
    logger.setLevel(logging.CRITICAL)  # a failure is raised; its log message would only repeat the traceback
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)
