"""What the cluster has no room for is one line before anything is trained, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tiny import refused, tree_digest, write_config

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scaling.use_gpu=true", ("scaling.use_gpu", "no GPU", "set it to false")),
        ("scaling.cpus_per_worker=3", ("room for 1 of 2 workers", "lower scaling.num_workers")),
        ("scaling.cpus_per_actor=3", ("2 actors of 3 CPU each must run at once", "lower scaling.cpus_per_actor")),
    ],
)
def test_what_the_cluster_lacks_is_said_before_anything_is_trained(
    override: str, words: tuple[str, ...], cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, scaling__num_workers=2)
    before = tree_digest(tmp_path)
    line = refused(path, capsys, override)
    assert all(word in line for word in words), line
    assert tree_digest(tmp_path) == before


def test_more_workers_than_the_cluster_can_have_fail_within_a_minute(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, train__global_batch_rows=4096, curriculum__num_buckets=1)
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() * 64)
    before, started = tree_digest(tmp_path), time.monotonic()
    line = refused(path, capsys, "scaling.num_workers=1024")
    assert time.monotonic() - started < 60
    assert "room for" in line
    assert tree_digest(tmp_path) == before
