"""The watch over training workers: workers that hang are found, named, and started again from the last checkpoint.

It runs in Ray Train's controller. It raises an error that the failure policy counts against `scaling.max_failures`. Ray
Train then ends the workers and starts new ones. Three things end a hang, each where the others cannot:

- a collective fails after `scaling.collective_timeout_s` in the workers that wait in it (gloo raises, NCCL's watchdog
  ends the process);
- a process that does not answer Ray Train for five minutes is dead to it (stopped, or stuck without Python's lock);
- no worker makes progress for `scaling.stall_timeout_s`, for any other reason, with one worker or many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import WorkerGroupError

from pocl_ray.errors import StalledError
from pocl_ray.heartbeat import ProcessStatus, process_status
from pocl_ray.ray_train.internals import WorkerGroupCallback, WorkerGroupPollStatus

LOOKS_A_TIMEOUT = 20
"""The number of questions to workers within `stall_timeout_s`, at most one per second."""
ANSWER_S = 3.0
_TIMED_OUT = ("Timed out waiting", "Watchdog caught collective operation timeout", "Socket Timeout")
"""The errors of gloo, NCCL and torch's store about a collective that did not end."""


@dataclass
class _Seen:
    """The state of one worker: its last answer, the time of the answer, and the open question."""

    at: float
    last: ProcessStatus | None = None
    asked: Any = None


class StallWatch(WorkerGroupCallback):
    """A callback that ends a worker group without progress."""

    def __init__(self, progress_actor: Any, stall_timeout_s: float, collective_timeout_s: float) -> None:
        """Set up the watch on the driver.

        Args:
            progress_actor: ProgressActor that receives signs of life of the controller.
            stall_timeout_s: Maximum time without progress of any worker.
            collective_timeout_s: Time limit of a collective, for the message.
        """
        self.progress_actor = progress_actor
        self.stall_timeout_s, self.collective_timeout_s = stall_timeout_s, collective_timeout_s
        self._clock: Callable[[], float] = time.monotonic
        self._workers: list[Any] = []
        self._seen: list[_Seen] = []
        self._next_look = 0.0

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Begin to watch new workers."""
        self._workers = worker_group.get_workers()
        self._seen = [_Seen(self._clock()) for _ in self._workers]

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Stop watching workers that are being shut down."""
        self._workers, self._seen = [], []

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Check the workers from time to time.

        Raises:
            WorkerGroupError: There is no progress, or a collective failed because a worker did not join it.
        """
        late = [rank for rank, error in worker_group_status.errors.items() if _timed_out(error)]
        if late:
            self._look(ANSWER_S)
            others = [rank for rank in range(len(self._seen)) if rank not in worker_group_status.errors]
            what = f"a collective did not end within {self.collective_timeout_s:.0f} s"
            raise self._failure(what, others or late, "scaling.collective_timeout_s")
        if self._clock() < self._next_look:
            return
        self._next_look = self._clock() + max(1.0, self.stall_timeout_s / LOOKS_A_TIMEOUT)
        self.progress_actor.controller_lives.remote()
        self._look(0.0)
        idle_s = min(map(self._idle_s, self._seen), default=0.0)
        if idle_s > self.stall_timeout_s:
            what = f"nothing moves since {idle_s:.0f} s"
            raise self._failure(what, list(range(len(self._seen))), "scaling.stall_timeout_s")

    def _look(self, patience_s: float) -> None:
        """Read the answers that have arrived, and ask again."""
        for worker, seen in zip(self._workers, self._seen, strict=True):
            seen.asked = seen.asked or worker.execute_async(process_status)
        ray.wait([seen.asked for seen in self._seen], num_returns=len(self._seen), timeout=patience_s)
        for seen in self._seen:
            if ray.wait([seen.asked], timeout=0)[0]:
                with suppress(RayError):  # the worker died, which Ray Train notices itself
                    seen.last, seen.at = ray.get(seen.asked), self._clock()
                seen.asked = None

    def _idle_s(self, seen: _Seen) -> float:
        return self._clock() - seen.at + (0.0 if seen.last is None else seen.last.age_s)

    def _failure(self, what: str, ranks: list[int], key: str) -> WorkerGroupError:
        """The error that Ray Train's failure policy treats like lost workers."""
        silent_s = 2 * max(1.0, self.stall_timeout_s / LOOKS_A_TIMEOUT)
        silent = {rank for rank in ranks if self._clock() - self._seen[rank].at > min(silent_s, self.stall_timeout_s)}
        statuses = {rank: self._seen[rank].last for rank in ranks}
        text = f"{what}: {blame(statuses, silent)}; if that is only slow, raise {key}"
        return WorkerGroupError(text, dict.fromkeys(ranks, StalledError(text)))


def blame(statuses: Mapping[int, ProcessStatus | None], silent: set[int]) -> str:
    """Return which workers hang, and where: those that do not answer, or else those that do not wait for others.

    Args:
        statuses: Last answer of each rank; None before the first one.
        silent: Ranks that no longer answer.
    """
    busy = {
        rank for rank, process_status in statuses.items() if process_status is not None and not process_status.waits
    }
    parts = []
    for rank in sorted(silent or busy or set(statuses)):
        process_status = statuses[rank]
        if process_status is None:
            parts.append(f"rank {rank} never answered")
        elif rank in silent:
            parts.append(f"rank {rank} ({process_status}) does not answer; it was {process_status.doing}")
        else:
            parts.append(f"rank {rank} ({process_status}), {process_status.doing}, stands in {process_status.place}")
    return "; ".join(parts)


class Silence:
    """The driver's watch over Ray Train's controller, which waits for ever for a worker that hangs at its start."""

    def __init__(self, name: str, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to watch.

        Args:
            name: Name of the task.
            limit_s: Maximum time without a sign of life of the controller, including starts of workers.
            clock: Function that returns the time in seconds.
        """
        self._name, self._limit_s, self._clock = name, limit_s, clock
        self._heard, self._at = -1, clock()

    def hear(self, num_looks: int) -> None:
        """Take the number of times that the controller has polled its workers.

        Raises:
            StalledError: The number has not changed for too long.
        """
        if num_looks != self._heard:
            self._heard, self._at = num_looks, self._clock()
        elif self._clock() - self._at > self._limit_s:
            raise StalledError(
                f"{self._name}: nothing is heard of its workers since {self._limit_s:.0f} s: one hangs while it "
                "starts, or its node does; look at the nodes and give the same command again, or raise "
                "scaling.stall_timeout_s if they are only slow"
            )


def _timed_out(error: BaseException) -> bool:
    return any(sign in str(error) for sign in _TIMED_OUT)
