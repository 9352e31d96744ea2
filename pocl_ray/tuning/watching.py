"""The view of a search on the driver: the live table, the records of finished trials, and the release of resources."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich import box
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table

from pocl_ray.config import TuneConfig
from pocl_ray.console import console
from pocl_ray.ray_train.driver import CHECKPOINTS
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Candidate, Planner, TrialOrigins
from pocl_ray.tuning.ray_parts import PickledByName
from pocl_ray.tuning.results import TrialRecord, read_record
from pocl_ray.tuning.space import Settings

PLAIN_INTERVAL_S = 30.0
COLOURS = {"finished": "green", "stopped": "yellow", "failed": "red", "diverged": "red", "running": "cyan"}


class SearchWatch(PickledByName, tune.Callback):
    """A callback of Tune that records and shows every trial of the search."""

    def __init__(self, run_dir: RunDirectory, planner: Planner, origins: TrialOrigins, resources: Any) -> None:
        """Take the objects that are needed to name a trial by its candidate."""
        self.run_dir, self.planner, self.origins, self.resources = run_dir, planner, origins, resources
        self.records: dict[str, TrialRecord] = {}
        self.begun: dict[str, float] = {}
        self.title, self.total = "search", 0
        self._live: Live | None = None
        self.take_over()
        self._last_line = time.monotonic()

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Show a live table while the block runs, or without a terminal one line whenever a trial ends."""
        self.title, self.total = title, total
        if not console.is_terminal:
            yield
            return
        with Live(self, console=console, refresh_per_second=2, transient=True) as self._live:
            yield
        self._live = None

    def __rich__(self) -> RenderableType:
        """Return the live table."""
        return trials_table(self.records, self.planner.tune, f"{self.title}: {self._summary()}", self.begun)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial starts, or resumes after the search was killed."""
        name = self._name(trial)
        self.begun[name] = time.monotonic()
        planned = self.planner.plan(Candidate(**trial.config["candidate"]))
        self.records[name] = TrialRecord(
            name, planned.candidate, planned.fingerprint(self.origins), planned.num_steps, planned.num_samples
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an evaluation of a trial."""
        self._read(self._name(trial))
        if self._live is None and time.monotonic() - self._last_line > PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            console.print(f"  {self.title}: {self._summary()}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial reached its end, or that the scheduler stopped it."""
        self._end(trial, "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial failed; the search goes on."""
        self._end(trial, "failed", _last_line(trial.error_file) or "the trial's process died")

    def note_all(self, candidates: Iterable[Candidate]) -> None:
        """Read the records of these candidates, including those of an earlier process."""
        for candidate in candidates:
            self._read(self._name_of(candidate))

    def _end(self, trial: Any, status: Any, reason: str) -> None:
        name = self._name(trial)
        record = self._read(name)
        if record is not None and record.status == "running":
            record.status, record.reason = status, reason
            record.write(self.run_dir)
        ray.get(self.resources.release.remote(name))
        if record is not None:
            self.run_dir.delete(f"{CHECKPOINTS}/{record.name}-{record.fingerprint[:12]}")
        if self._live is None and record is not None:
            console.print(f"  {line_of(record, self.planner.tune)}")

    def _read(self, name: str) -> TrialRecord | None:
        record = read_record(self.run_dir, name)
        if record is not None:
            self.records[name] = record
        return self.records.get(name)

    def _name(self, trial: Any) -> str:
        return self._name_of(Candidate(**trial.config["candidate"]))

    def _name_of(self, candidate: Candidate) -> str:
        return self.planner.plan(candidate).name(self.origins)

    def _summary(self) -> str:
        statuses = [record.status for record in self.records.values()]
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in COLOURS if s in statuses)
        return f"{counts} of {self.total}" if counts else f"starting, {self.total} in all"


def _last_line(path: str | None) -> str:
    """The last line of a traceback, which names the error."""
    if path is None or not Path(path).exists():
        return ""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def trials_table(
    records: Mapping[str, TrialRecord], tune_config: TuneConfig, title: str, begun: Mapping[str, float]
) -> Table:
    """Return a table of the trials, in the order in which they started."""
    metrics = [objective.metric for objective in tune_config.objectives]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("values")
    for name in ("steps", *metrics, "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name, record in records.items():
        seconds = record.seconds
        if record.status == "running" and name in begun:
            seconds = time.monotonic() - begun[name]
        figures = [f"{record.last[m]:.4g}" if m in record.last else "" for m in metrics]
        steps = f"{record.last.get('num_steps', 0)}/{record.num_steps}"
        colour = COLOURS[record.status]
        table.add_row(
            record.candidate.label,
            values_text(record.candidate.settings),
            steps,
            *figures,
            f"{seconds:.0f}",
            f"[{colour}]{record.status}[/]",
        )
    return table


def values_text(settings: Settings) -> str:
    """Return settings as a short text: each key is cut to the last parts that distinguish it."""
    return "  ".join(f"{short_key(key, settings)}={_short(value)}" for key, value in settings.items())


def short_key(key: str, among: Mapping[str, Any]) -> str:
    """Return the shortest end of a dotted key that distinguishes it from the other keys."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if count >= (2 if parts[-1] in ("start", "end") else 1) and not any(
            other != key and other.endswith(f".{end}") for other in among
        ):
            return end
    return key


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line_of(record: TrialRecord, tune_config: TuneConfig) -> str:
    """Return one line about a trial."""
    figures = "  ".join(f"{o.metric} {record.last[o.metric]:.4g}" for o in tune_config.objectives if record.last)
    reason = f"  ({record.reason})" if record.reason else ""
    text = f"{record.candidate.label}  {record.status}{reason}  {figures}  {record.seconds:.0f} s"
    return f"{text}  {values_text(record.candidate.settings)}".rstrip()
