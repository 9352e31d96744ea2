"""Each tracker's own record of a training that was interrupted and went on, read with the tracker's own reader.

Nothing here needs a network: W&B writes offline, Trackio and MLflow into local stores. With POCL_MLFLOW naming the
`mlflow` command of an environment with the whole of MLflow, a real server on loopback is used as well.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tracking import trackers
from pocl_ray.tracking.results import Results
from pocl_ray.tracking.run import TrackedRun, Tracking
from pocl_ray.tracking.stream import Stream
from tests.servers import server_on_loopback

SETTINGS = {"name": "run", "train": {"learning_rate": 1e-3, "betas": [0.9, 0.95]}}
ANSWER = {"set": "held_out", "row": 0, "prompt": "a | b <b>", "reference": "c", "student": "d"}
TABLE = {"set": "held_out", "model": "student", "rouge_l.mean": 33.0}


def training_record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "train/loss": 1 / step,
        "train/lr": 1e-3,
        "curriculum/stage": 0,
        "num_response_tokens": 100,
        "step_s": 0.5,
    }


def dev_record(step: int) -> dict[str, Any]:
    return {"step": step, "curriculum/stage": 0, "num_tokens": 0, "eval/dev/ce_loss": 3.0 - step / 10}


def stage_record(step: int) -> dict[str, Any]:
    return {"step": step, "curriculum/stage": 1, "frontier/gap_mean": 0.5}


def records_until(step: int) -> list[dict[str, Any]]:
    """The metric stream as a checkpoint at a step holds it: a stage begins at the third, after its evaluation."""
    records = [dev_record(0)]
    for at in range(1, step + 1):
        records += [training_record(at)] + [dev_record(3), stage_record(3)] * (at == 3) + [dev_record(8)] * (at == 8)
    return records


STARTS = ((0, 2), (0, 5), (3, 8))


def track(
    tracker: str,
    folder: Path,
    starts: tuple[tuple[int, int], ...] = STARTS,
    away: int | None = None,
    damage: Callable[[], object] = lambda: None,
) -> TrackedRun:
    """A training of eight steps that dies before and after its checkpoint at the third, and is evaluated.

    Args:
        tracker: Tracker.
        folder: Folder of the run directory.
        starts: Step of the checkpoint, and last step, of each start.
        away: Start at which the tracker cannot be reached.
        damage: Function that is called before the last start.
    """
    run_dir = RunDirectory.open(str(folder), "run")
    tracking = Tracking((tracker,), "run", SETTINGS)
    warnings: list[str] = []
    for number, (first, last) in enumerate(starts):
        if number == len(starts) - 1:
            damage()
        if number == away:
            continue
        # The stage that began at the checkpoint begins again.
        kept = records_until(first)[: -1 if first == 3 else None] if first else []
        run = TrackedRun.begin(tracking, run_dir, "distill", "0" * 64, kept)
        stream = Stream(run, (tracker,), warnings.append)
        for record in records_until(last)[len(kept) :]:
            stream.log(record)
        stream.close()
    run = TrackedRun.begin(tracking, run_dir, "distill", "0" * 64, records_until(8))
    stream = Stream(run, (tracker,), warnings.append)
    stream.send_results(results(folder))
    stream.close()
    assert warnings == []
    return run


def results(folder: Path) -> Results:
    from PIL import Image

    Image.new("RGB", (4, 3), "red").save(folder / "evaluation.png")
    (folder / "config.yaml").write_text("name: run\n")
    return Results(
        step=8,
        figures={"final/held_out/student/rouge_l.mean": 33.0},
        table=[TABLE],
        answers=[ANSWER],
        files={"config.yaml": folder / "config.yaml"},
        plots={"evaluation": folder / "evaluation.png"},
    )


def shown_by_tensorboard(folder: Path) -> Any:
    """The record as TensorBoard's own reader gives it, after a look at what all four trackers must hold."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard's reader is not installed"
    )
    shown = reader.EventAccumulator(str(folder / "run" / "tensorboard" / "distill"), {"images": 0, "tensors": 0})
    shown.Reload()
    losses = shown.Scalars("train/loss")
    assert [(event.step, round(event.value, 4)) for event in losses] == [(n, round(1 / n, 4)) for n in range(1, 9)]
    assert [event.step for event in shown.Scalars("eval/dev/ce_loss")] == [0, 3, 8]
    assert [event.step for event in shown.Scalars("frontier/gap_mean")] == [3]
    assert shown.Scalars("final/held_out/student/rouge_l.mean")[0].value == 33
    return shown


def test_tensorboard_shows_one_run_without_the_steps_that_were_taken_twice(tmp_path: Path) -> None:
    track("tensorboard", tmp_path)
    shown = shown_by_tensorboard(tmp_path)
    assert shown.Scalars("train/tokens_per_s")[0].value == 200
    (image,) = shown.Images("plots/evaluation")
    assert (image.width, image.height) == (4, 3)
    texts = {tag: shown.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in shown.Tags()["tensors"]}
    assert '"learning_rate": 0.001' in texts["config/text_summary"]
    assert "| held_out | student | 33 |" in texts["final/text_summary"]
    assert "a \\| b &lt;b>" in texts["answers/text_summary"]


@pytest.mark.parametrize("away", [0, 1, 2])
def test_tensorboard_is_sent_the_steps_that_it_could_not_take(tmp_path: Path, away: int) -> None:
    track("tensorboard", tmp_path, away=away)
    shown_by_tensorboard(tmp_path)


@pytest.mark.parametrize("lost", [10, 400, 100_000])
def test_steps_before_the_checkpoint_that_a_killed_process_held_back_are_written_again(
    tmp_path: Path, lost: int
) -> None:
    def tear() -> None:
        path = max((tmp_path / "run" / "tensorboard" / "distill").iterdir(), key=lambda path: path.name)
        content = path.read_bytes()
        path.write_bytes(content[: max(0, len(content) - lost)])

    track("tensorboard", tmp_path, damage=tear)
    shown_by_tensorboard(tmp_path)


def records_of(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: messages of W&B's own schema, in the frames of a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # a frame never starts in the last bytes of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        assert place + 7 + length <= len(data), f"{path.name} ends within a record"
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.parametrize("away", [None, 2])
def test_an_offline_run_of_wandb_is_whole_in_its_last_folder_which_alone_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: int | None
) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()  # a test before may have used it with another environment, which it remembers
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    place = tmp_path / "run" / "tracking" / "wandb"
    (place / "offline-run-20200101_000000-other").mkdir(parents=True)

    def kill() -> None:  # what a killed process leaves, at which `wandb sync` stops
        for path in place.glob("offline-run-*/run-*.wandb"):
            path.write_bytes(path.read_bytes()[:7])

    run = track("wandb", tmp_path, ((0, 5), (0, 1), (3, 8)), away, kill)
    wandb.teardown()  # its process writes on after a run's finish(); this waits until it has ended
    assert (place / "offline-run-20200101_000000-other").is_dir()
    (file,) = place.glob("offline-run-*/*.wandb")
    assert file.name == f"run-{run.id}.wandb"
    records = list(records_of(file))
    (begun,) = (record.run for record in records if record.HasField("run"))
    assert (begun.run_group, begun.display_name, begun.project) == ("run", "run/distill", "pocl-ray")
    taken: dict[str, list[tuple[int, Any]]] = {}
    history = [record.history for record in records if record.HasField("history")]
    for each in history:
        for item in each.item:
            key = item.key or "/".join(item.nested_key)
            taken.setdefault(key, []).append((each.step.num, json.loads(item.value_json)))
    assert taken["train/loss"] == [(step, 1 / step) for step in range(1, 9)]
    assert [step for step, _ in taken["eval/dev/ce_loss"]] == [0, 3, 8]
    assert taken["frontier/gap_mean"] == [(3, 0.5)]
    steps = [each.step.num for each in history]
    assert steps == list(range(10))  # in order, and the results after the last step
    assert any(record.HasField("artifact") for record in records)
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert json.loads(summary["final/held_out/student/rouge_l.mean"]) == 33


def check_mlflow(run: TrackedRun, uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pocl-ray")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`pocl_ray.id` = '{run.id}'")
    assert (found.info.run_name, found.data.tags["group"], found.info.status) == ("run/distill", "run", "FINISHED")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 9)]
    for key, steps in {"eval/dev/ce_loss": [0, 3, 8], "frontier/gap_mean": [3]}.items():
        assert [metric.step for metric in client.get_metric_history(found.info.run_id, key)] == steps
    assert found.data.params["train.learning_rate"] == "0.001"
    assert found.data.metrics["final/held_out/student/rouge_l.mean"] == 33
    assert {each.path for each in client.list_artifacts(found.info.run_id)} == {
        "answers.json",
        "config.json",
        "config.yaml",
        "final.json",
        "plots",
    }


@pytest.fixture
def mlflow_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_project: None) -> str:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    uri = f"file://{tmp_path / 'store'}"  # a store of files: one of SQLite takes ten seconds to be made
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


@pytest.mark.parametrize("away", [None, 0, 1, 2])
def test_mlflow_goes_on_in_the_run_with_the_same_id(tmp_path: Path, mlflow_store: str, away: int | None) -> None:
    check_mlflow(track("mlflow", tmp_path, away=away), mlflow_store)


def test_a_training_that_fails_has_failed_in_mlflow_until_it_goes_on(tmp_path: Path, mlflow_store: str) -> None:
    from mlflow import MlflowClient

    run_dir, client = RunDirectory.open(str(tmp_path), "run"), MlflowClient(mlflow_store)
    for has_failed in (True, False):
        run = TrackedRun.begin(Tracking(("mlflow",), "run", SETTINGS), run_dir, "distill", "0" * 64)
        Stream(run, ("mlflow",), print).close(has_failed=has_failed)
        experiment = client.get_experiment_by_name("pocl-ray")
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.status == ("FAILED" if has_failed else "FINISHED")


def test_a_request_to_mlflow_holds_whole_steps(tmp_path: Path, mlflow_store: str, monkeypatch: Any) -> None:
    from mlflow import MlflowClient

    asked: list[list[int]] = []
    monkeypatch.setattr(trackers, "MAX_BATCH", 12)
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda *_, metrics=(), **__: asked.append([metric.step for metric in metrics])
    )
    run = TrackedRun.begin(Tracking(("mlflow",), "run", {}), RunDirectory.open(str(tmp_path), "run"), "a", "0" * 64)
    history = [(step, {"train/loss": 1.0, **dict.fromkeys("abcd", 2.0)}) for step in range(1, 6)]
    trackers.open_tracker("mlflow", run, history)
    assert [sorted(set(steps)) for steps in asked if steps] == [[1, 2], [3, 4], [5]]


def test_mlflow_logs_to_a_server_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_project: None) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    if "POCL_MLFLOW" not in os.environ:
        pytest.skip("POCL_MLFLOW does not name the `mlflow` command of an environment with the whole of MLflow")
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--artifacts-destination", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def command(port: int) -> list[str]:
        place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        return [os.environ["POCL_MLFLOW"], "server", *place, *store]

    with server_on_loopback(command, "/health", 240, environment) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check_mlflow(track("mlflow", tmp_path), uri)


@pytest.mark.parametrize("away", [None, 2])
def test_trackio_goes_on_in_the_run_of_its_local_store(tmp_path: Path, away: int | None) -> None:
    """In a process of its own, since Trackio reads the place of its store when it is imported."""
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    code = """
        import json, sys
        from pathlib import Path
        from tests.unit.tracking.test_trackers import track
        run = track("trackio", Path(sys.argv[1]), away=json.loads(sys.argv[2]))
        from trackio import SQLiteStorage
        (name,) = SQLiteStorage.get_runs("pocl-ray")
        logs = SQLiteStorage.get_logs("pocl-ray", name)
        print(json.dumps([run.id, name, logs, SQLiteStorage.get_run_config("pocl-ray", name)]))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TRACKIO_")}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(away)],
        cwd=root,
        env={**kept, "TRACKIO_DIR": str(tmp_path / "store")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run_id, name, logs, config = json.loads(done.stdout.splitlines()[-1])
    assert name == f"run/distill-{run_id}" and config["_Group"] == "run"
    assert config["train"]["learning_rate"] == 1e-3
    for key, steps in {"train/loss": [*range(1, 9)], "eval/dev/ce_loss": [0, 3, 8], "frontier/gap_mean": [3]}.items():
        assert [record["step"] for record in logs if key in record] == steps
    assert all(record["train/loss"] == 1 / record["step"] for record in logs if "train/loss" in record)
    last = logs[-1]
    assert last["final/held_out/student/rouge_l.mean"] == 33
    assert last["final/answers"]["_value"] == [ANSWER]
    assert last["plots/evaluation"]["_type"] == "trackio.image"
    assert list((tmp_path / "store" / "artifacts").rglob("*"))


@pytest.mark.parametrize("is_lost_later", [False, True])
def test_a_store_of_trackio_that_cannot_be_written_is_one_warning(tmp_path: Path, is_lost_later: bool) -> None:
    """Trackio itself goes on, and only writes it to its log."""
    trackio = pytest.importorskip("trackio", reason="the extra trackio is not installed")
    from trackio import sqlite_storage

    (tmp_path / "file").touch()
    lost = tmp_path / "file" / "store"
    run = TrackedRun.begin(Tracking(("trackio",), "run", {}), RunDirectory.open(str(tmp_path), "run"), "a", "0" * 64)
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "store" if is_lost_later else lost)
        if is_lost_later:
            patch.setattr(trackio.Run, "log", lambda *_, **__: None)
        stream = Stream(run, ("trackio",), warnings.append)
        stream.log(training_record(1))
        stream.close()
    (warning,) = warnings
    assert ("its store has step -1 as its last, not 1" if is_lost_later else str(lost)) in warning
