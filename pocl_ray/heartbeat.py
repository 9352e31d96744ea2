"""The heartbeat of a process: the time of its last progress, and its place in the code.

Code that computes calls `beat` for every batch, file or tensor. A watcher reads `process_status` in another thread of
the process, or receives it. The process measures the age itself, so the clocks of two machines are never compared.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_WAITS_IN = ("packages/torch/distributed/", "packages/ray/", "packages/deepspeed/comm/")
_STANDARD_LIBRARY = Path(threading.__file__).parent.as_posix()


@dataclass(frozen=True)
class ProcessStatus:
    """The state of a process.

    Attributes:
        age_s: Seconds since the last progress; 0 while the process has nothing to do.
        doing: Description of the work.
        place: Current line of code, and its function.
        waits: Whether the process waits for another one, in a collective or in a call of Ray.
        host: Name of the machine.
        pid: Id of the process.
        num_done: Number of rows that the process has got through, each as often as a model went over it.
    """

    age_s: float
    doing: str
    place: str
    waits: bool
    host: str
    pid: int
    num_done: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Heartbeat:
    """The heartbeat of one process; only one thread at a time may call `beat`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with a beat and without work."""
        self._clock = clock
        self._thread = threading.get_ident()
        self._at, self._doing, self._is_idle = clock(), "starting", False
        self._num_done = 0

    def beat(self, doing: str) -> None:
        """Record progress; `doing` is a short description of the work that comes next."""
        self._thread, self._doing, self._is_idle = threading.get_ident(), doing, False
        self._at = self._clock()

    def touch(self) -> None:
        """Record progress of another thread that the work waits for."""
        self._at = self._clock()

    def advance(self, num_rows: int) -> None:
        """Count rows that a model has gone over, for the progress of a job."""
        self._num_done += num_rows

    def rest(self) -> None:
        """Record that there is nothing to do."""
        self._is_idle = True

    def process_status(self) -> ProcessStatus:
        """Return the state of the process; called from another thread than the working one."""
        age_s = 0.0 if self._is_idle else self._clock() - self._at
        frame = sys._current_frames().get(self._thread)
        place, waits = _place(frame)
        return ProcessStatus(age_s, self._doing, place, waits, socket.gethostname(), os.getpid(), self._num_done)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line outside of the standard library, and whether it waits for another process."""
    while frame is not None and _is_standard(frame) and frame.f_back is not None:
        frame = frame.f_back
    if frame is None:
        return "a thread that is gone", False
    path = Path(frame.f_code.co_filename)
    place = f"{path.parent.name}/{path.name}:{frame.f_lineno}, {frame.f_code.co_name}"
    return place, any(part in path.as_posix() for part in _WAITS_IN)


def _is_standard(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename).as_posix()
    return path.startswith(_STANDARD_LIBRARY) and "-packages/" not in path


_HEARTBEAT = Heartbeat()
"""The heartbeat of this process."""

# Functions and not bound methods: Ray sends them to a worker by name, where they use the worker's own heartbeat.


def beat(doing: str) -> None:
    """Record progress of this process; see `Heartbeat.beat`."""
    _HEARTBEAT.beat(doing)


def touch() -> None:
    """Record progress that this process waits for; see `Heartbeat.touch`."""
    _HEARTBEAT.touch()


def advance(num_rows: int) -> None:
    """Count rows that a model has gone over; see `Heartbeat.advance`."""
    _HEARTBEAT.advance(num_rows)


def rest() -> None:
    """Record that this process has nothing to do."""
    _HEARTBEAT.rest()


def process_status() -> ProcessStatus:
    """Return the state of this process."""
    return _HEARTBEAT.process_status()
