"""The metric stream on its way to the trackers: one thread for each, so that none of them can hold training up.

A tracker that is down, has no key or breaks is one warning. Training goes on, and the other trackers too.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from rich.markup import escape

from pocl_ray.config import Config
from pocl_ray.console import console
from pocl_ray.plugins import reason
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tracking.results import Results, read_results
from pocl_ray.tracking.run import Point, Points, TrackedRun, Tracking
from pocl_ray.tracking.trackers import Tracker, open_tracker

MAX_WAITING = 10_000
"""The records that may wait for one tracker. A tracker that falls further behind is given up."""

MAX_REASON_CHARS = 300
"""The characters of an error that a warning shows; some clients put the whole request into theirs."""

CLOSE_S = 60.0
"""The seconds that the end of a training waits for trackers."""

Open = Callable[[str, TrackedRun, Sequence[Point]], Tracker]


@dataclass(frozen=True)
class End:
    """The end of a stream: of a training that is done, or of one that has failed."""

    has_failed: bool = False


class Stream:
    """Sends figures and results to all trackers of a run."""

    def __init__(
        self, run: TrackedRun, trackers: tuple[str, ...], warn: Callable[[str], object], opens: Open = open_tracker
    ) -> None:
        """Start one thread for each tracker; it opens its tracker first, with the points of the records so far.

        Args:
            run: Run that the trackers show.
            trackers: Names of the trackers.
            warn: Function that is called with a warning, from the thread of the tracker.
            opens: Function that opens a tracker.
        """
        self._points = Points()
        history = [point for point in map(self._points.of, run.records) if point[1]] if trackers else []
        self._senders = [_Sender(name, run, history, warn, opens) for name in trackers]

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record of the metric stream; this returns at once."""
        if not self._senders:
            return
        point = self._points.of(record)
        for sender in self._senders if point[1] else ():
            sender.put(point)

    def send_results(self, results: Results) -> None:
        """Send the results of a run; this returns at once."""
        for sender in self._senders:
            sender.put(results)

    def close(self, timeout_s: float = CLOSE_S, has_failed: bool = False) -> None:
        """Wait until everything is sent, but no longer than `timeout_s` for all trackers together.

        Args:
            timeout_s: Seconds to wait.
            has_failed: Whether the training has failed, which trackers show if they can.
        """
        for sender in self._senders:
            sender.put(End(has_failed))
        deadline = time.monotonic() + timeout_s
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
            if sender.is_alive():
                sender.give_up(f"it has not taken everything {timeout_s:g} s after the end; the rest is not sent")


class _Sender(threading.Thread):
    """The thread of one tracker."""

    def __init__(
        self, name: str, run: TrackedRun, history: Sequence[Point], warn: Callable[[str], object], opens: Open
    ) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)  # a tracker that hangs must not keep the process
        self._tracker, self._run, self._history, self._warn, self._opens = name, run, history, warn, opens
        self._queue: queue.Queue[Point | Results | End] = queue.Queue(MAX_WAITING)
        self._has_failed = threading.Event()
        self.start()

    def put(self, item: Point | Results | End) -> None:
        """Hand an item to the thread."""
        if self._has_failed.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.give_up(f"{MAX_WAITING:,} records wait for it")

    def give_up(self, why: str) -> None:
        """Warn once, and take nothing more."""
        if not self._has_failed.is_set():
            self._has_failed.set()
            self._warn(f"tracking: {self._tracker}: {why}; the run goes on without it")

    def run(self) -> None:
        """Open the tracker, and send what comes until the end."""
        try:
            tracker = self._opens(self._tracker, self._run, self._history)
            while (end := self._send(tracker, self._queue.get())) is None:
                pass
            tracker.close(end.has_failed)
        except Exception as error:  # code of a tracker, and a network, may fail in any way
            self.give_up(shorten(reason(error), MAX_REASON_CHARS, placeholder=" ..."))

    def _send(self, tracker: Tracker, item: Point | Results | End) -> End | None:
        """Send an item, and with a point all points that wait behind it; return the end once it is there."""
        points: list[Point] = []
        while isinstance(item, tuple):
            points.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
        if points:
            tracker.log(points)
        if isinstance(item, Results):
            tracker.log_results(item)
        if self._has_failed.is_set():  # it was given up in the meantime
            return End()
        return item if isinstance(item, End) else None


def send_results(
    config: Config, run_dir: RunDirectory, trained: tuple[str, str], step: int, sets: Mapping[str, RowsSummary]
) -> None:
    """Send the results of a run to the trackers' run of its distillation; what they do not take is a warning.

    Steps that a tracker has not taken during the training, such as those of an hour without a server, are sent first.

    Args:
        config: Config of the run.
        run_dir: Run directory.
        trained: Name and fingerprint of the training.
        step: Number of its optimizer steps.
        sets: Test sets.
    """
    records = [json.loads(line) for line in run_dir.read_text("metrics.jsonl").splitlines()]
    tracking = Tracking(config.tracking, config.name, config.model_dump(mode="json"))
    run = TrackedRun.begin(tracking, run_dir, *trained, records)
    stream = Stream(run, config.tracking, lambda text: console.print(f"[yellow]warning:[/] {escape(text)}"))
    tasks = [task.name for task in config.evaluation.tasks]
    stream.send_results(read_results(run_dir, step, sets, config.report.num_examples, tasks))
    stream.close()
