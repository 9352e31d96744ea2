"""The terminal: one progress bar for long work, with a rate and an ETA; plain lines if there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_INTERVAL_S = 15.0


class Bar:
    """The progress of one step of the pipeline."""

    def __init__(self, name: str, total: int | None, unit: str, progress: Progress | None) -> None:
        self.name, self.total, self.unit, self.progress = name, total, unit, progress
        self.done, self.note, self.started = 0, "", time.monotonic()
        self.first = 0
        self._last_line = time.monotonic()
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(name, total=total, note="", rate="")

    def update(self, done: int, total: int | None = None, note: str | None = None) -> None:
        """Show the units done, the total, and a short note."""
        self.done = done
        self.total = total if total is not None else self.total
        self.note = note if note is not None else self.note
        if self.progress is not None and self._task is not None:
            self.progress.update(self._task, completed=done, total=self.total, note=self.note, rate=self._rate())
        elif time.monotonic() - self._last_line > PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            console.print(self._line())

    def begin(self, done: int = 0) -> None:
        """Start the clock of the rate now, at `done`: earlier time and units belong to start-up or to another run."""
        self.started, self.first = time.monotonic(), done

    def _rate(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{(self.done - self.first) / seconds:,.1f} {self.unit}/s" if self.done > self.first else ""

    def _line(self) -> str:
        seconds, left = time.monotonic() - self.started, ""
        if self.total and self.done > self.first:
            remaining = seconds / (self.done - self.first) * (self.total - self.done)
            left = f", {remaining:,.0f} s left"
        total = f"/{self.total:,}" if self.total else ""
        return f"  {self.name}: {self.done:,}{total} {self.unit} {self._rate()}{left}  {self.note}".rstrip()


@contextmanager
def progress_bar(name: str, total: int | None, unit: str) -> Iterator[Bar]:
    """Show a progress bar while the block runs.

    Args:
        name: Name of the work.
        total: Number of units; None while it is not known.
        unit: Name of a unit, such as `rows` or `steps`.
    """
    if not console.is_terminal:
        yield Bar(name, total, unit, None)
        return
    columns = (
        TextColumn("  {task.description:<14}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(name, total, unit, progress)
