"""The claim of a run directory by a config, and the record of the machines and versions that did the work."""

from __future__ import annotations

import os
import platform
import subprocess
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pocl_ray.config import Config
from pocl_ray.config.loading import dump_config
from pocl_ray.config.neutral import neutral_free
from pocl_ray.console import console
from pocl_ray.errors import StorageError
from pocl_ray.run_directory import lease
from pocl_ray.run_directory.file_shapes import damaged
from pocl_ray.run_directory.paths import hub_id, is_remote
from pocl_ray.run_directory.storage import RunDirectory

CONFIG = "config.yaml"
PACKAGES = ("pocl-ray", "ray", "torch", "deepspeed", "transformers", "datasets", "pyarrow", "numpy")

SIGNALS = "difficulty.signals"
COSTLY = ("checkpoints", "responses", "scores", "scores.parquet", "teacher_cache")


class Claim:
    """A run directory that is taken for a config. It can be given back unchanged after an early mistake of the user.

    Attributes:
        run_dir: Run directory.
        lease: Lease that excludes other runs until it is released, at the latest when the claim is deleted.
    """

    def __init__(self, config: Config, resume_with_changes: bool) -> None:
        """Take the directory, or raise an error.

        Raises:
            StorageError: The directory cannot be written, another run writes there, or it belongs to a run with another
                config. The message names the differences.
        """
        self.run_dir = RunDirectory.open(config.storage_path, config.name, create=False)
        self._existed = self.run_dir.exists("")
        self._storage_existed = is_remote(config.storage_path) or Path(self.run_dir.uri).parent.exists()
        RunDirectory.open(config.storage_path, config.name)
        self.lease = lease.take(self.run_dir, console.print)
        weakref.finalize(self, self.lease.release)
        try:
            _check_owner(self.run_dir, config, resume_with_changes)
            self._before = self.run_dir.read_bytes(CONFIG) if self.run_dir.exists(CONFIG) else None
            self.run_dir.write_text(CONFIG, dump_config(config))
        except StorageError:
            self.lease.release()
            raise

    def undo(self, keep_config: bool) -> None:
        """Give the directory back: delete a new one, restore the config of an old one.

        Args:
            keep_config: Whether steps were done under the new config, which an old directory then keeps.
        """
        self.lease.release()
        if self.lease.lost_to is not None:
            return
        if not self._existed:
            self.run_dir.delete("")
            if not self._storage_existed:
                with suppress(OSError):  # another process may use it by now
                    Path(self.run_dir.uri).parent.rmdir()
        elif not keep_config and self._before is not None:
            self.run_dir.write_bytes(CONFIG, self._before)


def parse_config(data: bytes, place: str) -> Config:
    """Return the config of a run.

    Args:
        data: Content of its config.yaml.
        place: Path or URL of the file, for the message.

    Raises:
        StorageError: The file is damaged, or another version of pocl-ray wrote it.
    """
    try:
        tree = yaml.safe_load(data.decode())
        if not isinstance(tree, dict):
            raise ValueError("no keys and values")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        remedy = "put a copy in its place, or write it again by `pocl-ray run CONFIG --resume-with-changes`"
        raise damaged(place, error, remedy) from None
    try:
        return Config.model_validate(tree)
    except ValidationError:
        raise StorageError(
            f"{place}: written by another version of pocl-ray ({CONFIG} has other keys); use the version that "
            "environment.json names, or choose another name"
        ) from None


def _check_owner(run_dir: RunDirectory, config: Config, resume_with_changes: bool) -> None:
    """Refuse a directory with work under another config; a directory without costly work is free."""
    if run_dir.exists(CONFIG) and any(map(run_dir.exists, COSTLY)) and not resume_with_changes:
        earlier = parse_config(run_dir.read_bytes(CONFIG), run_dir.uri_of(CONFIG))
        changes = list(differences(neutral_free(earlier), neutral_free(config)))
        if changes:
            raise StorageError(
                f"{run_dir.uri}: belongs to a run with another config: {'; '.join(changes)}. Choose another name, or "
                "pass --resume-with-changes to run the steps that this concerns again"
            )


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yield `key: before -> now` for each value that differs, and for the order of signals, which decides ties."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if key == SIGNALS and {*before} == {*now} and [*before] != [*now]:
            yield f"{key}: {', '.join(before)} -> {', '.join(now)} (the order)"
        for name in sorted({*before, *now}):
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif before != now:
        yield f"{key}: {before!r} -> {now!r}"


def places_on_hub(config: Config) -> list[str]:
    """Return the models and rows of a config that are ids on the Hub, since nothing of their name is on this machine.

    Only where the run works can this be told: seen from another directory a relative path looks like an id.
    """
    data, models = config.data, (config.teacher, *config.other_teachers, config.student)
    sources = (data.train, data.dev, *data.tests.values())
    paths = [*(model.path for model in models), *(source.path for source in sources if source is not None)]
    return sorted({path for path in paths if path is not None and hub_id(path)})


def environment(on_hub: Sequence[str] = ()) -> dict[str, Any]:
    """Return versions, the project's git revision, the nodes of the connected cluster, and what is on the Hub."""
    import ray

    nodes = [
        {
            "cpus": node["Resources"].get("CPU", 0),
            "gpus": node["Resources"].get("GPU", 0),
            "memory_gib": round(node["Resources"].get("memory", 0) / 2**30, 1),
            "devices": sorted(
                k.removeprefix("accelerator_type:") for k in node["Resources"] if "accelerator_type" in k
            ),
        }
        for node in (ray.nodes() if ray.is_initialized() else [])
        if node["Alive"]
    ]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "nodes": nodes,
        "on_hub": list(on_hub),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    project = Path(__file__).resolve().parents[2]
    if not (project / ".git").exists():
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
