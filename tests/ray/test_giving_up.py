"""Work that fails at every try ends after a finite number of tries, with one line that names the cause."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from faults import DISTILLED, WEIGHTS, checkpoints, long_form, started
from tiny import ROOT, FullRun

from pocl_ray.config.loading import dump_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800), long_form]

PLUGIN = """
import os
import signal
import sys

from pocl_ray.distill.losses import forward_kl

num_calls = 0


def failing_kl(student_logits_NV, teacher_logits_NV, temperature=1.0):
    global num_calls
    num_calls += 1
    if num_calls > 40:
        raise RuntimeError("boom [this is no markup]")
    return forward_kl(student_logits_NV, teacher_logits_NV, temperature)


def deadly(student_NV, teacher_NV, targets_N):
    if sys.argv[0].endswith("default_worker.py"):  # the driver tries it too
        os.kill(os.getpid(), signal.SIGKILL)
    return student_NV[:, 0]
"""
ENTRY_POINTS = """
[pocl_ray.losses]
failing_kl = broken:failing_kl
[pocl_ray.signals]
deadly = broken:deadly
"""


def ends(command: str, full_run: FullRun, folder: Path, without: tuple[str, ...], **changes: Any) -> tuple[Path, str]:
    """Run a command with a plug-in that fails, to its end with exit code 1; return the run directory and the output."""
    config, run = full_run.copy(folder, without, scaling__max_failures=1, **changes)
    path, log, plugin = folder / "tiny.yaml", folder / "log", folder / "plugin"
    path.write_text(dump_config(config))
    metadata = plugin / "broken-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    (plugin / "broken.py").write_text(PLUGIN)
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(plugin)])}
    with started(command, str(path), "--resume-with-changes", log=log, **env) as driver:
        assert driver.wait() == 1, log.read_text()
    return run, " ".join(log.read_text().split())


def test_a_worker_that_fails_at_every_try_ends_the_run_with_its_cause(full_run: FullRun, tmp_path: Path) -> None:
    run, output = ends("distill", full_run, tmp_path, DISTILLED, distill__loss="failing_kl")
    cause = r"worker [01] failed: RuntimeError: boom \[this is no markup\]"
    assert re.search(rf"warning: failure 1: {cause}; going on from the last checkpoint", output), output
    assert re.search(
        rf"error: distill: gave up after 2 tries, as scaling\.max_failures says; the last time {cause}; the same "
        r"command goes on from the last checkpoint$",
        output,
    ), output
    assert "in failing_kl" in output, "the traceback is there too"
    assert checkpoints(run), "what was trained before is kept"
    assert not (run / WEIGHTS).exists()


def test_a_row_that_kills_its_actor_at_every_try_ends_the_scoring(full_run: FullRun, tmp_path: Path) -> None:
    signals = ["rouge_l", "ce_loss", "deadly"]
    run, output = ends(
        "score", full_run, tmp_path, ("scores", "scores.parquet", "teacher_cache"), difficulty__signals=signals
    )
    assert (
        "error: scores: gave up, since a task lost its actor 2 times, more than scaling.max_failures allows" in output
    )
    assert "the same command does the step again" in output
    assert not (run / "scores.parquet").exists()
