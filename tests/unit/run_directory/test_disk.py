"""A full disk: known before where it can be, and said in one line where it comes anyway."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from pocl_ray.errors import ResourceError
from pocl_ray.run_directory import disk
from pocl_ray.run_directory.disk import check_free, check_free_at, disk_full, full_disk_error
from pocl_ray.run_directory.storage import RunDirectory


@pytest.fixture
def one_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))


def test_too_little_room_is_said_with_both_figures_and_a_remedy(one_gib_free: None, tmp_path: Path) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    check_free(run_dir, 1 << 29, "checkpoints", "make room")
    with pytest.raises(ResourceError, match=r"checkpoints need 2\.00 GiB and 1\.00 GiB are free; make room"):
        check_free(run_dir, 2 << 30, "checkpoints", "make room")


def test_small_sizes_are_told_in_mib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 18))
    with pytest.raises(ResourceError, match=r"checkpoints need 3\.00 MiB and 0\.25 MiB are free"):
        check_free_at(tmp_path, 3 << 20, "checkpoints", "make room")


def test_a_directory_to_be_made_is_looked_at_where_it_will_lie(one_gib_free: None, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="not/yet there"):
        check_free_at(tmp_path / "not" / "yet there", 2 << 30, "files", "make room")


def test_an_object_store_is_never_full(one_gib_free: None, s3_bucket: str) -> None:
    check_free(RunDirectory.open(f"{s3_bucket}/runs", "run"), 1 << 40, "checkpoints", "make room")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_write_to_a_full_disk_is_known_whoever_wrote() -> None:
    with pytest.raises(OSError) as plain, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert disk_full(plain.value)
    try:
        raise RuntimeError("the checkpoint was not written") from plain.value
    except RuntimeError as wrapped:
        assert disk_full(wrapped)
        assert "the disk is full while training (the checkpoint was not written)" in str(
            full_disk_error(wrapped, "training")
        )


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception) as missing:
        save_file({"x": torch.zeros(1)}, tmp_path / "no" / "such" / "folder.safetensors")
    assert not disk_full(missing.value)
    assert not disk_full(ValueError("a value"))


def test_a_full_disk_of_scratch_files_is_named_with_the_variable_that_moves_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    assert "set TMPDIR to a directory with room" in str(full_disk_error(error, "writing"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    assert "move the run to another storage_path" in str(full_disk_error(error, "writing"))
