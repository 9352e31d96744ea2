"""A run directory of the past, opened by its place: what is done there, and refusals of what cannot be read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl_ray.config import Config
from pocl_ray.errors import StorageError
from pocl_ray.run_directory.claim import CONFIG, parse_config
from pocl_ray.run_directory.manifest import FILE as MANIFEST
from pocl_ray.run_directory.manifest import Manifest
from pocl_ray.run_directory.paths import is_remote, local_path
from pocl_ray.run_directory.storage import RunDirectory


@dataclass(frozen=True)
class PastRun:
    """A run that was started, and perhaps finished.

    Attributes:
        place: Directory or URL as the user gave it.
        run_dir: Run directory.
        config: Config of the run.
        steps: Steps of the manifest.
    """

    place: str
    run_dir: RunDirectory
    config: Config
    steps: dict[str, dict[str, Any]]

    def is_done(self, step: str) -> bool:
        """Return whether a step is done."""
        return self.steps.get(step, {}).get("status") == "done"

    def require(self, steps: Iterable[str]) -> None:
        """Check that steps are done.

        Raises:
            StorageError: Some are not; the message names what there is and what is missing.
        """
        missing = [step for step in steps if not self.is_done(step)]
        if missing:
            done = ", ".join(step for step in self.steps if self.is_done(step)) or "nothing"
            raise StorageError(
                f"{self.place}: the run is not finished: done are {done}; missing: {', '.join(missing)}; go on with "
                f"`pocl-ray run {self.run_dir.uri_of(CONFIG)}`"
            )


def open_past_run(place: str) -> PastRun:
    """Open the run directory at a path or URL.

    Raises:
        StorageError: No run stands there, or another version of pocl-ray wrote it.
    """
    uri = place.rstrip("/") if is_remote(place) else str(local_path(place))
    run_dir = RunDirectory(uri)
    if missing := [name for name in (CONFIG, MANIFEST) if not run_dir.exists(name)]:
        told = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
        hint = f"{told}; give the directory <storage_path>/<name> of a run"
        raise StorageError(f"{place}: no run stands there: {hint}{_near_runs(uri)}")
    steps = Manifest(run_dir).steps
    return PastRun(place, run_dir, parse_config(run_dir.read_bytes(CONFIG), run_dir.uri_of(CONFIG)), steps)


def _near_runs(uri: str) -> str:
    """The end of a message: the run around a folder of it, or runs of a similar name here and in `runs`."""
    if is_remote(uri):
        return ""
    path = Path(uri)
    folders = dict.fromkeys((path.parent, Path("runs").absolute()))
    there = {mark.parent.name: mark.parent for folder in folders for mark in folder.glob("*/manifest.json")}
    near = [there[name] for name in difflib.get_close_matches(path.name, there, n=3) if there[name] != path]
    near = [path.parent] if (path.parent / "manifest.json").exists() else near
    return f"; did you mean {' or '.join(os.path.relpath(run) for run in near)}?" if near else ""
