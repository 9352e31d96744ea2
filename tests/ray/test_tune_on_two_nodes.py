"""A search on a cluster of two nodes: each of them holds one trial, and both live at the same time."""

from __future__ import annotations

import subprocess
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faults import long_form
from tiny import ROOT, command, write_config
from two_nodes import two_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800), long_form]

# A trial's two workers fill a node, and may not be spread.
SCALING = {"num_workers": 2, "placement": "STRICT_PACK", "start_timeout_s": 300}
SEARCH: dict[str, Any] = {
    "algorithm": "grid",
    "space": {"curriculum.num_buckets": {"grid": [1, 2]}},
    "budget": {"steps": 48},
    "scheduler": "none",
    "control": False,
    "confirm": None,
}


def lifetime(row: dict[str, Any]) -> tuple[float, float]:
    """The start and the end of a trial, in seconds since 1970."""
    started = datetime.fromisoformat(row["started_at"]).timestamp()
    return started, started + row["seconds"]


def test_trials_train_side_by_side_on_two_nodes(ready_made: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tmp_path, **ready_made, tune=SEARCH, scaling=SCALING, control=None)
    with two_nodes() as nodes:
        env = {**nodes.env, "RAY_ADDRESS": nodes.gcs_address, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command("tune", str(config)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 at once" in done.stderr
    rows = pq.read_table(tmp_path / "runs/tiny/tune/results.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished"] * 2
    pairs = [(one, other) for one, other in combinations(rows, 2) if one["node"] != other["node"]]
    times = [(lifetime(one), lifetime(other)) for one, other in pairs]
    assert any(max(one[0], other[0]) < min(one[1], other[1]) for one, other in times)
