"""A trial: one real training run, which Ray Tune starts and stops, and which reports each dev evaluation."""

from __future__ import annotations

import math
import queue
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
from ray import tune

from pocl_ray.config import Config
from pocl_ray.data.prepare import Rows
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.choice import rank_table
from pocl_ray.distill.task import TrainTask, curriculum_task
from pocl_ray.errors import DivergedError
from pocl_ray.models.places import ModelRef
from pocl_ray.ray_train.driver import train_watched
from pocl_ray.ray_train.progress import TrainingStatus
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Candidate, PlannedTrial, Planner, TrialOrigins
from pocl_ray.tuning.results import DECISIVE, TRIALS, TrialRecord, decisive, figures_of, read_record

STOP_S = 45.0


@dataclass(frozen=True)
class Shared:
    """The prepared data and models that all trials share.

    Attributes:
        config: Base config.
        run_dir: Run directory of the search.
        rows: Prepared sets.
        student: Student before distillation.
        teachers: Teachers, each with its fingerprint.
        origins: Fingerprints that the students depend on.
        ranking: Fingerprint of the ranking in `scores`, which is the base config's.
        signals: Parquet file of the signals, for other rankings.
        scores: Parquet file of the base config's ranking.
        resources: Actor that knows each trial's resources in the cluster.
    """

    config: Config
    run_dir: RunDirectory
    rows: Rows
    student: ModelRef
    teachers: tuple[tuple[ModelRef, str], ...]
    origins: TrialOrigins
    ranking: str
    signals: str
    scores: str
    resources: Any

    def planner(self) -> Planner:
        """Return the planner of this search."""
        return Planner(self.config, self.rows.train.num_rows)

    def task(self, planned: PlannedTrial) -> TrainTask:
        """Return the training task of a candidate."""
        name = planned.name(self.origins)
        task = curriculum_task(
            planned.config,
            name=name,
            fingerprint=planned.fingerprint(self.origins),
            run_dir=self.run_dir,
            stages=planned.stages,
            student=self.student,
            teachers=self.teachers,
            rows=self.rows,
            output=f"{TRIALS}/{name}/student",
        )
        ranked_alike = planned.ranking_fingerprint(self.origins) == self.ranking
        return replace(task, scores=self.scores if ranked_alike else f"{TRIALS}/{name}/scores.parquet")


class _StoppedError(Exception):
    """The signal that Tune stops the trial."""


class CurriculumTrial(tune.Trainable):
    """Runs a candidate. One step of Tune lasts until the next dev evaluation."""

    def setup(self, config: dict[str, Any], shared: Shared) -> None:  # type: ignore[override]
        """Take the first candidate, but start nothing: Tune also sets up processes that it does not use later."""
        self.shared, self.candidate = shared, Candidate(**config["candidate"])
        self.run: TrialRun | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next candidate in the same process, which saves the start of a process."""
        self.cleanup()
        self.candidate = Candidate(**new_config["candidate"])
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next dev evaluation and return its figures; the first call starts the training run."""
        if self.run is None:
            self.run = TrialRun(self.shared, self.candidate)
        return self.run.next_report()

    def cleanup(self) -> None:
        """Stop the training run if it is still running, and free its workers."""
        if self.run is not None:
            self.run.stop()
        self.run = None


class TrialRun:
    """The training run of one candidate, in a thread next to the one that Tune calls."""

    def __init__(self, shared: Shared, candidate: Candidate) -> None:
        self.started, self.shared = time.monotonic(), shared
        self.planned = shared.planner().plan(candidate)
        self.task = shared.task(self.planned)
        self.stopping = threading.Event()
        self.queue: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        earlier = read_record(shared.run_dir, self.task.name)
        self.is_replay = (
            earlier is not None and earlier.status == "finished" and shared.run_dir.exists(self.task.output)
        )
        self.seconds_before = 0.0 if earlier is None else earlier.seconds
        self.thread = threading.Thread(target=self._train, name=self.task.name, daemon=True)
        if earlier is not None and self.is_replay:
            self.record = earlier
            for report in earlier.reports:
                self.queue.put(report)
            return
        self.record = TrialRecord(
            name=self.task.name,
            candidate=candidate,
            fingerprint=self.task.fingerprint,
            num_steps=self.planned.num_steps,
            num_samples=self.planned.num_samples,
            started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        self.record.write(shared.run_dir)
        self.thread.start()

    def next_report(self) -> dict[str, Any]:
        """Return the figures of the next dev evaluation; an error of the training run is raised here."""
        item = self.queue.get()
        if self.is_replay:
            assert isinstance(item, dict)
            return self._for_tune(item, is_done=self.queue.empty())
        record = self.record
        record.seconds = round(self.seconds_before + time.monotonic() - self.started, 2)
        if isinstance(item, BaseException):
            record.status = "diverged" if isinstance(item, DivergedError) else "failed"
            record.reason = _first_line(item)
            record.write(self.shared.run_dir)
            raise item
        item["seconds"] = record.seconds
        record.reports.append(item)
        if item["is_finished"]:
            record.status = "finished"
        record.write(self.shared.run_dir)
        return self._for_tune(item, is_done=item["is_finished"])

    def _for_tune(self, report: dict[str, Any], is_done: bool) -> dict[str, Any]:
        tune_config = self.shared.config.tune
        assert tune_config is not None, "a trial belongs to a search"
        return {**report, DECISIVE: decisive(report, tune_config.objectives[0]), "done": is_done}

    def stop(self) -> None:
        """Stop the run if it is still running; its workers are free when this returns."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join(STOP_S)

    def _train(self) -> None:
        num_seen = 0

        def watch(training_status: TrainingStatus) -> None:
            nonlocal num_seen
            if self.stopping.is_set():
                raise _StoppedError
            if self.record.start_s is None and training_status.train:
                self.record.start_s = round(time.monotonic() - self.started, 2)
            self.record.node = training_status.node
            for end in range(num_seen + 1, len(training_status.evaluations) + 1):
                if 0 < training_status.evaluations[end - 1]["step"] < self.task.num_steps:
                    self.queue.put(self._report(training_status.evaluations[:end], is_finished=False))
            num_seen = len(training_status.evaluations)

        try:
            write_ranking(self.shared, self.planned, self.task)
            training_status = train_watched(self.task, self.planned.config.scaling, watch, self.shared.resources)
            if not training_status.is_finished:
                raise RuntimeError("the training run ended before its student was written")
            self.queue.put(self._report(training_status.evaluations, is_finished=True))
        except _StoppedError:
            return
        except Exception as error:
            self.queue.put(error)

    def _report(self, evaluations: list[dict[str, Any]], is_finished: bool) -> dict[str, Any]:
        last = evaluations[-1]
        figures = figures_of(evaluations, self.task.hand_off)
        if not all(math.isfinite(value) for value in figures.values()):
            raise DivergedError(f"a dev figure is not finite after step {last['step']}")
        return {
            **figures,
            "stage": last["curriculum/stage"],
            "num_steps": last["step"],
            "num_samples": last["step"] * self.task.train.global_batch_rows,
            "num_tokens": last["num_tokens"],
            "is_finished": is_finished,
        }


def write_ranking(shared: Shared, planned: PlannedTrial, task: TrainTask) -> None:
    """Write the candidate's ranking from the existing signals, if it differs from the base config's."""
    if task.scores is None or task.scores == shared.scores:
        return
    rows = RowStore.open(shared.run_dir.local(shared.rows.train.path))
    signals = shared.run_dir.read_table(shared.signals)
    ranked = rank_table(signals, rows, planned.config.difficulty, planned.config.seed)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "scores.parquet"
        pq.write_table(ranked, path)
        shared.run_dir.publish(path, task.scores)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:500]
