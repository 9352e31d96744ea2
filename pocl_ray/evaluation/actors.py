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
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from pocl_ray.config import ScalingConfig
from pocl_ray.console import progress_bar
from pocl_ray.disk import machine_fault
from pocl_ray.errors import ResourceError, UserError

_TASKS_IN_FLIGHT = 2  # one runs, one waits: an actor never idles, and tasks stay free for actors that come later


@dataclass(frozen=True)
class ActorPool:
    """The actors of one step of a Ray Data job.

    Attributes:
        size: How many, at most.
        num_cpus: Logical CPUs of each.
        num_gpus: GPUs of each; 0 runs on the CPU.
        accelerator_type: Kind of GPU that is asked for.
    """

    size: int
    num_cpus: float
    num_gpus: float
    accelerator_type: str | None

    @property
    def use_gpu(self) -> bool:
        """Whether the actors run on a GPU."""
        return self.num_gpus > 0

    def options(self) -> dict[str, Any]:
        """Return the arguments of `Dataset.map_batches`: a batch is a whole block of the input."""
        strategy = ActorPoolStrategy(
            min_size=1, max_size=self.size, initial_size=self.size, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT
        )
        options = {"compute": strategy, "num_cpus": self.num_cpus, "batch_size": None, "batch_format": "pyarrow"}
        if self.use_gpu:
            options["num_gpus"] = self.num_gpus
            if self.accelerator_type is not None:
                options["accelerator_type"] = self.accelerator_type
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
    total = ray.cluster_resources()
    num_gpus = _gpus_per_actor(scaling, total, len(wanted)) if wants_gpu(scaling, total) else 0.0
    room = _room(total, {"CPU": scaling.cpus_per_actor, "GPU": num_gpus})
    if room < len(wanted):
        keys = "scaling.cpus_per_actor or scaling.gpus_per_actor" if num_gpus else "scaling.cpus_per_actor"
        raise ResourceError(
            f"{len(wanted)} actors must run at once, but the cluster ({total.get('CPU', 0):g} CPUs, "
            f"{total.get('GPU', 0):g} GPUs) has room for {room}; lower {keys}"
        )
    sizes = [min(size, max(1, num_tasks)) for size in wanted]
    while sum(sizes) > room:
        sizes[sizes.index(max(sizes))] -= 1
    return [ActorPool(size, scaling.cpus_per_actor, num_gpus, scaling.accelerator_type) for size in sizes]


def _gpus_per_actor(scaling: ScalingConfig, total: dict[str, float], num_pools: int) -> float:
    """One GPU each, or an equal share of them where the pools outnumber the GPUs."""
    return scaling.gpus_per_actor or min(1.0, total.get("GPU", 0) / num_pools)


def wants_gpu(scaling: ScalingConfig, cluster: dict[str, float]) -> bool:
    """Whether actors run on GPUs.

    Raises:
        ResourceError: A GPU is asked for where the cluster has none.
    """
    has_gpu = cluster.get("GPU", 0) > 0
    if scaling.use_gpu and not has_gpu:
        raise ResourceError("scaling.use_gpu: the cluster has no GPU; set it to false, or to null for what there is")
    return has_gpu if scaling.use_gpu is None else scaling.use_gpu


def collect(dataset: Dataset, name: str, num_rows: int, unit: str) -> pa.Table:
    """Run a Ray Data job and gather its (small) output, behind a progress bar.

    Args:
        dataset: The lazy job.
        name: What is being done.
        num_rows: Rows that the job will give.
        unit: What a row is.

    Returns:
        All rows, in the order in which they came.

    Raises:
        UserError: One that an actor raised.
    """
    tables: list[pa.Table] = []
    done = 0
    with progress_bar(name, num_rows, unit) as bar:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                table = cast(pa.Table, batch)
                tables.append(table)
                done += table.num_rows
                if len(tables) == 1:  # before that, processes started and models loaded
                    bar.begin(done)
                bar.update(done)
        except RayError as error:
            raise _user_error_in(error) or error from None
    return pa.concat_tables(tables, promote_options="default")


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


def _room(total: dict[str, float], needed: dict[str, float]) -> int:
    """How many actors the cluster can hold at once."""
    return int(min((total.get(name, 0) / each + 1e-6 for name, each in needed.items() if each > 0), default=1))


def _user_error_in(error: BaseException) -> UserError | None:
    """Find the user's mistake in a chain of Ray's wrappers."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        cause = getattr(found, "cause", None)
        # RayTaskError makes an instance that is of the cause's class as well; the cause itself is the plain one.
        if isinstance(found, UserError) and not isinstance(cause, UserError):
            return type(found)(str(found).splitlines()[0])  # Ray Data adds lines about retries of its own
        if fault := machine_fault(found, "actors write"):
            return fault
        seen.add(id(found))
        pending += [found.__cause__, found.__context__, cause]
    return None
