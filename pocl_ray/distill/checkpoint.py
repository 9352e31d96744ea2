"""Checkpoints: the training state in safetensors, the exact cursor, and the metric stream so far.

A checkpoint is a directory:

    progress.json        cursor, best dev figure, Adam steps, loss scaler, sha256 of every other file
    metrics.jsonl        every metric of the run so far
    state/*.safetensors  fp32 weights and moments by parameter name
    rollouts.safetensors the replay buffer, where `rollout.mode` is `adaptive`
    average/*/*.safetensors  averages of the weights, where `train.average` keeps any (distill/averaging.py)
    best/*.safetensors   the same for the best evaluation of this stage, where `hand_off` is `best`
    order.safetensors    the order of rows that the stage is a slice of, where rows are scored again between stages

It holds neither layout nor number of workers, so a run goes on with another ZeRO stage or another number of them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from pyarrow.fs import LocalFileSystem
from safetensors import safe_open
from safetensors.torch import save_file

from pocl_ray.curriculum.hand_off import hand_off_figure
from pocl_ray.distill.state import TrainingState
from pocl_ray.errors import StorageError
from pocl_ray.records import PROGRESS
from pocl_ray.run_directory.digests import file_digest, fingerprint
from pocl_ray.run_directory.lease import machine, started_after_boot_s
from pocl_ray.run_directory.storage import write_whole

T = TypeVar("T")


class CheckpointWriter:
    """A thread that writes checkpoints during training: it runs jobs one after the other.

    Gathering is collective and stops training; what comes after (files, digests, the way to storage) does not. Host
    memory is bounded: whoever brings more than fits waits, so a state of any size passes through. After a failed job no
    other job runs, and every call raises.
    """

    def __init__(self, buffer_bytes: int) -> None:
        """Set it up; the thread starts with the first job.

        Args:
            buffer_bytes: Memory that waiting jobs may hold; with 0 the caller runs each job at once.
        """
        self.buffer_bytes = buffer_bytes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._change = threading.Condition()
        self._num_bytes = self._num_jobs = 0
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], T], num_bytes: int = 0) -> Future[T]:
        """Queue a job, after waiting until there is memory for it.

        Args:
            job: Function to run.
            num_bytes: Memory that the job holds until it is done.

        Returns:
            A future of the job's result.
        """
        with self._change:
            self._change.wait_for(
                lambda: self._num_bytes == 0 or num_bytes == 0 or self._num_bytes + num_bytes <= self.buffer_bytes
            )
            self._raise_failure()
            self._num_bytes += num_bytes
            self._num_jobs += 1
        done = self._pool.submit(self._run, job, num_bytes)
        if self.buffer_bytes == 0:
            done.result()
        return done

    def join(self) -> None:
        """Wait until all jobs are done.

        Raises:
            Exception: A job has raised it.
        """
        with self._change:
            self._change.wait_for(lambda: self._num_jobs == 0)
            self._raise_failure()

    def close(self) -> None:
        """End the thread once all jobs are done or have failed."""
        self._pool.shutdown()

    def _run(self, job: Callable[[], T], num_bytes: int) -> T:
        try:
            self._raise_failure()
            return job()
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            del job  # and the memory that it holds
            with self._change:
                self._num_bytes -= num_bytes
                self._num_jobs -= 1
                self._change.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written.

    Attributes:
        directory: Directory of its files; the receiver of this object owns it.
        whole: Future that is done when all files are written.
    """

    directory: Path
    whole: Future[None]

    def wait(self) -> Path:
        """Return the directory once it is whole.

        Raises:
            Exception: Writing has raised it.
        """
        self.whole.result()
        return self.directory


def link_tree(source: Path, target: Path) -> None:
    """Give the files of a directory a second name in another, which stays when the first is gone; copies elsewhere."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without links
        shutil.copy2(source, target)


VERSION = 2
METRICS, STATE, BEST = "metrics.jsonl", "state", "best"
SHARD_BYTES = 1 << 30


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Return whether a record of the metric stream holds dev figures."""
    return any(key.startswith("eval/") for key in record)


class DamagedCheckpointError(StorageError):
    """A checkpoint that is not as it was written."""


@dataclass
class Progress:
    """The progress of a training run.

    Attributes:
        stage: Index of the current stage.
        num_samples: Number of global samples consumed in this stage; the cursor into its order.
        step: Optimizer steps over all stages.
        num_tokens: Number of response tokens trained on so far.
        best_figure: Best `hand_off_figure` of this stage; None before its first evaluation.
        best_loss: Dev loss at that evaluation, which decides between equal figures; None in a checkpoint of an older
            version.
        num_adam_steps: Steps that the moments have seen.
        best_adam_steps: Steps of the moments at the best evaluation.
        loss_scaler: State of the fp16 loss scaler.
        rollout: State of the adaptive rollouts.
        is_packed: Whether rows are packed. A run keeps what it began with: losses are equal up to rounding only, and
            checkpoints of older versions are of padded rows.
        micro_batch_tokens: Token budget that was found for the GPUs, kept for the same reason; None if none was.
        average: Numbers of the averages of the weights.
        best_average: The same at the best evaluation.
        metrics: Metric stream, with one record for each logged step.
    """

    stage: int = 0
    num_samples: int = 0
    step: int = 0
    num_tokens: int = 0
    best_figure: float | None = None
    best_loss: float | None = None
    num_adam_steps: int = 0
    best_adam_steps: int = 0
    loss_scaler: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    micro_batch_tokens: int | None = None
    average: dict[str, int] = field(default_factory=dict)
    best_average: dict[str, int] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def note_best(self, figures: Mapping[str, Any]) -> bool:
        """Record the dev figures of an evaluation if they are the best of this stage, and return whether they are.

        Figures of which one is not finite are never the best.
        """
        if not all(math.isfinite(value) for value in figures.values()):
            return False
        figure, loss = hand_off_figure(figures)
        if self.best_figure is not None:
            best_loss = -math.inf if self.best_loss is None else self.best_loss
            if (figure, loss) <= (self.best_figure, -best_loss):
                return False
        self.best_figure, self.best_loss = figure, -loss
        return True

    def snapshot(self) -> Progress:
        """Return a copy that stays as it is while training goes on; records are never changed once they stand."""
        return replace(self, metrics=list(self.metrics), rollout=deepcopy(self.rollout))


def write_state(state: TrainingState, kinds: tuple[str, ...], directory: Path, writer: CheckpointWriter) -> None:
    """Gather the training state and start to write it to `directory`; collective, rank 0 writes.

    Tensors are gathered one at a time, and written in files of about a gibibyte while training goes on.

    Args:
        state: State to write.
        kinds: Weights, or weights and moments.
        directory: Target directory, which is emptied first.
        writer: Writer that runs the jobs in the order of the calls; `join` waits for them.
    """
    writes = state.engine.rank == 0
    if writes:
        writer.submit(partial(_empty, directory))
    shard: dict[str, torch.Tensor] = {}
    num_files, num_bytes = 0, 0
    for kind, name, tensor in state.gather(kinds):
        if not writes:
            continue
        shard[f"{kind}/{name}"] = tensor.to("cpu", torch.float32, copy=True).contiguous()
        num_bytes += shard[f"{kind}/{name}"].nbytes
        if num_bytes >= SHARD_BYTES:
            writer.submit(partial(save_file, shard, directory / f"{num_files:05d}.safetensors"), num_bytes)
            shard, num_files, num_bytes = {}, num_files + 1, 0
    if writes and shard:
        writer.submit(partial(save_file, shard, directory / f"{num_files:05d}.safetensors"), num_bytes)


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def complete(progress: Progress, directory: Path, best: Path) -> None:
    """Complete a checkpoint whose directory holds the state: add the stage's best weights, if any, and the progress.

    Args:
        progress: Cursor at the time when the state was gathered.
        directory: Directory of the checkpoint.
        best: Directory that `write_state` wrote at the best evaluation.
    """
    if best.exists():
        link_tree(best, directory / BEST)
    write_progress(progress, directory)


def state_reader(directory: Path | None) -> Callable[[str, str], torch.Tensor]:
    """Return a function that reads (kind, parameter name) from a directory of `write_state`; None: never called."""
    files: dict[str, Any] = {}
    if directory is not None:
        for path in sorted(directory.glob("*.safetensors")):
            handle = safe_open(path, framework="pt")
            files.update(dict.fromkeys(handle.keys(), handle))

    def read(kind: str, name: str) -> torch.Tensor:
        key = f"{kind}/{name}"
        if key not in files:
            raise StorageError(f"{directory}: the checkpoint holds no {key}; it belongs to another model")
        return files[key].get_tensor(key)

    return read


def write_progress(progress: Progress, directory: Path) -> None:
    """Complete a checkpoint directory with its metric stream, cursor and digests; rank 0."""
    lines = "".join(json.dumps(record) + "\n" for record in progress.metrics)
    (directory / METRICS).write_text(lines, encoding="utf-8")
    digests = {str(path.relative_to(directory)): file_digest(path) for path in _files(directory)}
    numbers = {k: v for k, v in asdict(progress).items() if k != "metrics"}
    content = {"version": VERSION, **numbers, "sha256": digests}
    write_whole(LocalFileSystem(), str(directory / PROGRESS), json.dumps(content, indent=2).encode())


def read_progress(directory: Path) -> Progress:
    """Read a checkpoint's cursor and metric stream, and check that it is whole.

    Raises:
        DamagedCheckpointError: A file is missing, cut short or changed.
        StorageError: Another version wrote it.
    """
    place = f"checkpoint {directory.name}"
    try:
        content = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
        version, digests = content.pop("version"), content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        raise DamagedCheckpointError(f"{place}: {PROGRESS} is missing or damaged") from None
    if version != VERSION:
        raise StorageError(f"{place}: written by another version of pocl-ray")
    for rel, digest in digests.items():
        path = directory / rel
        if not path.exists() or file_digest(path) != digest:
            raise DamagedCheckpointError(f"{place}: {rel} is missing or damaged")
    metrics = [json.loads(line) for line in (directory / METRICS).read_text(encoding="utf-8").splitlines()]
    return Progress(**content, metrics=metrics)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != PROGRESS)


_NAME = re.compile(r"pocl-ray-(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<started>\d+)-")


def make_scratch() -> Path:
    """Make a directory of this process's own below `TMPDIR`, and delete those of processes that are gone.

    A worker that is killed cannot clean up, and what it leaves is as large as a checkpoint. Only directories of this
    user, made on this machine since its start, are looked at.
    """
    here, root = fingerprint(machine())[:12], Path(tempfile.gettempdir())
    for path in root.glob(f"pocl-ray-{here}-*"):
        found = _NAME.match(path.name)
        with suppress(FileNotFoundError):  # another worker deletes it in this moment
            if found and path.stat().st_uid == os.getuid() and not _runs(int(found["pid"]), int(found["started"])):
                shutil.rmtree(path, ignore_errors=True)
    pid = os.getpid()
    return Path(tempfile.mkdtemp(prefix=f"pocl-ray-{here}-{pid}-{round(started_after_boot_s(pid))}-"))


def _runs(pid: int, started_s: int) -> bool:
    try:
        return abs(started_after_boot_s(pid) - started_s) < 2.0
    except psutil.NoSuchProcess:
        return False
