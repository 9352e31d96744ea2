"""Trainings of one run at the same time: one is watched, another runs in a thread and is waited for later."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pocl_ray.config import ScalingConfig
from pocl_ray.console import progress_bar
from pocl_ray.ray_cluster.capacity import (
    resources_per_worker,
    trials_at_once,
    usable_nodes,
    wants_gpu,
    with_accelerator,
)
from pocl_ray.ray_train.driver import POLL_S, Train, counts_of, show_on, train_watched
from pocl_ray.ray_train.progress import TrainingStatus

if TYPE_CHECKING:
    from pocl_ray.distill.task import TrainTask


class _CancelledError(Exception):
    """The training is no longer wanted."""


class BackgroundTraining:
    """A training that has begun, and whose end is waited for when its step comes."""

    def __init__(self, task: TrainTask, scaling: ScalingConfig, train: Train) -> None:
        """Begin.

        Args:
            task: Training task.
            scaling: Number of workers and their resources.
            train: Function that trains, as `train_watched` does.
        """
        self.task = task
        self._seen, self._last = TrainingStatus(), TrainingStatus()
        self._failure: BaseException | None = None
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._run, args=(scaling, train), name=task.name, daemon=True)
        self._thread.start()

    def finish(self) -> TrainingStatus:
        """Wait for the end with a progress bar, and return the final status.

        Raises:
            Exception: The training failed with it, maybe long ago; or the wait was ended, and the training goes on
                until `cancel`.
        """
        with progress_bar(self.task.name, self.task.last_step, "steps") as bar:
            show = show_on(bar)
            while self._thread.is_alive():
                self._thread.join(POLL_S)
                show(self._seen)
            show(self._seen)
        if self._failure is not None:
            raise self._failure
        return self._last

    def cancel(self) -> None:
        """End the training and free its workers; its checkpoints stay."""
        self._is_cancelled = True
        self._thread.join()

    def _run(self, scaling: ScalingConfig, train: Train) -> None:
        try:
            self._last = train(self.task, scaling, self._watch)
            self._seen = self._last
        except BaseException as error:
            self._failure = error

    def _watch(self, status: TrainingStatus) -> None:
        if self._is_cancelled:
            raise _CancelledError
        self._seen = status


def has_room_for_two(scaling: ScalingConfig) -> bool:
    """Return whether the connected cluster has room for the workers of two trainings at the same time."""
    needed = with_accelerator(resources_per_worker(scaling, wants_gpu(scaling)), scaling)
    nodes = list(usable_nodes(scaling.labels).values())
    return trials_at_once(nodes, needed, scaling.max_workers, scaling.placement) > 1


class Trainings:
    """Runs the trainings of one run."""

    def __init__(self, scaling: ScalingConfig, train: Train = train_watched) -> None:
        """Take the number of workers of each training and their resources, and the function that trains."""
        self._scaling, self._train = scaling, train
        self._behind: BackgroundTraining | None = None

    def run(self, task: TrainTask, next_to_it: TrainTask | None = None) -> dict[str, float]:
        """Train, or wait for the end if the task runs in the background; return its counts for the manifest.

        Args:
            task: Training task.
            next_to_it: Task that begins in the background, if the cluster has room for both; its step waits for it.

        Raises:
            Exception: As `train_watched`; what began in the background has then ended too.
        """
        try:  # whatever ends this, even an interruption at its first line, ends what runs in the background
            if self._behind is not None and self._behind.task.identity == task.identity:
                counts = counts_of(self._behind.finish())
                self._behind = None
                return counts
            if next_to_it is not None and self._behind is None and has_room_for_two(self._scaling):
                self._behind = BackgroundTraining(next_to_it, self._scaling, self._train)
            with progress_bar(task.name, task.last_step, "steps") as bar:
                return counts_of(self._train(task, self._scaling, show_on(bar)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what still runs in the background: its step was never asked for."""
        if self._behind is not None:
            self._behind.cancel()
            self._behind = None
