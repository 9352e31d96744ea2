"""Groups of trackers: each trial, and each seed of an arm, is a run in the group of its search or experiment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pocl_ray.config import Config
from pocl_ray.distill.task import TrainTask
from pocl_ray.experiments.arms import plan_arms
from pocl_ray.experiments.scored import ScoredRun
from pocl_ray.models.places import ModelRef
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tracking.run import TrackedRun
from pocl_ray.tuning.candidates import Candidate, Planner, TrialOrigins
from pocl_ray.tuning.trial import Shared

NUM_ROWS = 256
TREE: dict[str, Any] = {
    "name": "mine",
    "tracking": ["tensorboard"],
    "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 8},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "train": {"global_batch_rows": 32, "micro_batch_rows": 16, "precision": "fp32"},
}
MADE = RowsSummary("train", "rows/train.arrow", NUM_ROWS, 0, 9, 9, 4, "f")
ROWS: Any = SimpleNamespace(train=MADE, dev=MADE, tests={"dev": MADE}, for_teacher={})
TEACHERS = ((ModelRef("teacher"), "f"),)


def tracked(task: TrainTask) -> TrackedRun:
    assert task.tracking.trackers == ("tensorboard",)
    return TrackedRun.begin(task.tracking, task.run_dir, *task.identity)


def test_each_trial_is_a_run_in_the_group_of_its_search(tmp_path: Path) -> None:
    space = {"curriculum.num_buckets": {"choice": [2, 4]}}
    config = Config.model_validate({**TREE, "tune": {"space": space, "num_trials": 2}})
    where, origins = RunDirectory(str(tmp_path)), TrialOrigins("g", "s")
    shared = Shared(config, where, ROWS, ModelRef("student"), TEACHERS, origins, "r", "", "", None)
    candidates = [Candidate("trial", at, {"curriculum.num_buckets": 2 + 2 * at}) for at in (0, 1)]
    runs = [tracked(shared.task(Planner(config, NUM_ROWS).plan(one))) for one in candidates]
    assert {run.group for run in runs} == {"mine"} and len({run.id for run in runs}) == 2
    assert [run.title[:14] for run in runs] == ["mine/trial-000", "mine/trial-001"]
    assert len({run.settings["curriculum"]["num_buckets"] for run in runs}) == 2


def test_each_arm_and_seed_is_a_run_in_the_group_of_its_experiment(tmp_path: Path) -> None:
    arms = {"plain": {"curriculum.pacing": "none"}, "fast": {"train.learning_rate": 1e-3}}
    config = Config.model_validate({**TREE, "experiment": {"arms": arms, "seeds": [1, 2]}})
    scored = ScoredRun.__new__(ScoredRun)  # without a pipeline, which would score rows
    scored.run_dir, scored.rows, scored.signals, scored.own_ranking = RunDirectory(str(tmp_path)), ROWS, "g", ""
    scored.student = scored.teacher = SimpleNamespace(ref=ModelRef("student"), fingerprint="f")  # type: ignore[assignment]
    scored.teachers = TEACHERS
    scored._scores = lambda *_: "scores.parquet"  # type: ignore[method-assign]
    planned = plan_arms(config, NUM_ROWS)
    jobs = [scored.job(config, planned[arm], seed, {"dev": MADE}) for arm in ("plain", "fast") for seed in (1, 2)]
    runs = [tracked(job.task) for job in jobs]
    assert {run.group for run in runs} == {"mine"} and len({run.id for run in runs}) == 4
    assert [run.name.rpartition("-")[0] for run in runs] == [
        "plain-seed-1", "plain-seed-2", "fast-seed-1", "fast-seed-2"
    ]  # fmt: skip
    assert [run.settings["train"]["seed"] for run in runs] == [1, 2, 1, 2]
