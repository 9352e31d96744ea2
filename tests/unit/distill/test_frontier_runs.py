"""Frontier pacing in training runs: which gaps steps see, which rows are drawn by them, and resumed to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import torch
from safetensors.numpy import load_file

from pocl_ray.config import CurriculumConfig, DistillConfig, RolloutConfig
from pocl_ray.config.sources import ScoringGenerationConfig
from pocl_ray.curriculum.frontier import draw_rows, row_weights
from pocl_ray.curriculum.schedule import plan_curriculum
from pocl_ray.data.batching import global_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.actors import ScoringTask, StudentActor, TeacherActor
from pocl_ray.difficulty.tasks import plan_tasks, unit_table
from pocl_ray.distill.gaps import FRONTIER_FILE
from pocl_ray.distill.losses import LOSSES
from pocl_ray.distill.task import TrainTask
from pocl_ray.records import GAP

EACH_STEP = runs.TRAIN.model_copy(update={"checkpoint_every_steps": 1, "num_checkpoints": 99})
STILL = EACH_STEP.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})  # nothing is learnt
NUM_STAGES, STAGE_STEPS = 3, 4
# The gaps of models that are not trained lie close together: a high power draws some rows often and others never.
SHARP = {"num_stages": NUM_STAGES, "floor": 1e-6, "power": 8.0}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainTask:
    """A task of three frontier stages over rows that are scored without answers, as the pipeline does it."""
    made = runs.prepare(tmp_path_factory.mktemp("frontier"))
    table = first_scores(made)
    assert "rouge_l" not in table.column_names or table["rouge_l"].null_count == len(table)
    ranks = pa.array(np.arange(1, len(table) + 1))
    pq.write_table(table.select(["id", GAP]).append_column("rank", ranks), f"{made.run_dir.uri}/scores.parquet")
    return with_frontier(replace(made, train=EACH_STEP))


def with_frontier(task: TrainTask, **keys: Any) -> TrainTask:
    curriculum = CurriculumConfig.model_validate(
        {"pacing": "frontier", "num_steps": NUM_STAGES * STAGE_STEPS, "frontier": {**SHARP, **keys}}
    )
    return replace(task, stages=plan_curriculum(curriculum, runs.NUM_ROWS, 8), frontier=curriculum.frontier)


def first_scores(task: TrainTask) -> pa.Table:
    scoring = ScoringTask(
        run_dir=task.run_dir,
        rows={"train": task.rows.path},
        student_set="train",
        tokenizer="tokenizer",
        student=task.student,
        teacher=task.teachers[0].ref,
        generation=ScoringGenerationConfig(max_new_tokens=6),
        max_tokens=task.max_tokens,
        seed=5,
        compare=True,
        cache=None,
        cache_dtype="auto",
        use_gpu=False,
        answers=False,
    )
    rows = store(task)
    plan = plan_tasks(rows.prompt_lengths, rows.response_lengths, 4, 128)
    student, teacher = StudentActor(scoring), TeacherActor(scoring)
    parts = [part for one in plan for units in student(unit_table("train", one)) for part in teacher(units)]
    return pa.concat_tables(parts).sort_by("id")


def store(task: TrainTask) -> RowStore:
    return RowStore.open(task.run_dir.local(task.rows.path))


def kept(checkpoint: Path) -> dict[str, np.ndarray]:
    return load_file(checkpoint / FRONTIER_FILE)


def first_gaps(task: TrainTask) -> np.ndarray:
    return pq.read_table(task.run_dir.local("scores.parquet"))[GAP].to_numpy()


LOSS_CASES: dict[str, Any] = {
    **{f"loss {name}": {"loss": name} for name in LOSSES if name != "uld"},
    "weighted": {"token_weight": "teacher_entropy"},
}


@pytest.fixture(scope="module")
def alone(task: TrainTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainTask, runs.Outcome]]:
    """Runs of one worker, in one process, which saves its start: each with its task and its outcome."""
    folder = tmp_path_factory.mktemp("alone")
    small = task.train.model_copy(update={"micro_batch_rows": 1})
    tasks = {
        "whole": task,
        "micro": replace(task, train=small),
        "mid stage": task,
        "end of stage": task,
        "rescore": with_frontier(task, refresh="rescore"),
        "sample": with_frontier(task, refresh="rescore", rescore_rows=5),
        "mixed": replace(task, rollout=RolloutConfig(mode="mixed", max_new_tokens=4)),
        **{
            name: replace(task, train=STILL, distill=DistillConfig(teacher_cache="none", **keys))
            for name, keys in LOSS_CASES.items()
        },
    }
    resume = {"mid stage": folder / "whole/checkpoints/00006", "end of stage": folder / "whole/checkpoints/00004"}
    outcomes = runs.train_all([(one, folder / name, resume.get(name)) for name, one in tasks.items()])
    return dict(zip(tasks, zip(tasks.values(), outcomes, strict=True), strict=True))


def tokens_of(outcome: runs.Outcome) -> list[int]:
    return [record["num_response_tokens"] for record in outcome.metrics if "train/loss" in record]


def test_each_stage_draws_by_the_gaps_at_its_beginning_the_first_by_the_scored_ones(alone: dict[str, Any]) -> None:
    task, outcome = alone["whole"]
    lengths, expected = store(task).response_lengths, []
    for stage in task.stages:
        end = kept(outcome.checkpoints[stage.index * STAGE_STEPS])
        before = first_gaps(task) if stage.index == 0 else kept(outcome.checkpoints[stage.index * STAGE_STEPS - 1])
        gaps = before if stage.index == 0 else before["gaps"]
        drawn = draw_rows(row_weights(gaps, SHARP["power"], SHARP["floor"]), STAGE_STEPS * 8, task.seed, stage.index)
        assert np.array_equal(end["drawn"], drawn)
        expected += [int(lengths[ids].sum()) for ids in global_batches(stage, drawn, 8, task.seed)]
    assert tokens_of(outcome) == expected
    assert (kept(outcome.checkpoints[-1])["gaps"] < first_gaps(task)).mean() > 0.9, "it learns"


@pytest.mark.parametrize("name", ["mid stage", "end of stage"])
def test_a_resumed_run_ends_bit_identical(alone: dict[str, Any], name: str) -> None:
    whole, resumed = alone["whole"][1], alone[name][1]
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.weights[key], tensor) for key, tensor in whole.weights.items())
    for key, values in kept(whole.checkpoints[-1]).items():
        assert np.array_equal(kept(resumed.checkpoints[-1])[key], values)


@pytest.mark.parametrize("name", LOSS_CASES)
def test_the_gap_is_the_plain_kl_whatever_the_loss_and_its_temperature(alone: dict[str, Any], name: str) -> None:
    task, outcome = alone[name]
    assert task.stages[-1].kd_temperature_at(3) == 2.0
    visited = np.unique(np.concatenate([kept(path)["drawn"] for path in outcome.checkpoints]))
    first, last = first_gaps(task), kept(outcome.checkpoints[-1])["gaps"]
    assert len(visited) > 20 and (first > 0).all()
    np.testing.assert_allclose(last, first, atol=3e-6)
    assert (last[visited] != first[visited]).any(), "steps have measured them again, to rounding"


def test_neither_micro_batches_nor_workers_change_gaps_and_rows(
    alone: dict[str, Any], task: TrainTask, tmp_path: Path
) -> None:
    whole = alone["whole"][1]
    two = runs.train(task, tmp_path, num_workers=2)
    for other in (alone["micro"][1], two):
        assert tokens_of(other) == tokens_of(whole)
        for mine, theirs in zip(other.checkpoints, whole.checkpoints, strict=True):
            np.testing.assert_allclose(kept(mine)["gaps"], kept(theirs)["gaps"], rtol=1e-3)
            assert np.array_equal(kept(mine)["drawn"], kept(theirs)["drawn"])


def test_rescoring_measures_all_rows_or_a_sample_before_each_stage(alone: dict[str, Any]) -> None:
    task, outcome = alone["rescore"]
    first_stage = kept(outcome.checkpoints[STAGE_STEPS - 1])["gaps"]
    assert np.array_equal(first_stage, first_gaps(task)), "steps measure nothing where all rows are measured anyway"
    assert (kept(outcome.checkpoints[STAGE_STEPS])["gaps"] != first_stage).all()
    task, outcome = alone["sample"]
    whole = kept(alone["whole"][1].checkpoints[STAGE_STEPS - 1])["gaps"]
    assert np.array_equal(kept(outcome.checkpoints[STAGE_STEPS - 1])["gaps"], whole), "steps measure as well"


def test_rollouts_leave_the_gap_of_the_data_s_responses_alone(alone: dict[str, Any]) -> None:
    outcome = alone["mixed"][1]
    sources = [record["rollout/source"] for record in outcome.metrics if "train/loss" in record]
    assert {"data", "student"} <= set(sources)
    checkpoints = [kept(path)["gaps"] for path in outcome.checkpoints]
    for source, before, after in zip(sources[1:], checkpoints, checkpoints[1:], strict=False):
        assert np.array_equal(after, before) is (source == "student")


def test_each_evaluation_records_the_mean_gap_of_each_bucket(alone: dict[str, Any]) -> None:
    task, outcome = alone["whole"]
    (num_buckets,) = {len(stage.buckets) for stage in task.stages}
    records = [record for record in outcome.metrics if "train/loss" not in record]
    first, last = first_gaps(task), kept(outcome.checkpoints[-1])["gaps"]
    for gaps, record in ((first, records[0]), (last, records[-1])):
        found = [record[f"curriculum/gap_bucket_{bucket}"] for bucket in range(num_buckets)]
        size = len(gaps) // num_buckets
        assert found[0] == pytest.approx(gaps[:size].mean())  # the ranks of these rows are those of the file
        assert found[-1] == pytest.approx(gaps[size * (num_buckets - 1) :].mean())


def test_a_checkpoint_vouches_for_its_gaps(alone: dict[str, Any]) -> None:
    progress = json.loads((alone["whole"][1].checkpoints[0] / "progress.json").read_text())
    assert FRONTIER_FILE in progress["sha256"]
