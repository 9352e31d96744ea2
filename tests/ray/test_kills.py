"""SIGKILL of a worker, of an actor and of the driver: the run ends as if nothing had happened, to the bit."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import ROOT, FullRun, cli, cli_environment, command, metrics, sha256

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


def processes_of(actor: str, parent: psutil.Process) -> list[psutil.Process]:
    """The processes below `parent` in which a Ray actor of this class runs."""
    return [child for child in parent.children(recursive=True) if actor in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return ""


def checkpoints(run: Path) -> int:
    return len(list(run.glob("checkpoints/distill-*/checkpoint_*/progress.json")))


def is_mid_stage(run: Path) -> bool:
    """Whether a checkpoint is there and the last logged step lies within a stage."""
    return checkpoints(run) >= 2 and (run / "metrics.jsonl").exists()


def logged(run: Path) -> list[dict[str, Any]]:
    """The metric stream so far, without its last two checkpoints: the kill may lose the newest."""
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
    wait_for(lambda: is_mid_stage(run), "a checkpoint", training.done)
    victims = processes_of("RayTrainWorker", psutil.Process())
    assert len(victims) == 2
    before = logged(run)
    victims[1].kill()
    assert not training.done()
    training.result()
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
    # Timings and all, the first records are the first workers': the others went on, and did not begin again.
    assert metrics(run / "metrics.jsonl")[: len(before)] == before


def test_a_killed_driver_changes_no_bit_of_the_student(full_run: FullRun, tmp_path: Path) -> None:
    config, run = full_run.copy(tmp_path, DISTILLED)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    driver = subprocess.Popen(
        command("distill", str(path)),
        cwd=ROOT,
        env=cli_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = psutil.Process(driver.pid)
    wait_for(lambda: is_mid_stage(run), "a checkpoint", lambda: driver.poll() is not None)
    cluster = started.children(recursive=True)
    before = logged(run)
    driver.kill()
    driver.wait()
    assert not (run / WEIGHTS).exists()
    _, left = psutil.wait_procs(cluster, timeout=60)
    for process in left:
        process.kill()
    assert not left, f"the cluster outlived its driver: {[_title(p) for p in left]}"
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
