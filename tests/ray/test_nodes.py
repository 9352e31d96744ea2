"""Nodes that come and go while a student is trained: lost, announced to be lost, replaced, or not replaced."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
from faults import DISTILLED, WEIGHTS, has_checkpoint, last_records, last_step, long_form, started, wait_for
from nodes import Nodes, nodes
from tiny import FullRun, metrics, sha256

from pocl_ray.config.loading import dump_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800), long_form]

LOSSES = ("train/loss", "train/kd_loss", "train/ce_loss", "eval/dev/ce_loss", "eval/dev/kd_loss")
NOTICE_INTERVAL = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"


@pytest.fixture(scope="module")
def two() -> Iterator[Nodes]:
    """Two nodes, of which each test leaves two."""
    with nodes(2) as made:
        yield made


@contextmanager
def distilling(
    full_run: FullRun, folder: Path, cluster: Nodes, env: dict[str, str] | None = None, **changes: Any
) -> Iterator[tuple[Popen[bytes], Path, Path]]:
    """Distil the student of the full run again; yield the driver, the run directory, and its output."""
    config, run = full_run.copy(folder, DISTILLED, **changes)
    path, log = folder / "tiny.yaml", folder / "log"
    path.write_text(dump_config(config))  # keeps the order of the signals, which decides between ties
    with started("distill", str(path), log=log, RAY_ADDRESS=cluster.address, **(env or {})) as driver:
        yield driver, run, log


def finish(driver: Popen[bytes], log: Path) -> str:
    """Wait for the driver, and return its output."""
    code = driver.wait()
    output = log.read_text()
    assert code == 0, output
    return output


def losses(run: Path) -> list[float]:
    return [record[key] for record in metrics(run / "metrics.jsonl") for key in LOSSES if key in record]


def send(processes: list[psutil.Process], what: signal.Signals) -> None:
    for process in processes:
        process.send_signal(what)


def test_a_lost_and_replaced_node_changes_no_bit_of_the_student(full_run: FullRun, two: Nodes, tmp_path: Path) -> None:
    with distilling(full_run, tmp_path, two, scaling__start_timeout_s=300) as (driver, run, log):
        wait_for(lambda: has_checkpoint(run), "a checkpoint", lambda: driver.poll() is not None)
        two.lose()
        assert driver.poll() is None
        two.add()
        finish(driver, log)
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
    assert {record["num_workers"] for record in last_records(run)} == {2}


def test_an_elastic_run_goes_on_with_one_worker_and_grows_back_to_two(
    full_run: FullRun, two: Nodes, tmp_path: Path
) -> None:
    scaling = {"scaling__num_workers": [1, 2], "scaling__resize_interval_s": 0.1, "scaling__start_timeout_s": 300}
    with distilling(full_run, tmp_path, two, **scaling) as (driver, run, log):
        is_over = lambda: driver.poll() is not None  # noqa: E731
        wait_for(lambda: has_checkpoint(run), "a checkpoint", is_over)
        two.lose()
        alone = lambda: last_records(run) and last_records(run)[-1]["num_workers"] == 1  # noqa: E731
        wait_for(alone, "a checkpoint of one worker", is_over)
        survivors = two.actors("RayTrainWorker")
        send(survivors, signal.SIGSTOP)  # training is over in seconds, a new node takes longer
        two.add()
        send(survivors, signal.SIGCONT)
        finish(driver, log)
    counts = [record["num_workers"] for record in last_records(run)]
    changes = [count for count, before in zip(counts, [0, *counts], strict=False) if count != before]
    assert changes == [2, 1, 2]
    assert losses(run) == pytest.approx(losses(full_run.run), rel=1e-5, abs=1e-5)


def test_a_node_that_is_announced_to_go_is_not_left_without_a_checkpoint(
    full_run: FullRun, two: Nodes, tmp_path: Path
) -> None:
    changes = {"train__checkpoint_every_steps": None, "scaling__start_timeout_s": 300}
    evaluated = {r["step"] for r in metrics(full_run.run / "metrics.jsonl") if "train/loss" not in r}
    with distilling(full_run, tmp_path, two, {NOTICE_INTERVAL: "0.2"}, **changes) as (driver, run, log):
        is_over = lambda: driver.poll() is not None  # noqa: E731
        wait_for(lambda: has_checkpoint(run), "a checkpoint", is_over)
        leaving = two.actors("RayTrainWorker")[-1]
        leaving.suspend()  # the other one waits for it in its next step, and hears of the notice meanwhile
        two.announce_loss(within_s=600)
        wait_for(two.has_told_a_worker, "a worker that was told", is_over)
        leaving.resume()
        wait_for(lambda: last_step(run) not in evaluated, "a checkpoint for the notice", is_over)
        leaving.suspend()
        step = last_step(run)
        saved = last_records(run)[:step]  # behind it may stand what a checkpoint on its way brings
        assert len(saved) == step
        two.lose()
        two.add()
        output = " ".join(finish(driver, log).split())
    assert "a node is about to be taken away; a checkpoint is saved first" in output
    assert last_records(run)[: len(saved)] == saved  # timings and all: the run went on from there
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
