"""The manifest: which steps of a run are finished, what each depended on, and what it wrote.

A step whose fingerprint stands here is not run again. A step that another one rests on passes its own fingerprint
on, so a changed setting reruns the first step that it concerns and everything after it, and only that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray.errors import StorageError
from pocl_ray.run_directory.storage import RunDirectory, fingerprint

FILE = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class StepResult:
    """What a step says of itself when it is done.

    Attributes:
        outputs: Files and directories it wrote, relative to the run directory.
        counts: Rows, tokens and the like, for the report; keys start with `num_`.
    """

    outputs: Sequence[str]
    counts: dict[str, Any]


def step_fingerprint(step: str, depends_on: Any) -> str:
    """Return the fingerprint under which a step stands in the manifest."""
    return fingerprint([step, VERSION, depends_on])


class Manifest:
    """The state of a run's steps, in `manifest.json`; written after every change."""

    def __init__(self, run_dir: RunDirectory) -> None:
        """Read the manifest where there is one.

        Raises:
            StorageError: It is damaged, or another version wrote it.
        """
        self.run_dir = run_dir
        self.steps: dict[str, dict[str, Any]] = {}
        if run_dir.exists(FILE):
            content = run_dir.read_json(FILE)
            if not isinstance(content, dict) or content.get("version") != VERSION:
                raise StorageError(
                    f"{run_dir.uri_of(FILE)}: written by another version of pocl-ray; choose another name"
                )
            self.steps = content["steps"]

    def is_done(self, step: str, expected: str) -> bool:
        """Whether the step was finished under this fingerprint and its outputs are still there."""
        entry = self.steps.get(step)
        if entry is None or entry["status"] != "done" or entry["fingerprint"] != expected:
            return False
        return all(self.run_dir.exists(rel) for rel in entry["outputs"])

    def run(self, step: str, depends_on: Any, work: Callable[[str], StepResult]) -> tuple[str, float | None]:
        """Run a step unless it is done.

        Args:
            step: Name of the step.
            depends_on: JSON-like value of all that the result depends on, fingerprints of earlier steps included.
            work: Does the step; it is given the fingerprint.

        Returns:
            The step's fingerprint, and the seconds that it took; None where it was done already.
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

    def _save(self, step: str, entry: dict[str, Any]) -> None:
        self.steps[step] = entry
        self.run_dir.write_json(FILE, {"version": VERSION, "steps": self.steps})
