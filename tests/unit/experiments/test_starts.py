"""What arms start from: one scoring for all seeds, or one for the student of each seed. No model is made."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from arms_config import NUM_ROWS, experiment_config

from pocl_ray.config import Config
from pocl_ray.distill.task import sft_task
from pocl_ray.experiments import starts
from pocl_ray.experiments.arms import plan_arms
from pocl_ray.models.places import ModelRef
from pocl_ray.records import RowsSummary


class FakePipeline:
    """Remembers how it was opened."""

    def __init__(self, config: Config, resume_with_changes: bool, connect: Any, teacher: Any = None) -> None:
        self.config, self.teacher, self.is_open = config, teacher, True
        self.inputs = SimpleNamespace(teacher=f"teacher of {config.name}")

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[FakePipeline]:
    """The runs that were scored, in their order."""
    made: list[FakePipeline] = []

    def score(pipeline: FakePipeline) -> SimpleNamespace:
        made.append(pipeline)
        return SimpleNamespace(pipeline=pipeline, num_rows=NUM_ROWS)

    monkeypatch.setattr(starts, "Pipeline", FakePipeline)
    monkeypatch.setattr(starts, "ScoredRun", score)
    return made


def start(config: Config, stack: ExitStack) -> dict[str, starts.Starts]:
    pipelines = starts.open_runs(config, plan_arms(config, NUM_ROWS), False, stack)
    return starts.score_runs(config, pipelines, False, stack)


def test_a_shared_student_is_scored_once(scored: list[FakePipeline]) -> None:
    with ExitStack() as stack:
        found = start(experiment_config(screen={"seeds": [9]}), stack)
    assert [pipeline.config.name for pipeline in scored] == ["trial"]
    assert list(found["trial"]) == [9, 1, 2, 3]
    assert len({id(one) for one in found["trial"].values()}) == 1


def test_by_seed_each_scoring_has_a_student_of_each_seed_and_one_teacher(scored: list[FakePipeline]) -> None:
    larger = {"larger": {"student.path": "larger"}}
    with ExitStack() as stack:
        found = start(experiment_config(larger, student="by_seed", screen={"seeds": [9]}), stack)
        assert all(pipeline.is_open for pipeline in scored)
    assert {where: list(of_seed) for where, of_seed in found.items()} == {
        "trial": [9, 1, 2, 3],
        "trial--larger": [9, 1, 2, 3],
    }
    ours = scored[:4]
    assert [pipeline.config.name for pipeline in ours] == [f"trial--seed-{seed}" for seed in (9, 1, 2, 3)]
    assert [pipeline.config.student_seed for pipeline in ours] == [9, 1, 2, 3]
    assert {pipeline.config.seed for pipeline in ours} == {42}  # rows, ties and answers stay those of the run
    assert {pipeline.teacher for pipeline in ours} == {"teacher of trial"}
    assert {pipeline.config.student.path for pipeline in scored[4:]} == {"larger"}
    assert not any(pipeline.is_open for pipeline in scored)


def test_the_seed_of_a_student_is_that_of_its_fine_tuning_alone() -> None:
    config = experiment_config().model_copy(update={"experiment": None})
    own = config.model_copy(update={"student": config.student.model_copy(update={"seed": 7})})
    made = RowsSummary("train", "rows/train.arrow", NUM_ROWS, 0, 9, 9, 4, "f")
    rows = SimpleNamespace(train=made, dev=made, for_teacher={})
    tasks = [sft_task(c, "student", ModelRef("student"), rows, None, "f") for c in (config, own)]  # type: ignore[arg-type]
    assert [task.seed for task in tasks] == [42, 7]
    assert own.seed == 42
