"""Runs jobs on Ray: a few actors, each of which trains one job after the other. An actor that dies is replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from rich.markup import escape

from pocl_ray.config import ScalingConfig
from pocl_ray.console import console
from pocl_ray.errors import DivergedError, GaveUpError, UserError
from pocl_ray.ray_cluster.capacity import resources_per_worker, wants_gpu, with_accelerator

if TYPE_CHECKING:  # the driver has no use for torch and DeepSpeed
    from pocl_ray.trainings.process import Job

POLL_S = 0.5
TELL_EVERY_S = 1.0
OnDone = Callable[[str, dict[str, Any]], None]
OnLook = Callable[[dict[str, tuple[int, int]]], None]


@ray.remote(num_cpus=0)
class StepBoard:
    """Holds the progress of each running job, since an actor that trains cannot answer calls."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}

    def tell(self, job: str, step: int, num_steps: int) -> None:
        """Record the progress of a job."""
        self.steps[job] = (step, num_steps)

    def read(self) -> dict[str, tuple[int, int]]:
        """Return for each job the number of steps done, and of all its steps."""
        return self.steps


@ray.remote(max_restarts=0)
class TrainingActor:
    """A process that trains; see `process.TrainingProcess`."""

    def __init__(self, board: Any, num_threads: int, use_gpu: bool) -> None:
        self.board, self.arguments = board, (num_threads, use_gpu)
        self.process: Any = None

    def run(self, job: Job) -> dict[str, Any]:
        """Train a job and judge its student; if it diverged or failed by itself, `failure` holds the reason."""
        from pocl_ray.trainings.process import TrainingProcess

        if self.process is None:
            self.process = TrainingProcess(*self.arguments)
        told_at = 0.0

        def on_progress(step: int, num_tokens: int) -> None:
            nonlocal told_at
            if time.monotonic() - told_at > TELL_EVERY_S:
                told_at = time.monotonic()
                self.board.tell.remote(job.name, step, job.task.num_steps)

        try:
            result: dict[str, Any] = self.process.run(job, on_progress)
        except DivergedError as error:
            return {"failure": str(error)}
        return result


class Pool:
    """Actors that share a queue of jobs."""

    def __init__(self, scaling: ScalingConfig, num_actors: int) -> None:
        """Take the number of actors; each starts with its first job."""
        use_gpu = wants_gpu(scaling)
        needed = with_accelerator(resources_per_worker(scaling, use_gpu), scaling)
        self.max_failures, self.num_actors = scaling.max_failures, num_actors
        self.board = StepBoard.remote()  # type: ignore[attr-defined]
        self._arguments = (self.board, max(1, int(scaling.cpus_per_worker)), use_gpu)
        self._options: dict[str, Any] = {
            "num_cpus": needed.pop("CPU"),
            "num_gpus": needed.pop("GPU", 0),
            "resources": needed,
            "label_selector": dict(scaling.labels) or None,
        }
        self._idle: list[Any] = []
        self._told: set[str] = set()

    def run(self, jobs: Sequence[Job], on_done: OnDone, on_look: OnLook) -> None:
        """Run all jobs.

        Args:
            jobs: Jobs in the order of their start.
            on_done: Called with the name and the result of each as it ends.
            on_look: Called a few times a second with the progress of the running jobs.

        Raises:
            UserError: A job's input is wrong.
            GaveUpError: A job died more often than `scaling.max_failures` allows.
        """
        waiting = deque(jobs)
        running: dict[Any, tuple[Any, Job]] = {}
        num_failures: dict[str, int] = {}
        while waiting or running:
            while waiting and len(running) < self.num_actors:
                actor, job = self._actor(), waiting.popleft()
                running[actor.run.remote(job)] = (actor, job)
            done, _ = ray.wait(list(running), timeout=POLL_S)
            for reference in done:
                actor, job = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayActorError as error:
                    num_failures[job.name] = num_failures.get(job.name, 0) + 1
                    if num_failures[job.name] > self.max_failures:
                        raise GaveUpError(f"{job.name}: its process died {num_failures[job.name]} times") from error
                    waiting.appendleft(job)
                    continue
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                self._idle.append(actor)
                self._tell(result.pop("warnings", ()))
                on_done(job.name, result)
            steps = ray.get(self.board.read.remote())
            on_look({job.name: steps.get(job.name, (0, job.task.num_steps)) for _, job in running.values()})

    def _tell(self, warnings: Sequence[str]) -> None:
        """Print warnings that no job has given before."""
        for text in (each for each in warnings if each not in self._told):
            self._told.add(text)
            console.print(f"[yellow]warning:[/] {escape(text)}")

    def close(self) -> None:
        """End the processes."""
        for actor in [*self._idle, self.board]:
            ray.kill(actor)
        self._idle = []

    def _actor(self) -> Any:
        if self._idle:
            return self._idle.pop()
        return TrainingActor.options(**self._options).remote(*self._arguments)  # type: ignore[attr-defined]
