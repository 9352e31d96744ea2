"""Running a step: skipped where the manifest says that it is done, announced and timed where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pocl_ray.console import console
from pocl_ray.run_directory.claim import environment
from pocl_ray.run_directory.manifest import Manifest, StepResult
from pocl_ray.run_directory.storage import RunDirectory

ENVIRONMENT = "environment.json"


class Steps:
    """Runs the steps of one run directory.

    Attributes:
        num_done: Steps that this process has finished; those done before do not count.
        has_cluster: Whether a step asked for the cluster, and got it.
    """

    def __init__(self, run_dir: RunDirectory, connect: Callable[[], None]) -> None:
        """Read the manifest of the run directory.

        Args:
            run_dir: The run directory.
            connect: Connects to Ray; called once, when the first step that needs it is to run.
        """
        self.run_dir = run_dir
        self.manifest = Manifest(run_dir)
        self.num_done, self.has_cluster = 0, False
        self._connect = connect

    def run(self, name: str, depends: Any, work: Callable[[str], StepResult], on_cluster: bool = False) -> str:
        """Run a step unless it is done under the same dependencies, and return its fingerprint.

        Args:
            name: As the manifest calls it.
            depends: JSON-like value of all that the result depends on, fingerprints of earlier steps included.
            work: Does the step, given its fingerprint.
            on_cluster: Whether it needs Ray.
        """

        def announced(fingerprint: str) -> StepResult:
            console.print(f"[bold]{name}[/]")
            if on_cluster and not self.has_cluster:
                self._connect()
                self.has_cluster = True
            if on_cluster or not self.run_dir.exists(ENVIRONMENT):  # a step without Ray knows no nodes
                self.run_dir.write_json(ENVIRONMENT, environment())
            result = work(fingerprint)
            self.num_done += 1
            return result

        fingerprint, seconds = self.manifest.run(name, depends, announced)
        console.print(f"  [dim]{name} is done already[/]" if seconds is None else f"  [dim]{seconds:.1f} s[/]")
        return fingerprint
