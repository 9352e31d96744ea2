"""Helpers of the tests of faults: waiting for a moment, finding the processes of Ray's actors, and a driver to kill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import ROOT, cli_environment, command, metrics

WEIGHTS = "student/model.safetensors"
DISTILLED = ("student", "metrics.jsonl", "checkpoints/distill-*")
PATIENCE_S = 600.0
LOOK_EVERY_S = 0.05
"""To look takes a part of a core from what is looked at, as it goes through all processes of the machine."""
IS_LONG_FORM = os.environ.get("POCL_FAULTS") == "all"
long_form = pytest.mark.skipif(not IS_LONG_FORM, reason="part of `make test-faults`")
"""Marks what `make test` leaves out; hangs, announced losses and elastic runs, among others, are only here."""


def wait_for(happened: Callable[[], Any], what: str, is_over: Callable[[], bool]) -> Any:
    """Wait until something is true, and return it; what it waits on must not be over before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert not is_over(), f"all was over before {what}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(LOOK_EVERY_S)
    return found


def outliving(processes: list[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Those that are still there after a while; a dead one that its new parent has not waited for yet is not."""
    deadline = time.monotonic() + within_s
    while (left := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_of(actor: str, parent: psutil.Process) -> list[psutil.Process]:
    """The processes below `parent` in which a Ray actor of this class runs."""
    return [child for child in parent.children(recursive=True) if actor in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""


def is_core(process: psutil.Process) -> bool:
    return Path(_title(process).split(" ")[0]).name in ("raylet", "gcs_server")


@contextmanager
def started(*arguments: str, log: Path | None = None, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start `pocl-ray`; nothing of it is left behind. Ray's agents look for their raylet every few seconds only.

    Args:
        arguments: Arguments of the command.
        log: File of its output; None for no file.
        env: More of its environment, such as `RAY_ADDRESS`.
    """
    with open(log or os.devnull, "wb") as output:
        driver = subprocess.Popen(
            command(*arguments), cwd=ROOT, env={**cli_environment(), **env}, stdout=output, stderr=output
        )
    itself, seen = psutil.Process(driver.pid), set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            with suppress(psutil.NoSuchProcess):
                seen.update(itself.children(recursive=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield driver
    finally:
        stop.set()
        watcher.join()
        driver.kill()
        driver.wait()
        for process in seen:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def has_checkpoint(run: Path, task: str = "distill", stream: str = "metrics.jsonl") -> bool:
    """Whether Ray Train has taken a checkpoint over; some more are to come, so the training is in mid-stage.

    Args:
        run: Run directory.
        task: The training's name, with which the folder of its checkpoints begins.
        stream: Pattern of its metric stream.
    """
    snapshots = run.glob(f"checkpoints/{task}-*/checkpoint_manager_snapshot.json")
    return any(run.glob(stream)) and any(_taken_over(path) for path in snapshots)


def _taken_over(snapshot: Path) -> bool:
    try:
        return json.loads(snapshot.read_text())["latest_checkpoint_result"] is not None
    except ValueError:  # half written
        return False


def begun(run: Path) -> list[dict[str, Any]]:
    """The metrics before the first checkpoint, with the seconds that each step took: a new beginning has others."""
    return metrics(run / "metrics.jsonl")[:3]


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl without the seconds that each step took, and the memory that was in use."""
    return [
        {key: value for key, value in record.items() if key != "step_s" and not key.startswith("system/")}
        for record in metrics(path)
    ]


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of distillation that Ray Train has taken over and kept, the oldest first."""
    (snapshot,) = run.glob("checkpoints/distill-*/checkpoint_manager_snapshot.json")
    taken = json.loads(snapshot.read_text())["checkpoint_results"]
    return [snapshot.parent / result["checkpoint_dir_name"] for result in taken]


def last_step(run: Path) -> int:
    """The step of the newest checkpoint of distillation that Ray Train has taken over."""
    (snapshot,) = run.glob("checkpoints/distill-*/checkpoint_manager_snapshot.json")
    return int(json.loads(snapshot.read_text())["latest_checkpoint_result"]["metrics"]["step"])


_BEGINS = re.compile(
    r"(?P<at>\S+ \S+) INFO run=\S+ task=distill stage=\d+ rank=0 step (?P<step>\d+) of \d+, \d+ workers"
)


def next_step_after(lost_at: float, logs: Path, run: Path) -> float:
    """Return the seconds from a loss to the end of the optimizer step with which training went on.

    The log of the first worker says when it went on and from which step, `metrics.jsonl` how long the next one took.

    Args:
        lost_at: Seconds since the epoch.
        logs: Ray's log directory.
        run: The directory of the run, which is over.
    """
    starts = [
        (datetime.strptime(found["at"], "%Y-%m-%d %H:%M:%S,%f").timestamp(), int(found["step"]))
        for log in logs.glob("worker-*.err")
        for found in _BEGINS.finditer(log.read_text(errors="replace"))
    ]
    began, step = min(start for start in starts if start[0] > lost_at)
    taken = next(record["step_s"] for record in last_records(run) if record["step"] == step + 1)
    return began - lost_at + float(taken)


def last_records(run: Path) -> list[dict[str, Any]]:
    """The metric stream as of the last checkpoint, evaluations left out; empty before the first one."""
    try:
        return [record for record in metrics(run / "metrics.jsonl") if "train/loss" in record]
    except (FileNotFoundError, ValueError):
        return []
