"""A training as trackers know it: its name and group, an id that a resumed training keeps, and the figures of a record.

All trackers receive one stream, that of `metrics.jsonl`. The process that holds the metrics sends it: the first
training worker. The results, which are written later, are sent by the driver to the same run.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from pocl_ray.errors import ConfigError
from pocl_ray.run_directory.disk import GIB
from pocl_ray.run_directory.storage import RunDirectory

FOLDER = "tracking"
"""The folder of the ids, and of files that trackers write on this machine."""

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Each tracker, by its name in the config, and the module that it needs."""

Point = tuple[int, dict[str, float]]
"""An optimizer step, and figures by name."""

PROJECTS = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME", "trackio": "TRACKIO_PROJECT"}
"""The environment variable that names the project of each tracker that has projects."""


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        ConfigError: A package is missing; the message names the extra that brings it.
    """
    for name in trackers:
        found = find_spec(PACKAGES[name])
        if found is None or found.origin is None:  # without origin: a folder `wandb` of records in the directory here
            extra = "" if name == "tensorboard" else f"[{name}]"  # TensorBoard's writer comes with pocl-ray itself
            raise ConfigError(
                f"tracking: {name} needs the package {PACKAGES[name]}, which is not installed; run "
                f"pip install 'pocl-ray{extra}', or leave {name} out"
            )


@dataclass(frozen=True)
class Tracking:
    """The part of a config that tracking needs.

    Attributes:
        trackers: Names of the trackers.
        group: Group of the trackers' runs: the name of the run, of the search or of the experiment.
        settings: Config of the training as a tree.
    """

    trackers: tuple[str, ...] = ()
    group: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedRun:
    """One training in the trackers. Its stages are one run, and a resumed training goes on in it.

    Attributes:
        run_dir: Run directory.
        name: Name of the training, such as `distill`, `control`, a trial or an arm with its seed.
        id: Id of the run in the trackers, which the run directory keeps.
        group: Group of the run.
        settings: Config of the training as a tree.
        records: Records of the metric stream so far. A tracker that lacks some of them is sent them first.
    """

    run_dir: RunDirectory
    name: str
    id: str
    group: str
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def begin(
        cls,
        tracking: Tracking,
        run_dir: RunDirectory,
        name: str,
        fingerprint: str,
        records: Sequence[Mapping[str, Any]] = (),
    ) -> TrackedRun:
        """Return the run of a training; its id is the one of an earlier start, or a new one.

        Args:
            tracking: Group and config.
            run_dir: Run directory, which keeps the id.
            name: Name of the training.
            fingerprint: Fingerprint of everything that the training depends on; with another one it is another run.
            records: Records of the metric stream so far: those of the checkpoint that training goes on from.
        """
        place = f"{FOLDER}/{name}-{fingerprint[:12]}.json"
        if run_dir.exists(place):
            own_id = str(run_dir.read_json(place)["id"])
        else:
            own_id = uuid.uuid4().hex[:12]
            run_dir.write_json(place, {"id": own_id})
        return cls(run_dir, name, own_id, tracking.group, tracking.settings, tuple(records))

    @property
    def title(self) -> str:
        """The name that a tracker shows."""
        return f"{self.group}/{self.name}"

    def project(self, tracker: str) -> str:
        """Return the project of a tracker: the one that its environment variable names, or `pocl-ray`."""
        return os.environ.get(PROJECTS[tracker]) or "pocl-ray"

    def local_folder(self) -> Path | None:
        """Return the folder for files of trackers, or None if the run directory is on an object store."""
        return Path(self.run_dir.uri) / FOLDER if "://" not in self.run_dir.uri else None


class Points:
    """Turns records of the metric stream into points.

    A step may have several records: its own, a dev evaluation, and the beginning of a stage. A key that they share is
    in the first point alone, so that a tracker has one value of it at a step.
    """

    def __init__(self) -> None:
        self._step, self._keys = -1, set[str]()

    def of(self, record: Mapping[str, Any]) -> Point:
        """Return the point of a record, which comes after the one before; it may hold no figure."""
        step, figures = int(record["step"]), figures_of(record)
        if step != self._step:
            self._step, self._keys = step, set()
        figures = {key: value for key, value in figures.items() if key not in self._keys}
        self._keys |= set(figures)
        return step, figures


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a record of the metric stream, with tokens per second."""
    figures = {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if figures.get("step_s"):
        figures["train/tokens_per_s"] = figures["num_response_tokens"] / figures["step_s"]
    return figures


def memory() -> dict[str, float]:
    """Return the memory that this process holds, that its machine has left, and the most of its GPU's, in GiB."""
    figures = {
        "system/process_memory_gib": psutil.Process().memory_info().rss / GIB,
        "system/free_memory_gib": psutil.virtual_memory().available / GIB,
    }
    torch = sys.modules.get("torch")  # a process without torch holds no GPU
    if torch is not None and torch.cuda.is_initialized():
        figures["system/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
    return figures


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of everything in a tree of mappings that is no mapping itself."""
    if not isinstance(tree, Mapping):
        yield key, tree
        return
    for name, value in tree.items():
        yield from leaves(value, f"{key}.{name}" if key else str(name))


def flat_settings(settings: Any) -> dict[str, str]:
    """Return a config as dotted keys and texts; lists are one value."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves(settings)}
