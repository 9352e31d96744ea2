"""Checkpoints on their way to storage, and what an interrupted way leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.storage import StorageContext

from pocl_ray.distill.checkpoint import DamagedCheckpointError, Progress, read_progress, write_progress
from pocl_ray.ray_train.checkpoints import (
    PREFIX,
    SNAPSHOT,
    copy_checkpoint,
    keep_snapshot,
    mend_snapshot,
    prune_orphans,
)
from pocl_ray.run_directory.storage import RunDirectory

FOLDER = "checkpoints/distill-0123"
OLD, KEPT, NEWEST, LATER = (f"checkpoint_2026-11-23_10-00-0{second}.000000" for second in range(4))


def checkpoint(folder: Path) -> Path:
    (folder / "state").mkdir(parents=True)
    (folder / "best").mkdir()
    (folder / "state" / "00000.safetensors").write_bytes(b"weights and moments")
    (folder / "best" / "00000.safetensors").write_bytes(b"weights")
    write_progress(Progress(step=3, metrics=[{"step": 3}]), folder)
    return folder


def run_with(path: Path, *there: str, named: tuple[str, ...] = (KEPT, NEWEST)) -> RunDirectory:
    run_dir = RunDirectory.open(str(path), "run")
    for name in there:
        run_dir.write_text(f"{FOLDER}/{name}/state/00000.safetensors", "x")
    run_dir.write_json(f"{FOLDER}/{SNAPSHOT}", {"checkpoint_results": [{"checkpoint_dir_name": n} for n in named]})
    return run_dir


def left(run_dir: RunDirectory) -> set[str]:
    return {path.name for path in (Path(run_dir.uri) / FOLDER).iterdir()}


def test_a_copy_is_whole_and_says_so_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, copied = checkpoint(tmp_path / "from"), []
    plain = pafs.copy_files
    monkeypatch.setattr(pafs, "copy_files", lambda *a, **k: (copied.append(Path(a[0]).name), plain(*a, **k)))
    copy_checkpoint(source, pafs.LocalFileSystem(), str(tmp_path / "to"))
    assert read_progress(tmp_path / "to").step == 3
    assert copied[-1] == "progress.json"


def test_a_copy_that_ended_early_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, num_copied = checkpoint(tmp_path / "from"), 0
    plain = pafs.copy_files

    def killed(*arguments: Any, **options: Any) -> None:
        nonlocal num_copied
        num_copied += 1
        if num_copied == 4:
            raise OSError(28, "No space left on device")
        plain(*arguments, **options)

    monkeypatch.setattr(pafs, "copy_files", killed)
    with pytest.raises(OSError, match="No space"):
        copy_checkpoint(source, pafs.LocalFileSystem(), str(tmp_path / "to"))
    with pytest.raises(DamagedCheckpointError):
        read_progress(tmp_path / "to")


def test_what_was_never_taken_over_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path, OLD, KEPT, NEWEST, LATER, "notes", "checkpoint.txt")
    run_dir.write_text(f"{FOLDER}/{PREFIX}a_file", "x")
    run_dir.write_text(f"checkpoints/other-task/{OLD}/state/x", "x")
    assert prune_orphans(run_dir, FOLDER) == [OLD]
    assert left(run_dir) == {KEPT, NEWEST, LATER, "notes", "checkpoint.txt", f"{PREFIX}a_file", SNAPSHOT}
    assert run_dir.exists(f"checkpoints/other-task/{OLD}/state/x")


@pytest.mark.parametrize("snapshot", [None, "", '{"checkpoint_results": [', "{}", '{"checkpoint_results": []}'])
def test_without_a_snapshot_that_names_a_checkpoint_nothing_is_deleted(tmp_path: Path, snapshot: str | None) -> None:
    run_dir = run_with(tmp_path, OLD, KEPT)
    run_dir.delete(f"{FOLDER}/{SNAPSHOT}")
    if snapshot is not None:
        run_dir.write_text(f"{FOLDER}/{SNAPSHOT}", snapshot)
    assert prune_orphans(run_dir, FOLDER) == []
    assert {OLD, KEPT} <= left(run_dir)


def test_orphans_on_an_object_store_go_as_well(s3_bucket: str, tmp_path: Path) -> None:
    run_dir = RunDirectory.open(f"{s3_bucket}/runs", "run")
    source = checkpoint(tmp_path / "from")
    for name in (OLD, NEWEST):
        copy_checkpoint(source, run_dir.filesystem, run_dir.fs_path(f"{FOLDER}/{name}"))
    run_dir.write_json(f"{FOLDER}/{SNAPSHOT}", {"checkpoint_results": [{"checkpoint_dir_name": NEWEST}]})
    assert prune_orphans(run_dir, FOLDER) == [OLD]
    assert not run_dir.exists(f"{FOLDER}/{OLD}")
    assert read_progress(run_dir.local(f"{FOLDER}/{NEWEST}")).step == 3


@pytest.mark.parametrize("torn", ["", '{"checkpoint_results": ['])
def test_a_snapshot_that_a_kill_left_half_written_is_mended(tmp_path: Path, torn: str) -> None:
    run_dir = run_with(tmp_path, KEPT, NEWEST)
    assert not mend_snapshot(run_dir, FOLDER)
    keep_snapshot(run_dir, FOLDER)
    whole = run_dir.read_bytes(f"{FOLDER}/{SNAPSHOT}")
    assert not mend_snapshot(run_dir, FOLDER)
    run_dir.write_text(f"{FOLDER}/{SNAPSHOT}", torn)
    assert mend_snapshot(run_dir, FOLDER)
    assert run_dir.read_bytes(f"{FOLDER}/{SNAPSHOT}") == whole


def test_names_are_those_of_ray_train() -> None:
    assert SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert StorageContext.make_default_checkpoint_dir_name().startswith(PREFIX)
