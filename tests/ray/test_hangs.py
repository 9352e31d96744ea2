"""Processes that hang for ever are found, killed and started again, and the result does not change."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
from faults import DISTILLED, WEIGHTS, has_checkpoint, long_form, outliving, processes_of, started, wait_for
from matrix import STEPS
from tiny import ROOT, FullRun, metrics, sha256

from pocl_ray.config.loading import dump_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    long_form,  # it waits for timeouts to pass
]

# Shorter than a user's, longer than processes need to start on a machine under load.
COLLECTIVE_S, STALL_S = 20, 60
PLUGIN = """
import time
from pathlib import Path

from pocl_ray.distill.losses import forward_kl

ONCE, calls = Path(__file__).with_name("hung"), 0


def sleepy_kl(student_logits_NV, teacher_logits_NV, temperature=1.0):
    global calls
    calls += 1
    if calls == 60 and not ONCE.exists():
        ONCE.touch()
        time.sleep(1e6)
    return forward_kl(student_logits_NV, teacher_logits_NV, temperature)
"""


def distilling(full_run: FullRun, folder: Path, **changes: Any) -> tuple[Path, Path, Path]:
    """Return the config, run directory and log of a run of which distillation is to be done."""
    config, run = full_run.copy(folder, DISTILLED, **changes)
    path = folder / "tiny.yaml"
    path.write_text(dump_config(config))  # keeps the order of the signals, which decides between ties
    return path, run, folder / "log"


def workers_of(driver: Popen[bytes], actor: str = "RayTrainWorker") -> list[psutil.Process]:
    return processes_of(actor, psutil.Process(driver.pid))


def finish(driver: Popen[bytes], log: Path) -> str:
    """Wait for the driver, and return its output on one line."""
    code = driver.wait()
    output = log.read_text()
    assert code == 0, output
    return " ".join(output.split())


def test_a_stopped_worker_is_killed_and_changes_no_bit_of_the_student(full_run: FullRun, tmp_path: Path) -> None:
    timeouts = {"scaling__collective_timeout_s": COLLECTIVE_S, "scaling__stall_timeout_s": STALL_S}
    config, run, log = distilling(full_run, tmp_path, **timeouts)
    with started("distill", str(config), log=log) as driver:
        wait_for(lambda: has_checkpoint(run), "a checkpoint", lambda: driver.poll() is not None)
        stopped = workers_of(driver)[-1]
        stopped.send_signal(signal.SIGSTOP)
        output = finish(driver, log)
        assert outliving([stopped], 30.0) == []
    # The other worker waits in a collective, or for a checkpoint that both must come to.
    assert f"a collective did not end within {COLLECTIVE_S} s: rank" in output or "nothing moves since" in output
    assert f"(process {stopped.pid} on" in output
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_sleeps_in_a_plug_in_is_begun_anew(full_run: FullRun, tmp_path: Path, num_workers: int) -> None:
    plugins = tmp_path / "plugins"
    (plugins / "sleepy-1.0.dist-info").mkdir(parents=True)
    (plugins / "sleepy.py").write_text(PLUGIN)
    (plugins / "sleepy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sleepy\nVersion: 1.0\n")
    (plugins / "sleepy-1.0.dist-info" / "entry_points.txt").write_text(
        "[pocl_ray.losses]\nsleepy_kl = sleepy:sleepy_kl\n"
    )
    config, run, log = distilling(
        full_run,
        tmp_path,
        distill__loss="sleepy_kl",
        distill__scale_by_t_squared=True,
        scaling__num_workers=num_workers,
        scaling__collective_timeout_s=COLLECTIVE_S,
        scaling__stall_timeout_s=STALL_S,
    )
    path = os.pathsep.join([str(ROOT), str(plugins)])
    arguments = ("distill", str(config), "--resume-with-changes")
    with started(*arguments, log=log, PYTHONPATH=path) as driver:
        output = finish(driver, log)
    assert (plugins / "hung").exists()
    ends = "nothing moves since" if num_workers == 1 else f"a collective did not end within {COLLECTIVE_S} s"
    assert ends in output
    assert "plugins/sleepy.py:15, sleepy_kl" in output
    found, plain = (
        [record["train/loss"] for record in metrics(each / "metrics.jsonl") if "train/loss" in record]
        for each in (run, full_run.run)
    )
    assert found == plain if num_workers == 2 else found == pytest.approx(plain, rel=1e-5, abs=1e-5)


def test_a_stopped_scoring_actor_is_killed_and_no_row_is_lost(full_run: FullRun, tmp_path: Path) -> None:
    step = STEPS["scoring"]
    config, run = full_run.copy(tmp_path, step.without, scaling__stall_timeout_s=STALL_S)
    path, log = tmp_path / "tiny.yaml", tmp_path / "log"
    path.write_text(dump_config(config))
    with started(step.command, str(path), log=log) as driver:
        amid = lambda: list(run.glob("teacher_cache/train/*.arrow")) and workers_of(driver, step.victims)  # noqa: E731
        (stopped, *_) = wait_for(amid, "work of scoring", lambda: driver.poll() is not None)
        stopped.send_signal(signal.SIGSTOP)
        output = finish(driver, log)
        assert outliving([stopped], 30.0) == []
    assert f"process {stopped.pid} on" in output
    assert "does not answer since" in output
    assert step.same(run, full_run.run)
