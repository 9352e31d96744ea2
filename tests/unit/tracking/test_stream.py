"""The stream to the trackers: figures, ids, and trackers that are slow, broken or missing while training goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ray.config import Config
from pocl_ray.config.neutral import neutral_free
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.task import send
from pocl_ray.errors import ConfigError
from pocl_ray.preflight import check_inputs
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tracking import run as run_module
from pocl_ray.tracking.results import Results, as_markdown, read_results
from pocl_ray.tracking.run import Point, TrackedRun, Tracking, check_trackers, figures_of, memory
from pocl_ray.tracking.stream import Stream
from pocl_ray.tracking.trackers import KINDS, Tracker, open_tracker

RECORD: dict[str, Any] = {
    "step": 4,
    "train/loss": 0.5,
    "num_response_tokens": 30,
    "step_s": 0.25,
    "curriculum/stage": 1,
}


class Recorder:
    """A tracker that keeps what it is given, and may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.points: list[Point] = []
        self.results: list[Results] = []
        self.is_closed, self.has_failed, self.fails_at = False, False, fails_at

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if point[0] == self.fails_at:
                raise ConnectionError("the server is down")
            self.points.append(point)

    def log_results(self, results: Results) -> None:
        self.results.append(results)

    def close(self, has_failed: bool = False) -> None:
        self.is_closed, self.has_failed = True, has_failed


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun.begin(
        Tracking(("wandb",), "run", {"a": 1}), RunDirectory.open(str(tmp_path), "run"), "distill", "f" * 64
    )


def stream(run: TrackedRun, trackers: dict[str, Tracker], warnings: list[str]) -> Stream:
    return Stream(run, tuple(trackers), warnings.append, lambda name, *_: trackers[name])


def test_a_record_gives_its_figures_with_its_speed() -> None:
    figures = figures_of({**RECORD, "name": "text", "flag": True})
    assert figures["train/tokens_per_s"] == 120
    assert figures["train/loss"] == 0.5 and figures["curriculum/stage"] == 1
    assert not {"step", "name", "flag"} & set(figures)


def test_a_logged_record_is_sent_with_the_memory_that_metrics_jsonl_then_holds(run: TrackedRun) -> None:
    kept, logged, other = Recorder(), {**RECORD}, {**RECORD, "step": 5}
    sent = stream(run, {"kept": kept}, [])
    send(sent, [logged], logged)
    send(sent, [logged], other)  # train.log_every_steps leaves it out
    sent.close()
    assert [step for step, _ in kept.points] == [4]
    assert memory().keys() == {"system/process_memory_gib", "system/free_memory_gib"} <= logged.keys()
    assert kept.points[0][1]["system/process_memory_gib"] == logged["system/process_memory_gib"] > 0


def test_what_records_of_one_step_share_is_sent_once(run: TrackedRun) -> None:
    kept = Recorder()
    sent = stream(run, {"kept": kept}, [])
    for step in (0, 4):
        if step:
            sent.log({**RECORD, "step": step})
        sent.log({"step": step, "curriculum/stage": 1, "eval/dev/ce_loss": 2.0})
        sent.log({"step": step, "curriculum/stage": 2, "frontier/gap_mean": 0.1})
        sent.log({"step": step, "curriculum/stage": 2})  # holds nothing new
    sent.close()
    steps = {key: [step for step, figures in kept.points if key in figures] for key in ("curriculum/stage", *KINDS)}
    assert steps == {key: [0, 4] for key in ("curriculum/stage", *KINDS)} | {"train/loss": [4]}
    assert all(figures for _, figures in kept.points)


def test_a_tracker_gets_the_records_so_far_when_it_is_opened(run: TrackedRun) -> None:
    records = [{**RECORD}, {"step": 4, "curriculum/stage": 1, "eval/dev/ce_loss": 2.0}]
    kept, opened = Recorder(), list[Sequence[Point]]()

    def opens(name: str, run: TrackedRun, history: Sequence[Point]) -> Tracker:
        opened.append(history)
        return kept

    sent = Stream(replace(run, records=records), ("kept",), [].append, opens)
    sent.log({"step": 4, "curriculum/stage": 2, "frontier/gap_mean": 0.1})
    sent.close()
    assert [(step, set(figures) & {"curriculum/stage", *KINDS}) for step, figures in opened[0]] == [
        (4, {"train/loss", "curriculum/stage"}),
        (4, {"eval/dev/ce_loss"}),
    ]
    assert kept.points == [(4, {"frontier/gap_mean": 0.1})]  # its stage is that of the step, which was sent before


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_tracker_is_told_whether_the_training_has_failed(run: TrackedRun, has_failed: bool) -> None:
    kept = Recorder()
    stream(run, {"kept": kept}, []).close(has_failed=has_failed)
    assert kept.is_closed and kept.has_failed == has_failed


def test_an_id_stays_with_the_training_and_changes_with_its_fingerprint(tmp_path: Path) -> None:
    run_dir, tracking = RunDirectory.open(str(tmp_path), "run"), Tracking(("wandb",), "run", {})
    ids = [TrackedRun.begin(tracking, run_dir, "distill", kind * 64).id for kind in "aab"]
    assert ids[0] == ids[1] != ids[2]


def test_a_tracker_that_breaks_is_one_warning_and_the_others_go_on(run: TrackedRun) -> None:
    broken, whole, warnings = Recorder(fails_at=2), Recorder(), []
    sent = stream(run, {"wandb": broken, "trackio": whole}, warnings)
    for step in range(1, 6):
        sent.log({**RECORD, "step": step})
    sent.close()
    assert [step for step, _ in whole.points] == [1, 2, 3, 4, 5] and whole.is_closed
    assert warnings == ["tracking: wandb: ConnectionError: the server is down; the run goes on without it"]


def test_a_warning_is_short_whatever_the_client_says(run: TrackedRun) -> None:
    def refuse(name: str, *_: object) -> Tracker:
        raise ConnectionError("no server at " + "http://host/a " * 100)

    warnings: list[str] = []
    Stream(run, ("mlflow",), warnings.append, refuse).close()
    (warning,) = warnings
    assert len(warning) < 400 and "no server at http://host/a" in warning and "goes on without it" in warning


def test_a_tracker_that_hangs_holds_nothing_up(run: TrackedRun) -> None:
    released, warnings = threading.Event(), []

    def hang(name: str, *_: object) -> Tracker:
        released.wait(60)
        raise RuntimeError("released")

    sent = Stream(run, ("wandb",), warnings.append, hang)
    started = time.monotonic()
    for step in range(20):
        sent.log({**RECORD, "step": step})
    sent.close(timeout_s=0.2)
    released.set()
    assert time.monotonic() - started < 5
    assert warnings == [
        "tracking: wandb: it has not taken everything 0.2 s after the end; the rest is not sent; the run goes on "
        "without it"
    ]


@pytest.mark.parametrize(
    ("tracker", "environment", "says"),
    [
        ("wandb", {"WANDB_MODE": "online", "HOME": "/nonexistent", "WANDB_API_KEY": ""}, "no API key"),
        ("mlflow", {"MLFLOW_TRACKING_URI": ""}, "set MLFLOW_TRACKING_URI"),
    ],
)
def test_a_tracker_without_key_or_server_is_one_warning_with_a_remedy(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch, tracker: str, environment: dict[str, str], says: str
) -> None:
    if tracker == "wandb":
        pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    warnings: list[str] = []
    sent = Stream(run, (tracker,), warnings.append, open_tracker)
    sent.log(RECORD)
    sent.close()
    (warning,) = warnings
    assert says in warning and "\n" not in warning


def test_a_missing_package_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run_module, "find_spec", lambda name: None if name == "wandb" else ModuleSpec(name, None, origin="here")
    )
    check_trackers(("tensorboard", "mlflow"))
    with pytest.raises(ConfigError, match=r"tracking: wandb needs .* run pip install 'pocl-ray\[wandb\]'"):
        check_trackers(("tensorboard", "wandb"))
    tree = {
        "name": "run",
        "data": {"train": {"path": "samples://instructions"}, "dev": {"path": "samples://instructions"}},
        "teacher": {"path": "teacher"},
        "student": {"num_layers": 1},
        "tracking": ["wandb"],
    }
    with pytest.raises(ConfigError, match="tracking: wandb"):
        check_inputs(Config.model_validate(tree))


def test_a_folder_of_a_trackers_name_is_not_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself leaves a folder `wandb` in the directory here, which Python would import as an empty package."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(run_module.PACKAGES, "trackio", "no_such_tracker")
    (tmp_path / "no_such_tracker").mkdir()
    assert find_spec("no_such_tracker") is not None
    with pytest.raises(ConfigError, match=r"trackio needs the package no_such_tracker, which is not installed"):
        check_trackers(("trackio",))


def test_trackers_are_in_no_fingerprint_and_are_named_once() -> None:
    tree = {
        "name": "run",
        "data": {"train": {"path": "a"}, "dev": {"path": "b"}},
        "teacher": {"path": "teacher"},
        "student": {"num_layers": 1},
    }
    assert neutral_free(Config.model_validate({**tree, "tracking": ["wandb"]})) == neutral_free(
        Config.model_validate(tree)
    )
    with pytest.raises(ValueError, match="names a tracker twice"):
        Config.model_validate({**tree, "tracking": ["wandb", "wandb"]})


def test_results_are_figures_a_table_and_sample_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    found = {"rouge_l": {"mean": 20.0, "std": 1.0, "by_seed": {"10": 20.0}}, "greedy": {"rouge_l": 21.0}}
    run_dir.write_json("evaluation.json", {"sets": {"dev": {"student": found, "teacher": found}}})
    columns = {
        "model": ["student", "student", "teacher"],
        "set": ["dev"] * 3,
        "id": [0, 0, 0],
        "seed": [-1, 10, -1],
        "text": ["s-1", "s10", "t"],
    }
    pq.write_table(pa.table(columns), tmp_path / "run" / "predictions.parquet")

    class Rows:
        def prompts(self, ids: list[int]) -> list[str]:
            return ["p"]

        def references(self, ids: list[int]) -> list[list[str]]:
            return [["r"]]

    monkeypatch.setattr(RowStore, "open", lambda path: Rows())
    results = read_results(run_dir, 8, {"dev": RowsSummary("dev", "rows/dev.arrow", 1, 0, 1, 1, 1, "f")}, 3)
    assert results.figures["final/dev/student/greedy.rouge_l"] == 21
    assert set(results.table[0]) == {"set", "model", "rouge_l.mean", "rouge_l.std", "greedy.rouge_l"}
    assert results.answers == [
        {"set": "dev", "row": 0, "prompt": "p", "reference": "r", "student": "s-1", "teacher": "t"}
    ]
    assert set(results.files) == {"evaluation.json"} and results.plots == {}
    assert json.loads(results.files["evaluation.json"].read_text())["sets"]


def test_a_cell_cannot_break_its_table() -> None:
    assert as_markdown([{"a": "x|y\nz", "b": "<script>"}]).splitlines()[2] == "| x\\|y z | &lt;script> |"
    assert as_markdown([]) == ""
