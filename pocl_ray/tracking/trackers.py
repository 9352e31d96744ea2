"""The four trackers. Each is opened for one run, takes points and results, and is closed; errors are the caller's.

Their packages are imported here alone, when a run opens one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pocl_ray.tracking.results import Results, as_json, as_markdown
from pocl_ray.tracking.run import Point, TrackedRun, flat_settings

FLUSH_S = 10
"""The seconds of a training that a killed process may lose."""

TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
MLFLOW_URI = "MLFLOW_TRACKING_URI"
MLFLOW_ID = "pocl_ray.id"
MAX_BATCH = 1000  # metrics in one request to MLflow
MAX_PARAMS = 100  # parameters in one request to MLflow
MAX_PARAM_CHARS = 6000

KINDS = ("train/loss", "eval/dev/ce_loss", "frontier/gap_mean")
"""A key of each kind of record: of a step, of a dev evaluation, and of a stage that begins with frontier pacing.

A tracker has a record if it has this key at its step.
"""


class Tracker(Protocol):
    """One tracker, open for one run."""

    def log(self, points: Sequence[Point]) -> None:
        """Take points of the metric stream, in order."""

    def log_results(self, results: Results) -> None:
        """Take the results of the run."""

    def close(self, has_failed: bool = False) -> None:
        """Send everything, and end the run in the tracker, as failed where the tracker tells that apart."""


def open_tracker(name: str, run: TrackedRun, history: Sequence[Point] = ()) -> Tracker:
    """Open a tracker for a run, which goes on in the tracker if it is there already.

    Args:
        name: Name of the tracker.
        run: Run.
        history: Points of the run so far; those that the tracker lacks are sent.

    Raises:
        Exception: The tracker's package is missing, has no key, or does not reach its server.
    """
    return _TRACKERS[name](run, history)


class TensorBoard:
    """Event files in `tensorboard/<name of the training>` of the run directory."""

    def __init__(self, run: TrackedRun, history: Sequence[Point]) -> None:
        from tensorboardX import SummaryWriter

        self._run_dir, self._rel = run.run_dir, f"tensorboard/{run.name}"
        is_local = run.local_folder() is not None
        self._folder = Path(run.run_dir.uri) / self._rel if is_local else Path(tempfile.mkdtemp(prefix="tensorboard-"))
        self._is_local = is_local
        # TensorBoard forgets the steps from `purge` on, which are written again: those that were taken after the
        # checkpoint, and those before it that a killed process still held in memory. Times of the others stay.
        written = _written(run.run_dir.local(self._rel)) if run.run_dir.exists(self._rel) else set()
        missing = [step for step, figures in history if (step, _kind(figures)) not in written]
        purge = missing[0] if missing else history[-1][0] + 1 if history else 0
        self._written = {point for point in written if point[0] < purge}
        # Two starts in one second would otherwise write to one file; files are read in the order of their names.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=FLUSH_S, filename_suffix=suffix)
        self._writer.add_text("config", f"```json\n{json.dumps(run.settings, indent=2)}\n```", purge)
        self.log(history)

    def log(self, points: Sequence[Point]) -> None:
        """Write points that the event files do not have."""
        new = [(step, figures) for step, figures in points if (step, _kind(figures)) not in self._written]
        for step, figures in new:
            for key, value in figures.items():
                self._writer.add_scalar(key, value, step)
        if any(KINDS[0] not in figures for _, figures in new):
            self._publish()

    def log_results(self, results: Results) -> None:
        """Write final figures as scalars, tables as text, and plots as images."""
        import numpy as np
        from PIL import Image

        for key, value in results.figures.items():
            self._writer.add_scalar(key, value, results.step)
        self._writer.add_text("final", as_markdown(results.table), results.step)
        self._writer.add_text("answers", as_markdown(results.answers), results.step)
        for name, path in results.plots.items():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"plots/{name}", pixels, results.step, dataformats="HWC")

    def close(self, has_failed: bool = False) -> None:
        """Close the event file."""
        self._writer.close()
        self._publish()
        if not self._is_local:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _publish(self) -> None:
        self._writer.flush()
        if not self._is_local:
            for path in self._folder.iterdir():
                self._run_dir.write_bytes(f"{self._rel}/{path.name}", path.read_bytes())


class Wandb:
    """A run of Weights & Biases; with WANDB_MODE=offline its files are in the run directory, for `wandb sync`.

    Each start of an offline run writes the whole record into a new folder, and those of earlier starts are deleted in
    the end. `wandb sync` stops at the first file that ends within a record, which is what a killed process leaves, and
    then uploads none of the files after it.
    """

    def __init__(self, run: TrackedRun, history: Sequence[Point]) -> None:
        import wandb

        self._wandb = wandb
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise RuntimeError("there is no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
        folder = run.local_folder()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=run.project("wandb"),
            group=run.group,
            name=run.title,
            id=run.id,
            resume="allow",
            config=dict(run.settings),
            dir=None if "WANDB_DIR" in os.environ or folder is None else str(folder),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        self._first_step = self._run.starting_step  # 0 for an offline run
        self.log(history)

    def log(self, points: Sequence[Point]) -> None:
        """Log points that the server does not have; it takes no step before its last one."""
        for step, figures in points:
            if step >= self._first_step:
                self._run.log(figures, step=step)

    def log_results(self, results: Results) -> None:
        """Log final figures as the summary, tables, plots, and files as one artifact."""
        tables = {"final/table": results.table, "final/answers": results.answers}
        media: dict[str, Any] = {key: self._table(table) for key, table in tables.items() if table}
        media |= {f"plots/{name}": self._wandb.Image(str(path)) for name, path in results.plots.items()}
        # After the steps of the training, which `wandb sync` leaves out if it has uploaded them before.
        self._run.log(media, step=max(self._run.step, results.step + 1))
        self._run.summary.update(dict(results.figures))
        artifact = self._wandb.Artifact(f"results-{self._run.id}", type="results")
        for name, path in results.files.items():
            artifact.add_file(str(path), name=name)
        self._run.log_artifact(artifact)

    def close(self, has_failed: bool = False) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(has_failed))
        if self._run.offline:
            folder = Path(self._run.dir).parent
            # The second start within a second has a number behind the id.
            for earlier in folder.parent.glob(f"offline-run-*-{self._run.id}*"):
                if earlier != folder:
                    shutil.rmtree(earlier, ignore_errors=True)

    def _table(self, table: list[dict[str, Any]]) -> Any:
        names: list[str | int] = list(dict.fromkeys(key for row in table for key in row))
        return self._wandb.Table(columns=names, data=[[row.get(str(name)) for name in names] for row in table])


class MLflow:
    """A run of an MLflow server; a tag holds its group, and another one the id by which a resumed training finds it."""

    def __init__(self, run: TrackedRun, history: Sequence[Point]) -> None:
        if not os.environ.get(MLFLOW_URI):
            raise RuntimeError(f"no server is named; set {MLFLOW_URI}, such as http://HOST:5000")
        # Its defaults wait for minutes. A server that does not answer is given up within the minute that the end of a
        # training waits: three times 10 seconds, and a few between them.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        experiment = self._experiment(run.project("mlflow"))
        found = self._client.search_runs([experiment], f"tags.`{MLFLOW_ID}` = '{run.id}'", max_results=1)
        self._last_steps = dict.fromkeys(KINDS, -1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            for kind in KINDS:
                taken = self._client.get_metric_history(self._id, kind)
                self._last_steps[kind] = max((metric.step for metric in taken), default=-1)
            self.log(history)
            return
        tags = {MLFLOW_ID: run.id, "group": run.group}
        self._id = self._client.create_run(experiment, run_name=run.title, tags=tags).info.run_id
        params = [Param(key, value[:MAX_PARAM_CHARS]) for key, value in flat_settings(run.settings).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MAX_PARAMS])
        self._client.log_dict(self._id, dict(run.settings), "config.json")
        self.log(history)

    def log(self, points: Sequence[Point]) -> None:
        """Log points that the run does not have yet."""
        now, batch = int(time.time() * 1000), list[Any]()
        for step, figures in points:
            if step > self._last_steps[_kind(figures)]:
                # A request holds whole points only: what the server has of a step, it has all of.
                if len(batch) + len(figures) > MAX_BATCH:
                    self._client.log_batch(self._id, metrics=batch)
                    batch = []
                batch += [self._metric(key, value, now, step) for key, value in figures.items()]
        if batch:
            self._client.log_batch(self._id, metrics=batch)

    def log_results(self, results: Results) -> None:
        """Log final figures as metrics, and everything else as artifacts."""
        now = int(time.time() * 1000)
        figures = [self._metric(key, value, now, results.step) for key, value in results.figures.items()]
        for start in range(0, len(figures), MAX_BATCH):
            self._client.log_batch(self._id, metrics=figures[start : start + MAX_BATCH])
        self._client.log_text(self._id, as_json(results.table), "final.json")
        self._client.log_text(self._id, as_json(results.answers), "answers.json")
        for folder, files in ((None, results.files), ("plots", results.plots)):
            for path in files.values():
                self._client.log_artifact(self._id, str(path), folder)

    def close(self, has_failed: bool = False) -> None:
        """Mark the run as finished, or as failed."""
        self._client.set_terminated(self._id, "FAILED" if has_failed else "FINISHED")

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has created it in this moment
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


class Trackio:
    """A run of Trackio, in its local store (TRACKIO_DIR), or where its own variables say."""

    def __init__(self, run: TrackedRun, history: Sequence[Point]) -> None:
        import trackio

        self._trackio, self._project = trackio, run.project("trackio")
        # Trackio finds a run by its name, so the name holds the id.
        self._name = f"{run.title}-{run.id}"
        self._is_local = not any(os.environ.get(name) for name in TRACKIO_ELSEWHERE)
        if self._is_local:  # a store that cannot be written is no error to Trackio, which goes on without it
            store = trackio.SQLiteStorage.get_project_db_path(self._project).parent
            store.mkdir(parents=True, exist_ok=True)
            if not os.access(store, os.W_OK):
                raise PermissionError(f"{store} cannot be written; set TRACKIO_DIR to a folder that can")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to open its dashboard
            self._run = trackio.init(
                project=self._project,
                name=self._name,
                group=run.group,
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._last_steps = dict.fromkeys(KINDS, -1)
        for record in trackio.SQLiteStorage.get_logs(self._project, self._name):
            kind = _kind(record)
            self._last_steps[kind] = max(self._last_steps[kind], int(record["step"]))
        self._last_sent = -1
        if self._is_local:  # what another store has cannot be read
            self.log(history)

    def log(self, points: Sequence[Point]) -> None:
        """Log points that the local store does not have yet."""
        for step, figures in points:
            if step > self._last_steps[_kind(figures)]:
                self._run.log(figures, step=step)
                self._last_sent = step

    def log_results(self, results: Results) -> None:
        """Log final figures, tables and plots, and files as one artifact."""
        import pandas as pd

        tables = {"final/table": results.table, "final/answers": results.answers}
        media: dict[str, Any] = {
            key: self._trackio.Table(dataframe=pd.DataFrame(table)) for key, table in tables.items() if table
        }
        media |= {f"plots/{name}": self._trackio.Image(str(path)) for name, path in results.plots.items()}
        self._run.log({**results.figures, **media}, step=results.step)
        artifact = self._trackio.Artifact(f"results-{self._name.replace('/', '-')}", type="results")
        for path in results.files.values():
            artifact.add_file(path)
        self._run.log_artifact(artifact)

    def close(self, has_failed: bool = False) -> None:
        """Finish the run.

        Raises:
            RuntimeError: The local store lacks what was sent, which Trackio itself only writes to its log.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
        if self._is_local and self._last_step() < self._last_sent:
            raise RuntimeError(
                f"its store has step {self._last_step()} as its last, not {self._last_sent}; is it full?"
            )

    def _last_step(self) -> int:
        logs = self._trackio.SQLiteStorage.get_logs(self._project, self._name)
        return max((int(record["step"]) for record in logs), default=-1)


def _kind(figures: Mapping[str, Any]) -> str:
    return next((kind for kind in KINDS if kind in figures), KINDS[1])


def _written(folder: Path) -> set[tuple[int, str]]:
    """Return step and kind of the points in event files, without those that a later start has taken back."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points: set[tuple[int, str]] = set()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, place = path.read_bytes(), 0
        while place + 12 <= len(data):  # length and its checksum, the event, and its checksum
            (length,) = struct.unpack_from("<Q", data, place)
            content = data[place + 12 : place + 12 + length]
            place += 16 + length
            if len(content) < length:
                break  # a killed process leaves part of an event
            event = Event.FromString(content)
            if event.session_log.status == SessionLog.START:
                points = {point for point in points if point[0] < event.step}
            points |= {(event.step, value.tag) for value in event.summary.value if value.tag in KINDS}
    return points


_TRACKERS: dict[str, Callable[[TrackedRun, Sequence[Point]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
