"""The common part of our Ray Data jobs: pools of actors that fit the cluster, one progress bar, clear errors.

Actors load their models with the first batch and not in their constructor. Ray Data would start an actor again if its
constructor fails, but an exception in a batch reaches the driver unchanged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from pocl_ray.config import ScalingConfig
from pocl_ray.console import PLAIN_INTERVAL_S, Bar, progress_bar
from pocl_ray.errors import GaveUpError, ResourceError
from pocl_ray.ray_cluster.capacity import (
    resources_text,
    room_for,
    usable_nodes,
    wait_for_room,
    wants_gpu,
    where,
    with_accelerator,
)
from pocl_ray.ray_cluster.ray_errors import explain_death, find_actor_death, find_user_error

_LOOK_S = 1.0  # between two looks at what is done, on a terminal
_LOOK_SHARE = 20  # times as long as a look takes
_TASKS_IN_FLIGHT = 2  # one runs and one waits: an actor is never idle, and tasks are left for actors that start later


@dataclass(frozen=True)
class ActorPool:
    """The actors of one step of a Ray Data job.

    Attributes:
        size: Maximum number of actors.
        num_cpus: Logical CPUs of each actor.
        num_gpus: GPUs of each actor; 0 runs on the CPU.
        scaling: Config with the requested GPU type, custom resources and labels, and the number of allowed failures.
    """

    size: int
    num_cpus: float
    num_gpus: float
    scaling: ScalingConfig

    @property
    def use_gpu(self) -> bool:
        """Return whether the actors run on a GPU."""
        return self.num_gpus > 0

    def options(self) -> dict[str, Any]:
        """Return the arguments of `Dataset.map_batches`; a batch is a whole block of the input."""
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
    """Return pools for a job, with sizes such that all of them fit the cluster at once.

    Args:
        scaling: Number of actors and their resources.
        wanted: Maximum number of actors of each pool.
        num_tasks: Number of tasks of the job; more actors than tasks would be idle.

    Returns:
        One pool for each entry of `wanted`, with at least one actor.

    Raises:
        ResourceError: The cluster has no room for one actor of each pool, or no GPU although one is requested.
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
            f"{len(wanted)} actors of {resources_text(needed)} each must run at once, but the cluster has room for "
            f"{fits}{where(scaling)}; lower {keys}"
        )
    while sum(sizes) > fits:
        sizes[sizes.index(max(sizes))] -= 1
    return [ActorPool(size, scaling.cpus_per_actor, num_gpus, scaling) for size in sizes]


def _gpus_per_actor(scaling: ScalingConfig, num_pools: int) -> float:
    """One GPU for each actor, or an equal share if there are more pools than GPUs."""
    num_gpus = sum(node.get("GPU", 0) for node in usable_nodes(scaling.labels).values())
    return scaling.gpus_per_actor or min(1.0, num_gpus / num_pools)


def collect(dataset: Dataset, name: str, num_rows: int, unit: str) -> pa.Table:
    """Return the (small) output of a Ray Data job as one table."""
    return pa.concat_tables(stream(dataset, name, num_rows, unit), promote_options="default")


@dataclass(frozen=True)
class Work:
    """The work of a job as its actors count it, which moves with each batch and not only with each finished task.

    Attributes:
        total: All of it.
        unit: Name of a unit.
        num_done: Function that returns what is done by now.
    """

    total: int
    unit: str
    num_done: Callable[[], int]


def stream(dataset: Dataset, name: str, num_rows: int, unit: str, work: Work | None = None) -> Iterator[pa.Table]:
    """Yield the output of a Ray Data job, which runs with a progress bar.

    Args:
        dataset: Lazy data set of the job.
        name: Name of the job.
        num_rows: Number of rows that the job returns.
        unit: Name of a row.
        work: Work that the bar shows; None: the rows that have come out.

    Yields:
        Tables in the order of their arrival.

    Raises:
        UserError: An actor raised a UserError.
        GaveUpError: A task lost its actor more often than is allowed.
    """
    done = 0
    total, shown = (num_rows, unit) if work is None else (work.total, work.unit)
    with progress_bar(name, total, shown) as bar, following(bar, work):
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                table = cast(pa.Table, batch)
                has_begun, done = done > 0, done + table.num_rows
                yield table
                if work is not None:
                    bar.note = f"{done:,} of {num_rows:,} {unit} done"
                    continue
                if not has_begun:  # before that, processes start and models are loaded
                    bar.begin(done)
                bar.update(done)
        except RayError as error:
            if (end := find_user_error(error)) is not None:
                raise end from None
            if (death := find_actor_death(error)) is not None:
                raise GaveUpError(f"{name}: {explain_death(death)}; the same command does the step again") from error
            raise


@contextmanager
def following(bar: Bar, work: Work | None) -> Iterator[None]:
    """Let a bar follow the work of a job while the block runs; a bar without work is left alone."""
    if work is None:
        yield
        return
    over = threading.Event()
    follower = threading.Thread(target=_follow, args=(bar, work, over), name="progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join(_LOOK_S)


def _follow(bar: Bar, work: Work, over: threading.Event) -> None:
    least_s = _LOOK_S if bar.progress is not None else PLAIN_INTERVAL_S
    wait_s = least_s
    while not over.wait(wait_s):
        started = time.monotonic()
        with suppress(Exception):  # Ray has no error class of its own for a store that is unreachable
            # An actor that died takes its count with it, and a batch that is done again counts twice.
            done = min(work.total, max(bar.done, work.num_done()))
            if done and not bar.done:  # before that, processes start and models are loaded
                bar.begin(done)
            bar.update(done)
        wait_s = max(least_s, _LOOK_SHARE * (time.monotonic() - started))  # thousands of actors take a while to read


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Hide Ray Data's own bars and messages while the block runs."""
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
