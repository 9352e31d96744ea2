"""SIGKILL of a worker, of an actor and of the driver: the run ends as if nothing had happened, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from faults import (
    DISTILLED,
    WEIGHTS,
    begun,
    checkpoints,
    has_checkpoint,
    is_core,
    long_form,
    outliving,
    processes_of,
    started,
    wait_for,
)
from tiny import FullRun, cli, cli_here, metrics, sha256

from pocl_ray.config.loading import dump_config
from pocl_ray.pipeline import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def aside() -> Iterator[Callable[[Callable[[], Any]], Future[Any]]]:
    """Runs a function in a thread during the test."""
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


def test_a_killed_driver_changes_no_bit_of_the_student(
    full_run: FullRun, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = full_run.copy(tmp_path, DISTILLED)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(config))  # keeps the order of the signals, which decides between ties
    with started("distill", str(path)) as driver:
        wait_for(lambda: has_checkpoint(run), "a checkpoint", lambda: driver.poll() is not None)
        core = [child for child in psutil.Process(driver.pid).children(recursive=True) if is_core(child)]
        before = begun(run)
        driver.kill()
        driver.wait()
        assert not (run / WEIGHTS).exists()
        assert len(core) == 2
        assert not outliving(core, within_s=120.0)
    code, shown = cli_here(capsys, "distill", str(path))
    assert code == 0, shown
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


@long_form
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(full_run: FullRun, tmp_path: Path) -> None:
    config, run = full_run.copy(tmp_path, DISTILLED)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(config))
    with started("distill", str(path)) as driver:
        has_two = lambda: has_checkpoint(run) and len(checkpoints(run)) == 2  # noqa: E731
        wait_for(has_two, "a second checkpoint", lambda: driver.poll() is not None)
        core = [child for child in psutil.Process(driver.pid).children(recursive=True) if is_core(child)]
        driver.kill()
        driver.wait()
        assert not outliving(core, within_s=120.0)
    newest = checkpoints(run)[-1]
    (state,) = newest.glob("state/*.safetensors")
    state.write_bytes(state.read_bytes()[:-100])
    done = cli("distill", str(path))
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}: state/{state.name} is missing or damaged; going on from the one before" in " ".join(
        done.stderr.split()
    )
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
