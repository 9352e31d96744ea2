"""Checkpoints in storage: the copy there, and clean-up after an interrupted copy. No Ray.

`progress.json` is copied last, so an incomplete copy is recognised. Ray Train's snapshot names the checkpoints that it
has registered.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.fs as pafs

from pocl_ray.errors import StorageError
from pocl_ray.heartbeat import touch
from pocl_ray.records import PROGRESS
from pocl_ray.run_directory.storage import RunDirectory, reason

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""The name of Ray Train's snapshot in the folder of the checkpoints."""
KEPT = "checkpoint_manager_snapshot.kept.json"
"""The name of our copy of it: Ray Train overwrites its own in place, and a kill could leave half of it."""
PREFIX = "checkpoint_"
CHUNK_BYTES = 64 << 20


def copy_checkpoint(directory: Path, filesystem: pafs.FileSystem, target: str) -> None:
    """Copy a local checkpoint to storage, file by file.

    Args:
        directory: Directory of the checkpoint.
        filesystem: Filesystem of the storage.
        target: Path on that filesystem.

    Raises:
        OSError: It cannot be written.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == PROGRESS)
    for path in files:
        touch()
        rel = path.relative_to(directory)
        filesystem.create_dir(f"{target}/{rel.parent.as_posix()}".removesuffix("/."), recursive=True)
        pafs.copy_files(
            str(path),
            f"{target}/{rel.as_posix()}",
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=filesystem,
            chunk_size=CHUNK_BYTES,
            use_threads=False,
        )
    touch()


def keep_snapshot(run_dir: RunDirectory, folder: str) -> None:
    """Copy Ray Train's snapshot once it is whole; nothing that it names is deleted before the next one is whole.

    Raises:
        StorageError: It cannot be read, or the copy written.
    """
    if isinstance(run_dir.filesystem, pafs.LocalFileSystem):  # an object store replaces a file whole, or not at all
        run_dir.write_bytes(f"{folder}/{KEPT}", run_dir.read_bytes(f"{folder}/{SNAPSHOT}"))


def mend_snapshot(run_dir: RunDirectory, folder: str) -> bool:
    """Replace a snapshot that a kill left half written by our copy, and return whether that was needed.

    Raises:
        StorageError: The storage does not answer.
    """
    if not (run_dir.exists(f"{folder}/{SNAPSHOT}") and run_dir.exists(f"{folder}/{KEPT}")):
        return False
    try:
        json.loads(run_dir.read_bytes(f"{folder}/{SNAPSHOT}"))
    except ValueError:
        run_dir.write_bytes(f"{folder}/{SNAPSHOT}", run_dir.read_bytes(f"{folder}/{KEPT}"))
        return True
    return False


def prune_orphans(run_dir: RunDirectory, folder: str) -> list[str]:
    """Delete checkpoints whose worker died during the copy, so that Ray Train never registered them.

    Call it only while no training runs there. Checkpoints newer than the newest registered one stay.

    Args:
        run_dir: Run directory.
        folder: Folder of a task's checkpoints, relative to the run directory.

    Returns:
        The names of the directories that were deleted.

    Raises:
        StorageError: The store does not answer, or refuses.
    """
    named = _taken_over(run_dir, folder)
    if not named:
        return []
    try:
        found = run_dir.filesystem.get_file_info(pafs.FileSelector(run_dir.fs_path(folder)))
    except OSError as error:
        raise StorageError(f"{run_dir.uri_of(folder)}: cannot be listed ({reason(error)})") from None
    there = {info.base_name for info in found if info.type == pafs.FileType.Directory}
    orphans = sorted(name for name in there - named if name.startswith(PREFIX) and name < max(named))
    for name in orphans:
        run_dir.delete(f"{folder}/{name}")
    return orphans


def _taken_over(run_dir: RunDirectory, folder: str) -> set[str]:
    """The names in Ray Train's snapshot; empty if it is missing or cannot be read, which Ray Train itself reports."""
    try:
        if not run_dir.exists(f"{folder}/{SNAPSHOT}"):
            return set()
        return {each["checkpoint_dir_name"] for each in run_dir.read_json(f"{folder}/{SNAPSHOT}")["checkpoint_results"]}
    except (KeyError, TypeError, StorageError):
        return set()
