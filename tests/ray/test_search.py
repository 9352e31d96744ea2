"""Ray Tune's part of a search, with a training run that only pretends: what is asked, stopped, recorded and resumed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
from tiny import config_tree

from pocl_ray.config import Config, ScalingConfig
from pocl_ray.data.prepare import Rows
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import DivergedError
from pocl_ray.models.places import ModelRef
from pocl_ray.pipeline import Pipeline
from pocl_ray.ray_train.progress import TrainingStatus
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning import search, trial
from pocl_ray.tuning.results import Outcome

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test

NUM_ROWS = 96
TUNE: dict[str, Any] = {
    "algorithm": "grid",
    "space": {"curriculum.num_buckets": {"grid": [1, 3]}, "curriculum.kd_temperature.end": {"grid": [1.5, 2.0]}},
    "constraints": ["curriculum.num_buckets == 3 or curriculum.kd_temperature.end > 1.8"],
    "budget": {"steps": 30},
    "scheduler": {"type": "asha", "reduction_factor": 2, "grace_samples": 96},
    "confirm": {"top_k": 1, "seeds": [7]},
}


def pretend(
    task: TrainTask, scaling: ScalingConfig, watch: Callable[[TrainingStatus], None], *progress_actors: Any
) -> TrainingStatus:
    """Report what a training run would, without one: the higher the first temperature's end, the better.

    A plan of three stages loses its finite loss, or fails.
    """
    training_status = TrainingStatus(num_steps=task.num_steps, num_starts=1)
    watch(training_status)
    done = 0
    for stage in task.stages:
        done += stage.num_steps
        training_status.step, training_status.num_tokens = done, 10 * done
        last = task.stages[-1].kd_temperature
        training_status.train = {"train/loss": 1.0}
        if len(task.stages) == 3 and last < 1.8:
            raise DivergedError("the loss was not finite in 3 consecutive steps")
        if len(task.stages) == 3 and last >= 1.8:
            raise RuntimeError("a worker died\nand more lines")
        figures = {"eval/dev/rouge_l": 10 * last + done / 10, "eval/dev/ce_loss": 1.0}
        position = {"step": done, "curriculum/stage": stage.index, "num_tokens": 10 * done}
        training_status.evaluations = [*training_status.evaluations, {**position, **figures}]
        time.sleep(0.5)
        watch(training_status)
    student = Path(task.run_dir.uri) / task.output
    student.mkdir(parents=True, exist_ok=True)
    (student / "made.txt").write_text(str(time.time()))
    training_status.is_finished = True
    return training_status


class PretendTrial(trial.CurriculumTrial):
    """A trial whose training run is `pretend`."""

    def setup(self, config: dict[str, Any], shared: trial.Shared) -> None:
        trial.train_watched = pretend
        trial.write_ranking = lambda *_: None
        super().setup(config, shared)


@dataclass
class PretendPipeline:
    """The part of a pipeline that a search needs, with the shared steps done."""

    config: Config
    run_dir: RunDirectory
    ranking: str = "ranking"
    signals: str = "signals"

    @property
    def inputs(self) -> Any:
        rows = RowsSummary("train", "rows/train.arrow", NUM_ROWS, 0, 1, 1, 1, "rows")
        made = SimpleNamespace(ref=ModelRef("model"), fingerprint="model")
        return SimpleNamespace(
            rows=Rows(train=rows, dev=rows, tests={}, leaks={}), student=made, teachers=((made.ref, made.fingerprint),)
        )


def run_search(folder: Path, monkeypatch: pytest.MonkeyPatch, **tune: Any) -> tuple[Outcome, Path]:
    monkeypatch.setattr(search, "CurriculumTrial", PretendTrial)
    config = Config.model_validate({**config_tree(folder), "tune": {**TUNE, **tune}})
    pipeline = PretendPipeline(config, RunDirectory.open(config.storage_path, config.name))
    return search.Search(cast(Pipeline, pipeline)).run(), folder / "runs/tiny"


def test_a_search_survives_failures_names_a_winner_and_does_nothing_twice(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, run = run_search(tmp_path, monkeypatch)
    statuses = {r.candidate.label: r.status for r in outcome.records}
    assert statuses["control"] == statuses["control-seed-7"] == "finished"
    assert (statuses["trial-001"], statuses["trial-002"]) == ("diverged", "failed")
    assert {r.candidate.label: r.reason for r in outcome.records}["trial-002"] == "RuntimeError: a worker died"
    assert outcome.winner is not None and outcome.winner.record.status == "finished"
    assert len(outcome.winner.values) == 2
    assert len(pq.read_table(run / "tune/results.parquet")) == len(outcome.records) == 6
    assert (run / "tune/best/made.txt").exists() and (run / "tune/report.html").exists()
    assert list(run.glob("tune/search-*/*/events.out.tfevents.*"))
    made = {path: path.read_text() for path in run.glob("tune/trials/*/student/made.txt")}
    again, _ = run_search(tmp_path, monkeypatch)
    assert {r.name: r.status for r in again.records} == {r.name: r.status for r in outcome.records}
    assert {path: path.read_text() for path in made} == made


def test_optuna_and_the_scheduler_work_on_what_trials_report(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"curriculum.num_buckets": {"choice": [1, 2]}, "curriculum.kd_temperature.end": {"uniform": [1.0, 3.0]}}
    outcome, run = run_search(
        tmp_path,
        monkeypatch,
        algorithm="optuna",
        space=space,
        constraints=[],
        num_trials=4,
        objectives=["rouge_l", "num_tokens"],
        control=False,
    )
    trials = [r for r in outcome.records if r.candidate.kind == "trial"]
    assert len(trials) == 4
    assert {r.status for r in trials} <= {"finished", "stopped"}
    assert all(r.last["num_samples"] == 30 * 16 for r in trials if r.status == "finished")
    best = max((r for r in trials if r.status == "finished"), key=lambda r: r.last["rouge_l"])
    assert outcome.winner is not None and outcome.winner.record.name == best.name
    assert json.loads((run / "tune/skipped.json").read_text()) == []
