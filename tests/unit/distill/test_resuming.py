"""A damaged checkpoint is never trained on: the newest whole one is, on every worker the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocl_ray.distill.checkpoint import METRICS, STATE, Progress, write_progress
from pocl_ray.distill.setup import newest_whole, resume
from pocl_ray.errors import StorageError
from pocl_ray.records import PROGRESS


class Stored:
    """A checkpoint in storage; only its directory counts here."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        if not Path(self.path).exists():
            raise FileNotFoundError(self.path)
        yield self.path


class Loop:
    """A training loop that only remembers what it was given."""

    def __init__(self, rank: int) -> None:
        self.engine = SimpleNamespace(rank=rank)
        self.restored: tuple[Progress, Path | None] | None = None

    def restore(self, progress: Progress, directory: Path | None) -> None:
        self.restored = (progress, directory)


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Stored]:
    """Three checkpoints of a run, the newest first."""
    made = []
    for step in (1, 2, 3):
        directory = tmp_path / f"checkpoint_{step}"
        (directory / STATE).mkdir(parents=True)
        (directory / STATE / "00000.safetensors").write_bytes(bytes([step]) * 100)
        write_progress(Progress(step=step, metrics=[{"step": step}]), directory)
        made.append(Stored(directory))
    return made[::-1]


def truncate(checkpoint: Stored, rel: str) -> None:
    path = Path(checkpoint.path) / rel
    path.write_bytes(path.read_bytes()[:-7])


def chosen(checkpoints: Sequence[Stored], warnings: list[str]) -> int | None:
    with newest_whole(checkpoints, warnings.append) as found:
        return None if found is None else found[0].step


def test_the_newest_is_used_where_it_is_whole(checkpoints: list[Stored]) -> None:
    warnings: list[str] = []
    assert chosen(checkpoints, warnings) == 3
    assert chosen([], warnings) is None
    assert not warnings


@pytest.mark.parametrize("rel", [f"{STATE}/00000.safetensors", METRICS, PROGRESS])
def test_a_file_cut_short_falls_back_to_the_one_before_with_a_warning(checkpoints: list[Stored], rel: str) -> None:
    truncate(checkpoints[0], rel)
    warnings: list[str] = []
    assert chosen(checkpoints, warnings) == 2
    assert warnings == [f"checkpoint checkpoint_3: {rel} is missing or damaged; going on from the one before"]


def test_a_file_with_other_content_of_the_same_size_counts_as_damaged(checkpoints: list[Stored]) -> None:
    (Path(checkpoints[0].path) / STATE / "00000.safetensors").write_bytes(b"\7" * 100)
    assert chosen(checkpoints, []) == 2


def test_a_missing_file_and_a_missing_directory_are_passed_over_one_after_the_other(checkpoints: list[Stored]) -> None:
    shutil.rmtree(checkpoints[0].path)
    (Path(checkpoints[1].path) / STATE / "00000.safetensors").unlink()
    warnings: list[str] = []
    assert chosen(checkpoints, warnings) == 1
    assert len(warnings) == 2


def test_nothing_whole_ends_the_run_and_says_what_to_delete(checkpoints: list[Stored], tmp_path: Path) -> None:
    for checkpoint in checkpoints:
        truncate(checkpoint, METRICS)
    with pytest.raises(StorageError, match=f"no whole one before it; delete {tmp_path} to"):
        chosen(checkpoints, [])


def test_a_checkpoint_of_another_version_is_no_damage(checkpoints: list[Stored]) -> None:
    path = Path(checkpoints[0].path) / PROGRESS
    path.write_text(path.read_text().replace('"version": 2', '"version": 99'))
    with pytest.raises(StorageError, match="written by another version"):
        chosen(checkpoints, [])


def test_all_workers_go_on_from_the_checkpoint_that_rank_0_chose(checkpoints: list[Stored]) -> None:
    truncate(checkpoints[0], METRICS)
    told: list[Any] = []
    first, second = Loop(0), Loop(1)

    def share(value: Any) -> Any:
        if value is not None:
            told.append(value)
        return told[0]

    resume(first, checkpoints, share, lambda _: None)  # type: ignore[arg-type]
    resume(second, [], share, pytest.fail)  # type: ignore[arg-type]
    assert first.restored is not None
    assert second.restored is not None
    assert first.restored[1] == Path(checkpoints[1].path)
    assert second.restored == (replace(first.restored[0], metrics=[]), None)
    assert first.restored[0].metrics == [{"step": 2}]


def test_all_workers_give_up_together(checkpoints: list[Stored]) -> None:
    for checkpoint in checkpoints:
        truncate(checkpoint, METRICS)
    told: list[Any] = []

    def share(value: Any) -> Any:
        if value is not None:
            told.append(value)
        return told[0]

    for rank in (0, 1):
        with pytest.raises(StorageError, match="no whole one"):
            resume(Loop(rank), checkpoints if rank == 0 else [], share, lambda _: None)  # type: ignore[arg-type]


def test_a_run_without_checkpoints_starts_at_the_start() -> None:
    loop = Loop(0)
    resume(loop, [], lambda value: value, pytest.fail)  # type: ignore[arg-type]
    assert loop.restored is None
