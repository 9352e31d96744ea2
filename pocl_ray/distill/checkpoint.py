"""Checkpoints: the training state in safetensors, the exact cursor, and the metric stream so far.

A checkpoint is a directory:

    progress.json        cursor, best dev figure, Adam steps, loss scaler, sha256 of every other file
    metrics.jsonl        every metric of the run so far
    state/*.safetensors  fp32 weights and moments by parameter name
    rollouts.safetensors the replay buffer, where `rollout.mode` is `adaptive`
    best/*.safetensors   the same of the best evaluation of this stage, where `hand_off` is `best`
    order.safetensors    the order of rows that the stage is a slice of, where stages are scored for again

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
from safetensors import safe_open
from safetensors.torch import save_file

from pocl_ray.curriculum.hand_off import hand_off_figure
from pocl_ray.distill.state import TrainingState
from pocl_ray.errors import StorageError
from pocl_ray.records import PROGRESS
from pocl_ray.run_directory.lease import machine, started_after_boot_s
from pocl_ray.run_directory.storage import file_digest, fingerprint

# Writing checkpoints beside training: one thread that takes finished tensors to disk, in order. No Ray.
#
# Gathering is collective and stops training; what comes after (files, digests, the way to storage) does not. Host
# memory is bounded: whoever brings more than fits waits, so a state of any size passes through.

T = TypeVar("T")


class CheckpointWriter:
    """Runs jobs one after the other in a thread of its own. After a failed one no other runs, and every call raises."""

    def __init__(self, buffer_bytes: int) -> None:
        """Set it up; the thread starts with the first job.

        Args:
            buffer_bytes: What jobs may hold in memory while they wait; 0 does each of them at once, in the caller.
        """
        self.buffer_bytes = buffer_bytes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._change = threading.Condition()
        self._num_bytes = self._num_jobs = 0
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], T], num_bytes: int = 0) -> Future[T]:
        """Have a job done; waits where it holds more than there is room for.

        Args:
            job: What is to be done.
            num_bytes: Memory that is free when it is done.

        Returns:
            Its result to be.
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
            Exception: What one of them raised.
        """
        with self._change:
            self._change.wait_for(lambda: self._num_jobs == 0)
            self._raise_failure()

    def close(self) -> None:
        """End the thread once all jobs are done, whatever came of them."""
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
        directory: Where its files come to lie; whoever is given this takes it over.
        whole: Done when all of them do.
    """

    directory: Path
    whole: Future[None]

    def wait(self) -> Path:
        """Return the directory once it is whole.

        Raises:
            Exception: What the writing raised.
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


class DamagedCheckpointError(StorageError):
    """A checkpoint that is not as it was written."""


@dataclass
class Progress:
    """Where a training run stands.

    Attributes:
        stage: Index of the current stage.
        num_samples: Global samples consumed in this stage; the cursor into its order.
        step: Optimizer steps over all stages.
        num_tokens: Response tokens trained on so far.
        best_figure: Best `hand_off_figure` of this stage; None before its first evaluation.
        best_loss: The dev loss there, which decides between equal figures; None in a checkpoint of an older version.
        num_adam_steps: Steps that the moments have seen.
        best_adam_steps: The same at the best evaluation.
        loss_scaler: State of the fp16 loss scaler.
        rollout: State of the adaptive rollouts.
        metrics: The metric stream, one record a logged step.
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
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def note_best(self, figures: Mapping[str, Any]) -> bool:
        """Note the dev figures of an evaluation if they are the best of this stage, and return whether they are."""
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
    """Gather the training state and have it written to `directory`; collective, rank 0 writes.

    Tensors are gathered one at a time, and written in files of about a gibibyte while training goes on.

    Args:
        state: What is written.
        kinds: Weights, or the moments too.
        directory: Emptied first.
        writer: Does the writing, in the order of the calls; `join` tells when it is done.
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
    """Make a checkpoint of a directory that holds the state: the best weights of the stage, if any, and progress.

    Args:
        progress: The cursor at the time when the state was gathered.
        directory: The checkpoint.
        best: What `write_state` wrote at the best evaluation.
    """
    if best.exists():
        link_tree(best, directory / BEST)
    write_progress(progress, directory)


def state_reader(directory: Path | None) -> Callable[[str, str], torch.Tensor]:
    """Return a function that reads (kind, parameter name) from what `write_state` wrote; None: never called."""
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
    temporary = directory / f"{PROGRESS}.tmp"
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(temporary, directory / PROGRESS)


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


# Local directories in which checkpoints are made, and those that killed workers left behind. No Ray.

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
