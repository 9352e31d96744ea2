"""The manifest: the finished steps of a run, with the inputs and outputs of each.

A step whose fingerprint is in the manifest is not run again. The fingerprint of a step contains the fingerprints of the
steps that it depends on. So a changed setting reruns the first affected step and all steps after it, and no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray.console import console
from pocl_ray.records import STEPS
from pocl_ray.run_directory.claim import environment
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.file_shapes import VERSION
from pocl_ray.run_directory.storage import RunDirectory

FILE = "manifest.json"


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    Attributes:
        outputs: Files and directories that the step wrote, relative to the run directory.
        counts: Numbers of rows, tokens and so on, for the report; keys start with `num_`.
    """

    outputs: Sequence[str]
    counts: dict[str, Any]


def step_fingerprint(step: str, depends_on: Any) -> str:
    """Return the fingerprint of a step in the manifest."""
    return fingerprint([step, VERSION, depends_on])


class Manifest:
    """The state of a run's steps in `manifest.json`, which is written after every change."""

    def __init__(self, run_dir: RunDirectory) -> None:
        """Read the manifest if it exists.

        Raises:
            StorageError: The manifest is damaged, or another version wrote it.
        """
        self.run_dir = run_dir
        self.steps: dict[str, dict[str, Any]] = {}
        if run_dir.exists(FILE):
            self.steps = run_dir.read_json(FILE)["steps"]

    def is_done(self, step: str, expected: str) -> bool:
        """Return whether the step was finished under this fingerprint and its outputs still exist."""
        entry = self.steps.get(step)
        if entry is None or entry["status"] != "done" or entry["fingerprint"] != expected:
            return False
        return all(self.run_dir.exists(rel) for rel in entry["outputs"])

    def chosen(self, step: str, candidates: Sequence[Any]) -> Any:
        """Return the first of several dependencies under which the step is done; without one, the first of all."""
        done = (one for one in candidates if self.is_done(step, step_fingerprint(step, one)))
        return next(done, candidates[0])

    def run(self, step: str, depends_on: Any, work: Callable[[str], StepResult]) -> tuple[str, float | None]:
        """Run a step unless it is done.

        Args:
            step: Name of the step.
            depends_on: JSON-like value of everything that the result depends on, including fingerprints of earlier
                steps.
            work: Function that does the step; its argument is the fingerprint.

        Returns:
            The step's fingerprint and its duration in seconds, or None if it was done already.
        """
        own = step_fingerprint(step, depends_on)
        if self.is_done(step, own):
            return own, None
        previous = self.steps.get(step, {})
        resumed = previous.get("fingerprint") == own and previous.get("status") == "started"
        seconds_before = previous.get("seconds", 0.0) if resumed else 0.0
        entry: dict[str, Any] = {"status": "started", "fingerprint": own, "outputs": []}
        self._save(step, {**entry, "seconds": seconds_before})
        start = time.monotonic()
        try:
            result = work(own)
        except BaseException:
            self._save(step, {**entry, "seconds": seconds_before + time.monotonic() - start})
            raise
        entry = {
            **entry,
            "status": "done",
            "outputs": list(result.outputs),
            "seconds": round(seconds_before + time.monotonic() - start, 3),
            "counts": result.counts,
        }
        self._save(step, entry)
        return own, entry["seconds"]

    def forget(self, step: str) -> None:
        """Drop a step, so that it runs again; the manifest is written with the next change of another step."""
        self.steps.pop(step, None)

    def _save(self, step: str, entry: dict[str, Any]) -> None:
        self.steps[step] = entry
        self.run_dir.write_json(FILE, {"version": VERSION, "steps": self.steps})


ENVIRONMENT = "environment.json"


class Steps:
    """Runs the steps of one run directory: those that the manifest lists as done are skipped, others run and timed.

    Attributes:
        num_done: Number of steps that this process has finished; steps done earlier do not count.
        has_cluster: Whether a step has connected to the cluster.
    """

    def __init__(self, run_dir: RunDirectory, connect: Callable[[], None], on_hub: Sequence[str] = ()) -> None:
        """Read the manifest of the run directory.

        Args:
            run_dir: Run directory.
            connect: Function that connects to Ray; it is called once, before the first step that needs Ray.
            on_hub: Models and rows that are ids on the Hub.
        """
        self.run_dir = run_dir
        self.manifest = Manifest(run_dir)
        self.num_done, self.has_cluster = 0, False
        self._connect, self._on_hub = connect, on_hub

    def run(self, name: str, depends: Any, work: Callable[[str], StepResult], trains: bool = False) -> str:
        """Run a step unless it is done with the same dependencies, and return its fingerprint.

        Args:
            name: One of `STEPS`.
            depends: JSON-like value of everything that the result depends on, including fingerprints of earlier steps.
            work: Function that does the step; its argument is the fingerprint.
            trains: Whether the step trains a model; some steps need Ray only then.
        """
        needs = STEPS[name].cluster
        on_cluster = needs == "always" or (needs == "to train" and trains)

        def announced(fingerprint: str) -> StepResult:
            console.print(f"[bold]{name}[/]")
            if on_cluster and not self.has_cluster:
                self._connect()
                self.has_cluster = True
            if on_cluster or not self.run_dir.exists(ENVIRONMENT):  # without Ray the nodes are not known
                self.run_dir.write_json(ENVIRONMENT, environment(self._on_hub))
            result = work(fingerprint)
            self.num_done += 1
            return result

        fingerprint, seconds = self.manifest.run(name, depends, announced)
        console.print(f"  [dim]{name} is done already[/]" if seconds is None else f"  [dim]{seconds:.1f} s[/]")
        return fingerprint

    def forget(self, name: str) -> None:
        """Have a step run again, since the step that is running writes a file that the other one had added to."""
        self.manifest.forget(name)
