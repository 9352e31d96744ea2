"""The worker uploads a checkpoint during training, and reports a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as pafs
import pytest
from ray.train import Checkpoint, CheckpointUploadMode

from pocl_ray.config import TrainConfig
from pocl_ray.distill.checkpoint import PendingCheckpoint, Progress, read_progress, write_progress
from pocl_ray.errors import ResourceError, UserError
from pocl_ray.ray_train import worker
from pocl_ray.ray_train.worker import _Reporter
from pocl_ray.run_directory.storage import RunDirectory


class Train:
    """Ray Train as a worker sees it: reports are taken in a thread, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(1)
        self.taken: list[Any] = []
        self.storage = SimpleNamespace(
            storage_filesystem=pafs.LocalFileSystem(),
            build_checkpoint_path_from_name=lambda name: str(folder / name),
            _check_validation_file=lambda: None,
        )

    def context(self) -> Any:
        return SimpleNamespace(get_storage=lambda: self.storage, checkpoint_upload_threadpool=self.pool)

    def report(
        self,
        metrics: dict[str, Any],
        checkpoint: Checkpoint | None,
        checkpoint_upload_mode: CheckpointUploadMode,
        delete_local_checkpoint_after_upload: bool,
        checkpoint_upload_fn: Callable[[Checkpoint, str], Checkpoint] | None,
    ) -> None:
        assert checkpoint_upload_mode is CheckpointUploadMode.ASYNC
        assert delete_local_checkpoint_after_upload

        def take() -> None:
            assert checkpoint is not None
            assert checkpoint_upload_fn is not None
            try:
                self.taken.append(checkpoint_upload_fn(checkpoint, f"checkpoint_{metrics['step']}"))
            except Exception as error:
                self.taken.append(error)

        self.pool.submit(take)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    made = Train(tmp_path / "storage")
    monkeypatch.setattr(worker.ray.train, "report", made.report)
    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    monkeypatch.setattr(worker.ray.util, "get_node_ip_address", lambda: "10.0.0.4")
    monkeypatch.setattr(worker, "get_train_context", made.context)
    return made


def reporter(tmp_path: Path, buffer_gib: float = 4.0) -> tuple[_Reporter, list[UserError]]:
    refused: list[UserError] = []
    warn = SimpleNamespace(remote=lambda text: None)
    progress_actor = SimpleNamespace(refuse=SimpleNamespace(remote=refused.append), warn=warn)
    run_dir = RunDirectory.open(str(tmp_path), "run")
    config = TrainConfig(checkpoint_buffer_gib=buffer_gib)
    task = SimpleNamespace(run_dir=run_dir, train=config, name="distill", metrics="metrics.jsonl", num_steps=9)
    return _Reporter(task, progress_actor, rank=0), refused  # type: ignore[arg-type]


def written(tmp_path: Path, progress: Progress) -> tuple[PendingCheckpoint, Callable[[], None]]:
    """A checkpoint, and what makes it whole."""
    directory = tmp_path / f"scratch-{progress.step}"
    whole: Future[None] = Future()

    def finish() -> None:
        (directory / "state").mkdir(parents=True)
        (directory / "state" / "00000.safetensors").write_bytes(b"state")
        write_progress(progress, directory)
        whole.set_result(None)

    return PendingCheckpoint(directory, whole), finish


def test_training_goes_on_while_a_checkpoint_is_on_its_way(train: Train, tmp_path: Path) -> None:
    made, _ = reporter(tmp_path)
    progress = Progress(step=3, metrics=[{"step": 3}])
    given, finish = written(tmp_path, progress)
    made.checkpoint(progress, given)
    assert train.taken == []
    finish()
    made.wait()
    assert read_progress(train.folder / "checkpoint_3").step == 3
    assert made.task.run_dir.read_text("metrics.jsonl") == '{"step": 3}\n'


def test_a_notice_that_the_node_goes_makes_training_wait_for_that_checkpoint_alone(
    train: Train, tmp_path: Path
) -> None:
    made, _ = reporter(tmp_path)
    for step, waits in ((3, True), (4, False)):
        given, finish = written(tmp_path, Progress(step=step))
        threading.Timer(0.2, finish).start()
        if waits:
            made.node_leaves(Progress(step=step))
        made.checkpoint(Progress(step=step), given)
        assert (train.folder / f"checkpoint_{step}" / "progress.json").exists() == waits
        made.wait()


def test_without_a_buffer_training_waits_for_every_checkpoint(train: Train, tmp_path: Path) -> None:
    made, _ = reporter(tmp_path, buffer_gib=0.0)
    given, finish = written(tmp_path, Progress(step=3))
    finish()
    made.checkpoint(Progress(step=3), given)
    assert (train.folder / "checkpoint_3" / "progress.json").exists()


def test_a_full_disk_beside_training_is_told_to_the_driver_in_one_line(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "copy_checkpoint", full)
    made, refused = reporter(tmp_path)
    given, finish = written(tmp_path, Progress(step=3))
    made.checkpoint(Progress(step=3), given)
    finish()
    made.wait()
    (error,) = refused
    assert isinstance(error, ResourceError)
    assert "the disk is full while training on node 10.0.0.4" in str(error)
    assert isinstance(train.taken[0], OSError), "Ray Train hears of it as well"
    assert not made.task.run_dir.exists("metrics.jsonl")


def test_a_checkpoint_that_could_not_be_written_is_not_taken_to_storage(train: Train, tmp_path: Path) -> None:
    made, refused = reporter(tmp_path)
    given, _ = written(tmp_path, Progress(step=3))
    given.whole.set_exception(OSError(122, "Disk quota exceeded"))
    made.checkpoint(Progress(step=3), given)
    made.wait()
    assert "the disk is full" in str(refused[0])
    assert not train.folder.exists()


def test_a_snapshot_of_progress_stays_as_it_was(tmp_path: Path) -> None:
    progress = Progress(step=3, metrics=[{"step": 3}], rollout={"threshold": 0.5, "history": [1]})
    taken = progress.snapshot()
    progress.step = 4
    progress.metrics.append({"step": 4})
    progress.rollout["history"].append(2)
    assert taken == replace(progress, step=3, metrics=[{"step": 3}], rollout={"threshold": 0.5, "history": [1]})


def test_trackers_receive_what_the_metric_stream_keeps_and_nothing_else(train: Train, tmp_path: Path) -> None:
    made, _ = reporter(tmp_path)
    sent: list[int] = []
    made.stream = SimpleNamespace(log=lambda record: sent.append(record["step"]))  # type: ignore[assignment]
    made.gauges, made.last_shown = None, float("inf")
    made.progress_actor.show = SimpleNamespace(remote=lambda *_: None)
    progress = Progress()
    for step in range(1, 5):
        record = {"step": step, "train/loss": 1.0}
        if step % 2 == 0:  # as train.log_every_steps 2 does
            progress.metrics.append(record)
        made.step(progress, record)
    assert sent == [2, 4]
