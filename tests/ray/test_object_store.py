"""The whole tiny flow with everything on an object store: a real S3 server process on loopback.

Its rows are documents and their summaries, which no other test on a cluster has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import cli, cli_here, write_config, write_summaries

from pocl_ray.run_directory.lease import FILE as LEASE
from pocl_ray.run_directory.storage import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_summaries_are_distilled_on_s3_to_the_end_and_the_flow_is_known_to_be_done(
    ready_made: dict[str, Any], s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path,
        storage_path=f"{s3_bucket}/runs",
        control=None,
        curriculum__interval_epochs=1,
        **ready_made,
        **write_summaries(tmp_path),
    )
    done = cli("run", str(config))
    assert done.returncode == 0, done.stderr
    run_dir = RunDirectory.open(f"{s3_bucket}/runs", "tiny", create=False)
    for rel in ("scores.parquet", "teacher_cache/train/meta.json", "evaluation.json", "report.html", "report.md"):
        assert run_dir.exists(rel), rel
    assert (run_dir.local("student") / "model.safetensors").exists()
    assert "eval/dev/rouge_l" in run_dir.read_text("metrics.jsonl")
    figures = json.loads(run_dir.read_text("evaluation.json"))["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"} and "rouge_l" in figures["student"]
    assert not run_dir.exists(LEASE)

    code, shown = cli_here(capsys, "run", str(config))
    assert code == 0, shown
    assert "distill is done already" in shown
