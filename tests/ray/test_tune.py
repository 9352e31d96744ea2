"""A search: shared work once, failures survived, the winner given again by its config, and a kill that costs little."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from faults import long_form
from tiny import ROOT, cli, cli_environment, cli_here, cli_in_fixture, command, manifest, sha256, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

SEARCH: dict[str, Any] = {
    "algorithm": "grid",
    "space": {
        "curriculum.num_buckets": {"grid": [1, 2]},
        "train.learning_rate": {
            "grid": [5e-3, 1e9]
        },  # the second one diverges: weight decay alone multiplies weights by -1e7 a step
    },
    "constraints": [  # two of the four are left
        "curriculum.num_buckets == 1 or train.learning_rate < 1",
        "curriculum.num_buckets == 2 or train.learning_rate > 1",
    ],
    "budget": {"steps": 18},
    "scheduler": "none",
    "control": False,  # test_search.py has one, in trials that only pretend
    "confirm": {"top_k": 1, "seeds": [7]},
}
TWO_TRIALS: dict[str, Any] = {
    **SEARCH,
    "space": {"curriculum.num_buckets": {"grid": [1, 2]}},
    "constraints": [],
    "confirm": None,
}
PATIENCE_S = 900.0


def records(run: Path) -> dict[str, dict[str, Any]]:
    """Every trial's record by its label."""
    found = [json.loads(path.read_text()) for path in run.glob("tune/trials/*/trial.json")]
    return {label_of(record): record for record in found}


def label_of(record: dict[str, Any]) -> str:
    return str(record["name"].rpartition("-")[0])


@pytest.fixture(scope="module")
def searched(cluster: None, ready_made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The config file and the directory of a finished search."""
    folder = tmp_path_factory.mktemp("search")
    config = write_config(folder, **ready_made, tune=SEARCH)
    code, shown = cli_in_fixture("tune", str(config))
    assert code == 0, shown[-3000:]
    assert shown.count("\n") < 60
    return config, folder / "runs/tiny"


def test_every_trial_ends_and_one_that_diverges_does_not_end_the_search(searched: tuple[Path, Path]) -> None:
    _, run = searched
    statuses = {label: record["status"] for label, record in records(run).items()}
    assert statuses == {
        "trial-000": "diverged",
        "trial-001": "finished",
        f"{label_of(winner(run))}-seed-7": "finished",
    }
    table = pq.read_table(run / "tune/results.parquet").to_pylist()
    assert len(table) == 3
    finished = [row for row in table if row["status"] == "finished"]
    assert {row["num_steps"] for row in finished} == {18}
    assert all(row["start_s"] > 0 and row["seconds"] > row["start_s"] for row in finished)
    assert len(json.loads((run / "tune/skipped.json").read_text())) == 2
    assert (run / "tune/report.html").exists() and (run / "tune/results.csv").exists()
    assert len(list(run.glob("tune/search-*/*/events.out.tfevents.*"))) == 2
    assert not list((run / "checkpoints").glob("trial-*"))


def winner(run: Path) -> dict[str, Any]:
    rows = pq.read_table(run / "tune/results.parquet").to_pylist()
    name = next(row["trial"] for row in rows if row["is_winner"])
    record: dict[str, Any] = json.loads((run / f"tune/trials/{name}/trial.json").read_text())
    return record


def test_the_shared_steps_are_done_once(
    searched: tuple[Path, Path], cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = searched
    before = manifest(run)
    assert set(before) == {"tokenizer", "rows", "plan", "teacher", "student", "scores", "ranking"}
    signals = (run / "scores/signals.parquet").stat().st_mtime_ns
    code, shown = cli_here(capsys, "tune", str(config))
    assert code == 0, shown[-3000:]
    assert manifest(run) == before
    assert (run / "scores/signals.parquet").stat().st_mtime_ns == signals


def test_best_yaml_trains_the_winner_again_to_the_bit(
    searched: tuple[Path, Path], cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = searched
    best = run / "tune/best.yaml"
    code, shown = cli_here(capsys, "distill", str(best), "name=tiny", "--resume-with-changes")
    assert code == 0, shown[-3000:]
    assert manifest(run)["distill"]["fingerprint"] == winner(run)["fingerprint"]
    assert sha256(run / "student/model.safetensors") == sha256(run / "tune/best/model.safetensors")


@long_form
def test_a_killed_search_goes_on_and_keeps_what_is_finished(
    searched: tuple[Path, Path], ready_made: dict[str, Any], tmp_path: Path
) -> None:
    again = tmp_path / "runs/tiny"
    shutil.copytree(searched[1], again, ignore=shutil.ignore_patterns("tune", "student", "lease*"))
    config = write_config(tmp_path, **ready_made, tune=TWO_TRIALS)
    words = ("tune", str(config), "tune.max_concurrent=1", "--resume-with-changes")
    process = subprocess.Popen(
        command(*words), cwd=ROOT, env=cli_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any(record["status"] == "finished" for record in records(again).values()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=30)
    kept = {label: record for label, record in records(again).items() if record["status"] == "finished"}
    assert len(kept) == 1
    students = {path: path.stat().st_mtime_ns for r in kept.values() for path in [student_of(again, r)]}
    done = cli(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    after = records(again)
    assert {label: after[label] for label in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in students} == students
    assert {label: r["status"] for label, r in after.items()} == {"trial-000": "finished", "trial-001": "finished"}


def student_of(run: Path, record: dict[str, Any]) -> Path:
    return run / f"tune/trials/{record['name']}/student/model.safetensors"
