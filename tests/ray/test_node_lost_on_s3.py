"""A run whose storage is an object store loses a node, and ends with the same student."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from faults import DISTILLED, WEIGHTS, long_form, started, wait_for
from nodes import nodes
from tiny import FullRun, sha256

from pocl_ray.config.loading import dump_config
from pocl_ray.run_directory.storage import RunDirectory

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    long_form,
]

SEEN_STEP = 6
"""The second checkpoint: by the time it is written, Ray Train has taken the first one over."""


def records(run: RunDirectory) -> list[dict[str, Any]]:
    """The metric stream as of the last checkpoint; empty before the first one."""
    if not run.exists("metrics.jsonl"):
        return []
    return [json.loads(line) for line in run.read_text("metrics.jsonl").splitlines()]


def test_a_run_on_s3_that_loses_a_node_ends_with_the_same_student(
    full_run: FullRun, s3_bucket: str, tmp_path: Path
) -> None:
    storage = f"{s3_bucket}/runs"
    config, copied = full_run.copy(tmp_path / "copied", DISTILLED, scaling__start_timeout_s=300)
    run = RunDirectory.open(storage, copied.name)
    pafs.copy_files(str(copied), run.fs_path(), destination_filesystem=run.filesystem)
    path, log = tmp_path / "tiny.yaml", tmp_path / "log"
    path.write_text(dump_config(config.model_copy(update={"storage_path": storage})))
    with (
        nodes(2, caches=tmp_path / "caches") as two,
        started("distill", str(path), log=log, RAY_ADDRESS=two.address) as driver,
    ):
        is_over = lambda: driver.poll() is not None  # noqa: E731
        before = wait_for(lambda: (r := records(run)) and r[-1]["step"] >= SEEN_STEP and r, "a checkpoint", is_over)
        two.lose()
        assert not is_over()
        two.add()
        assert driver.wait() == 0, log.read_text()
    assert hashlib.sha256(run.read_bytes(WEIGHTS)).hexdigest() == sha256(full_run.run / WEIGHTS)
    after = records(run)
    assert after[:3] == before[:3]  # timings and all: it went on from a checkpoint, and did not begin again
    assert len({record["step"] for record in after if "train/loss" in record}) == after[-1]["step"]
