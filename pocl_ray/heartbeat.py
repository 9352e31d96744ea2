"""The heartbeat of a process: when it last made progress, and where in the code it is now.

Code that computes calls `beat` for every batch, file or tensor. A watcher reads `process_status` from another thread of
the process, or has it sent. The process measures ages itself, so the clocks of two machines are never compared.
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
    """State of a process.

    Attributes:
        age_s: Seconds since it last got on; 0 while it has nothing to do.
        doing: What it was at.
        place: The line of code where it stands, and the function.
        waits: Whether that is inside a collective, or a call of Ray's, so that it waits for another process.
        host: Name of its machine.
        pid: The process.
    """

    age_s: float
    doing: str
    place: str
    waits: bool
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Heartbeat:
    """The heartbeat of one process; one thread at a time beats."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with a beat, at nothing."""
        self._clock = clock
        self._thread = threading.get_ident()
        self._at, self._doing, self._is_idle = clock(), "starting", False

    def beat(self, doing: str) -> None:
        """Work went on; `doing` says what is next, in a few words."""
        self._thread, self._doing, self._is_idle = threading.get_ident(), doing, False
        self._at = self._clock()

    def touch(self) -> None:
        """Something went on that the work waits for, in another thread."""
        self._at = self._clock()

    def rest(self) -> None:
        """There is nothing to do."""
        self._is_idle = True

    def process_status(self) -> ProcessStatus:
        """Return how the process is; called from another thread than the one that works."""
        age_s = 0.0 if self._is_idle else self._clock() - self._at
        frame = sys._current_frames().get(self._thread)
        return ProcessStatus(age_s, self._doing, *_place(frame), socket.gethostname(), os.getpid())


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line that is not the standard library's, and whether it waits for another process."""
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
"""Of this process."""

# Functions, not bound methods: Ray sends them to a worker by name, and there they mean the worker's own heartbeat.


def beat(doing: str) -> None:
    """Note that this process's work went on; see `Heartbeat.beat`."""
    _HEARTBEAT.beat(doing)


def touch() -> None:
    """Note that something went on that its work waits for."""
    _HEARTBEAT.touch()


def rest() -> None:
    """Note that it has nothing to do."""
    _HEARTBEAT.rest()


def process_status() -> ProcessStatus:
    """Return how it is."""
    return _HEARTBEAT.process_status()
