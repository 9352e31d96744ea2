"""Running a step: skipped where the manifest says that it is done, announced and timed where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pocl_ray.console import console
from pocl_ray.identity import environment
from pocl_ray.manifest import Manifest, StepResult
from pocl_ray.storage import RunDirectory


class Steps:
    """Runs the steps of one run directory."""

    def __init__(self, run_dir: RunDirectory) -> None:
        """Read the manifest of the run directory."""
        self.run_dir = run_dir
        self.manifest = Manifest(run_dir)

    def run(self, name: str, depends: Any, work: Callable[[str], StepResult]) -> str:
        """Run a step unless it is done under the same dependencies, and return its fingerprint.

        Args:
            name: As the manifest calls it.
            depends: JSON-like value of all that the result depends on, fingerprints of earlier steps included.
            work: Does the step, given its fingerprint.
        """

        def announced(fingerprint: str) -> StepResult:
            console.print(f"[bold]{name}[/]")
            self.run_dir.write_json("environment.json", environment())
            return work(fingerprint)

        fingerprint, seconds = self.manifest.run(name, depends, announced)
        console.print(f"  [dim]{name} is done already[/]" if seconds is None else f"  [dim]{seconds:.1f} s[/]")
        return fingerprint
