"""The whole tiny flow with everything on an object store: a real S3 server process on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import cli, write_config

from pocl_ray.run_directory.lease import FILE as LEASE
from pocl_ray.run_directory.storage import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_flow_runs_to_its_end_on_s3_and_is_known_to_be_done(s3_bucket: str, tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        storage_path=f"{s3_bucket}/runs",
        control=None,
        curriculum__interval_epochs=1,
        student__sft=None,
    )
    done = cli("run", str(config))
    assert done.returncode == 0, done.stderr
    run_dir = RunDirectory.open(f"{s3_bucket}/runs", "tiny", create=False)
    for rel in ("scores.parquet", "teacher_cache/train/meta.json", "evaluation.json", "report.html", "report.md"):
        assert run_dir.exists(rel), rel
    assert (run_dir.local("student") / "model.safetensors").exists()
    assert "eval/dev/rouge_l" in run_dir.read_text("metrics.jsonl")
    assert not run_dir.exists(LEASE)

    again = cli("run", str(config))
    assert again.returncode == 0, again.stderr
    assert "distill is done already" in again.stderr


def test_a_missing_bucket_ends_in_one_line(s3_bucket: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, storage_path="s3://no-such-bucket-here/runs")
    done = cli("run", str(config))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: s3://no-such-bucket-here: there is no such bucket")
