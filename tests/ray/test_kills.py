"""SIGKILL of a worker, of an actor and of the driver: the run ends as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from tiny import ROOT, FullRun, cli, cli_environment, command, metrics, sha256

from pocl_ray.config.loading import dump_config
from pocl_ray.pipeline import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

WEIGHTS = "student/model.safetensors"
DISTILLED = ("student", "metrics.jsonl", "checkpoints/distill-*")
PATIENCE_S = 600.0


def wait_for(happened: Callable[[], Any], what: str, is_over: Callable[[], bool]) -> Any:
    """Wait until something is true, and return it; what it waits on must not be over before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := happened()):
        assert not is_over(), f"all was over before {what}"
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.01)
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


def _is_core(process: psutil.Process) -> bool:
    return Path(_title(process).split(" ")[0]).name in ("raylet", "gcs_server")


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start `pocl-ray`; nothing of it is left behind. Ray's agents look for their raylet every few seconds only."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen(command(*arguments), cwd=ROOT, env=cli_environment(), **quiet)
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


def has_checkpoint(run: Path) -> bool:
    """Whether Ray Train has taken a checkpoint over; there are ten more to come, so the run is in mid-stage."""
    begun = (run / "metrics.jsonl").exists()
    return begun and any(
        _taken_over(path) for path in run.glob("checkpoints/distill-*/checkpoint_manager_snapshot.json")
    )


def _taken_over(snapshot: Path) -> bool:
    try:
        return json.loads(snapshot.read_text())["latest_checkpoint_result"] is not None
    except ValueError:  # half written
        return False


def begun(run: Path) -> list[dict[str, Any]]:
    """The metrics before the first checkpoint, with the seconds that each step took: a new beginning has others."""
    return metrics(run / "metrics.jsonl")[:3]


@pytest.fixture
def aside() -> Iterator[Callable[[Callable[[], Any]], Future[Any]]]:
    """Runs something beside the test."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def test_a_killed_training_worker_changes_no_bit_of_the_student(
    full_run: FullRun, cluster: None, tmp_path: Path, aside: Any
) -> None:
    config, run = full_run.copy(tmp_path, DISTILLED)
    training = aside(lambda: Pipeline(config).distilled)
    wait_for(lambda: has_checkpoint(run), "a checkpoint", training.done)
    victims = processes_of("RayTrainWorker", psutil.Process())
    assert len(victims) == 2
    before = begun(run)
    victims[1].kill()
    assert not training.done()
    training.result()
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
    # Timings and all, the first records are the first workers': the others went on, and did not begin again.
    assert metrics(run / "metrics.jsonl")[: len(before)] == before


def test_a_killed_driver_changes_no_bit_of_the_student(full_run: FullRun, tmp_path: Path) -> None:
    config, run = full_run.copy(tmp_path, DISTILLED)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(config))  # keeps the order of the signals, which decides between ties
    with started("distill", str(path)) as driver:
        wait_for(lambda: has_checkpoint(run), "a checkpoint", lambda: driver.poll() is not None)
        core = [child for child in psutil.Process(driver.pid).children(recursive=True) if _is_core(child)]
        before = begun(run)
        driver.kill()
        driver.wait()
        assert not (run / WEIGHTS).exists()
        assert len(core) == 2
        assert not outliving(core, within_s=120.0)
    done = cli("distill", str(path))
    assert done.returncode == 0, done.stderr
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
    assert metrics(run / "metrics.jsonl")[: len(before)] == before


def test_a_killed_scoring_actor_loses_no_row_and_changes_no_figure(
    full_run: FullRun, cluster: None, tmp_path: Path, aside: Any
) -> None:
    config, run = full_run.copy(tmp_path, ("scores", "scores.parquet", "teacher_cache"))
    scoring = aside(lambda: Pipeline(config).ranking)
    wait_for(lambda: list(run.glob("teacher_cache/train/*.arrow")), "a shard of the cache", scoring.done)
    (victim,) = processes_of("TeacherActor", psutil.Process())
    victim.kill()
    assert not scoring.done()
    scoring.result()
    assert pq.read_table(run / "scores.parquet").equals(pq.read_table(full_run.run / "scores.parquet"))
    for shard in (full_run.run / "teacher_cache").rglob("*.arrow"):
        assert sha256(run / shard.relative_to(full_run.run)) == sha256(shard)
