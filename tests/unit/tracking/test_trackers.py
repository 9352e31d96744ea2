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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.run_directory.storage import RunDirectory
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


def track(tracker: str, folder: Path, starts: tuple[tuple[int, int], ...] = ((0, 2), (0, 5), (3, 8))) -> TrackedRun:
    """A training of eight steps that dies before and after its checkpoint at the third, and is evaluated."""
    run_dir = RunDirectory.open(str(folder), "run")
    tracking = Tracking((tracker,), "run", SETTINGS)
    warnings: list[str] = []
    for first, last in starts:
        run = TrackedRun.begin(tracking, run_dir, "distill", "0" * 64, first)
        stream = Stream(run, (tracker,), warnings.append)
        if first == 0:
            stream.log(dev_record(0))
        for step in range(first + 1, last + 1):
            stream.log(training_record(step))
        stream.log(dev_record(last))
        stream.close()
    run = TrackedRun.begin(tracking, run_dir, "distill", "0" * 64, 8)
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


def test_tensorboard_shows_one_run_without_the_steps_that_were_taken_twice(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard's reader is not installed"
    )
    track("tensorboard", tmp_path)
    shown = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard" / "distill"), {"images": 0, "tensors": 0})
    shown.Reload()
    losses = shown.Scalars("train/loss")
    assert [(event.step, round(event.value, 4)) for event in losses] == [(n, round(1 / n, 4)) for n in range(1, 9)]
    assert [event.step for event in shown.Scalars("eval/dev/ce_loss")] == [0, 8]
    assert shown.Scalars("train/tokens_per_s")[0].value == 200
    assert shown.Scalars("system/process_memory_gib")[0].value > 0
    assert shown.Scalars("final/held_out/student/rouge_l.mean")[0].value == 33
    (image,) = shown.Images("plots/evaluation")
    assert (image.width, image.height) == (4, 3)
    texts = {tag: shown.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in shown.Tags()["tensors"]}
    assert '"learning_rate": 0.001' in texts["config/text_summary"]
    assert "| held_out | student | 33 |" in texts["final/text_summary"]
    assert "a \\| b &lt;b>" in texts["answers/text_summary"]


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


def test_wandb_writes_offline_and_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()  # a test before may have used it with another environment, which it remembers
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = track("wandb", tmp_path, ((0, 5), (3, 8)))
    wandb.teardown()  # its process writes on after a run's finish(); this waits until it has ended
    files = sorted((tmp_path / "run" / "tracking" / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{run.id}.wandb"} and len(files) == 3
    records = [list(records_of(path)) for path in files]
    (begun,) = (record.run for record in records[0] if record.HasField("run"))
    assert (begun.run_group, begun.display_name, begun.project) == ("run", "run/distill", "pocl-ray")
    losses = []
    for record in (record for part in records for record in part if record.HasField("history")):
        figures = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in figures:
            losses.append((record.history.step.num, figures["train/loss"]))
    steps = [*range(1, 6), *range(4, 9)]  # `wandb sync` leaves out the steps that it has
    assert losses == [(step, 1 / step) for step in steps]
    media = [record.history for record in records[2] if record.HasField("history")]
    assert [each.step.num for each in media] == [9]  # after the last step; at an earlier one `wandb sync` may drop it
    assert any(record.HasField("artifact") for record in records[2])
    summary = {item.key: item.value_json for record in records[2] for item in record.summary.update}
    assert json.loads(summary["final/held_out/student/rouge_l.mean"]) == 33


def check_mlflow(run: TrackedRun, uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pocl-ray")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`pocl_ray.id` = '{run.id}'")
    assert (found.info.run_name, found.data.tags["group"], found.info.status) == ("run/distill", "run", "FINISHED")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 9)]
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


def test_mlflow_goes_on_in_the_run_with_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_project: None
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    uri = f"file://{tmp_path / 'store'}"  # a store of files: one of SQLite takes ten seconds to be made
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_mlflow(track("mlflow", tmp_path), uri)


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


def test_trackio_goes_on_in_the_run_of_its_local_store(tmp_path: Path) -> None:
    """In a process of its own, since Trackio reads the place of its store when it is imported."""
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    code = """
        import json, sys
        from pathlib import Path
        from tests.unit.tracking.test_trackers import track
        run = track("trackio", Path(sys.argv[1]))
        from trackio import SQLiteStorage
        (name,) = SQLiteStorage.get_runs("pocl-ray")
        logs = SQLiteStorage.get_logs("pocl-ray", name)
        print(json.dumps([run.id, name, logs, SQLiteStorage.get_run_config("pocl-ray", name)]))
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TRACKIO_")}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=root,
        env={**kept, "TRACKIO_DIR": str(tmp_path / "store")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run_id, name, logs, config = json.loads(done.stdout.splitlines()[-1])
    assert name == f"run/distill-{run_id}" and config["_Group"] == "run"
    assert config["train"]["learning_rate"] == 1e-3
    losses = [(record["step"], record["train/loss"]) for record in logs if "train/loss" in record]
    assert losses == [(step, 1 / step) for step in range(1, 9)]
    last = logs[-1]
    assert last["final/held_out/student/rouge_l.mean"] == 33
    assert last["final/answers"]["_value"] == [ANSWER]
    assert last["plots/evaluation"]["_type"] == "trackio.image"
    assert list((tmp_path / "store" / "artifacts").rglob("*"))
