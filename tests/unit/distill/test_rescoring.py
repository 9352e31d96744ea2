"""Scoring again between stages: the figures of the first scoring, whoever measures them, and resumed to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import torch

from pocl_ray.config import DifficultyConfig
from pocl_ray.config.sources import ScoringGenerationConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.actors import ScoringTask, StudentActor, TeacherActor
from pocl_ray.difficulty.ranking import rank_rows
from pocl_ray.difficulty.tasks import plan_tasks, unit_table
from pocl_ray.distill.task import Rescoring, TrainTask

SIGNALS = {"rouge_l": 1.0, "ce_loss": 0.5, "teacher_student_kl": 1.0, "student_confidence": 1.0, "teacher_ce_loss": 1.0}
DIFFICULTY = DifficultyConfig(
    signals=SIGNALS,
    rescore="each_stage",
    generation=ScoringGenerationConfig(max_new_tokens=6),
    batch_tokens=128,
    shard_rows=4,
)
STILL = runs.TRAIN.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})  # nothing is learnt
EACH_STEP = runs.TRAIN.model_copy(update={"checkpoint_every_steps": 1})
# Three stages of which the second and the third take a part of the rows, by a ranking of their own.
STAGES = (
    runs.stage(0, 8),
    runs.stage(1, 16, rescore=True),
    runs.stage(2, 24, rescore=True, kd_ratio=1.0),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainTask:
    """A task whose rows are scored by the untuned student, as the pipeline does it."""
    made = runs.prepare(tmp_path_factory.mktemp("rescoring"))
    table = first_scores(made)
    signals = {name: table[name].to_numpy() for name in SIGNALS}
    _, rank = rank_rows(signals, weights=SIGNALS)
    pq.write_table(table.append_column("rank", pa.array(rank)), f"{made.run_dir.uri}/scores.parquet")
    rescoring = Rescoring(DIFFICULTY, seed=5, folder="scores/stages")
    return replace(made, stages=STAGES, rescoring=rescoring)


def first_scores(task: TrainTask) -> pa.Table:
    scoring = ScoringTask(
        run_dir=task.run_dir,
        rows={"train": task.rows.path},
        student_set="train",
        tokenizer="tokenizer",
        student=task.student,
        teacher=task.teachers[0].ref,
        generation=DIFFICULTY.generation,
        max_tokens=task.max_tokens,
        seed=5,
        compare=True,
        cache=None,
        cache_dtype="auto",
        use_gpu=False,
    )
    store = RowStore.open(task.run_dir.local(task.rows.path))
    plan = plan_tasks(store.prompt_lengths, store.response_lengths, DIFFICULTY.shard_rows, DIFFICULTY.batch_tokens)
    student, teacher = StudentActor(scoring), TeacherActor(scoring)
    parts = []
    for batches in plan:
        units = pa.concat_tables(student(unit_table("train", batches)))
        parts += list(teacher(units))
    return pa.concat_tables(parts).sort_by("id")


def in_folder(task: TrainTask, name: str, **changes: Any) -> TrainTask:
    """The task with tables in a folder of their own."""
    assert task.rescoring is not None
    return replace(task, rescoring=replace(task.rescoring, folder=f"{name}/stages"), **changes)


def tables_of(task: TrainTask) -> dict[int, pa.Table]:
    assert task.rescoring is not None
    folder = Path(task.run_dir.uri) / task.rescoring.folder
    return {int(path.stem.removeprefix("stage-")): pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def alone(task: TrainTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainTask, runs.Outcome]]:
    """Runs of one worker, in one process, which saves its start: each with its task and its outcome."""
    task.run_dir.write_text("fresh/stages/stage-9.parquet", "old")
    tasks = {
        "still": in_folder(task, "still", train=STILL),
        "learning": in_folder(task, "learning"),
        "never": replace(task, stages=tuple(replace(stage, rescore=False) for stage in STAGES), rescoring=None),
        "whole": in_folder(task, "whole", train=EACH_STEP, hand_off="best"),
        "fresh": in_folder(task, "fresh", stages=STAGES[:2]),
    }
    folder = tmp_path_factory.mktemp("alone")
    outcomes = runs.train_all([(one, folder / name, None) for name, one in tasks.items()])
    return dict(zip(tasks, zip(tasks.values(), outcomes, strict=True), strict=True))


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "step_s"} for record in records]


def check_equal_to_first(task: TrainTask, made: dict[int, pa.Table]) -> None:
    first = pq.read_table(task.run_dir.local("scores.parquet"))
    assert sorted(made) == [1, 2]
    for table in made.values():
        for name in SIGNALS:
            np.testing.assert_allclose(table[name].to_numpy(), first[name].to_numpy(), rtol=1e-6, err_msg=name)
        assert table["previous_rank"].equals(first["rank"])
        assert table["rank"].equals(first["rank"])


def test_a_student_that_has_not_learnt_gets_the_figures_and_the_rank_of_the_first_scoring(
    task: TrainTask, alone: dict[str, Any]
) -> None:
    check_equal_to_first(task, tables_of(alone["still"][0]))


def test_the_ranking_follows_the_student_and_the_teachers_part_is_kept(task: TrainTask, alone: dict[str, Any]) -> None:
    first, made = pq.read_table(task.run_dir.local("scores.parquet")), tables_of(alone["learning"][0])
    assert sorted(made) == [1, 2]
    assert made[1]["previous_rank"].equals(first["rank"])
    assert made[2]["previous_rank"].equals(made[1]["rank"])
    assert not made[1]["rank"].equals(first["rank"])
    for table in made.values():
        assert sorted(table["rank"].to_pylist()) == list(range(1, runs.NUM_ROWS + 1))
        assert table["teacher_ce_loss"].equals(first["teacher_ce_loss"])
        assert not table["ce_loss"].equals(first["ce_loss"])
        signals = {name: table[name].to_numpy() for name in SIGNALS}
        assert rank_rows(signals, weights=SIGNALS)[1].tolist() == table["rank"].to_pylist()


def test_the_next_stage_trains_on_other_rows_than_without_it(alone: dict[str, Any]) -> None:
    learning, never = alone["learning"][1].losses, alone["never"][1].losses
    assert learning[:2] == never[:2], "the first stage is the same"
    assert learning[2:] != never[2:]


def test_a_run_resumed_within_or_between_stages_is_the_same_to_the_bit(
    task: TrainTask, alone: dict[str, Any], tmp_path: Path
) -> None:
    whole_task, whole = alone["whole"]
    at = {path.name: path for path in whole.checkpoints}
    steps = ["00001", "00002", "00003", "00007"]  # within and at the end of stage 0, within stage 1 and stage 2
    tasks = [in_folder(task, f"resumed-{step}", train=EACH_STEP, hand_off="best") for step in steps]
    jobs = [(one, tmp_path / step, at[step]) for one, step in zip(tasks, steps, strict=True)]
    for one, resumed in zip(tasks, runs.train_all(jobs), strict=True):
        assert without_times(resumed.metrics) == without_times(whole.metrics)
        assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())
        again = tables_of(one)
        assert all(tables_of(whole_task)[index].equals(table) for index, table in again.items())


def test_neither_workers_nor_zero_stage_change_the_figures(task: TrainTask, tmp_path: Path) -> None:
    # Rounding differs with the number of workers once something is learnt; the figures must not, so nothing is.
    tasks = [
        in_folder(task, f"zero-{zero_stage}", train=STILL.model_copy(update={"zero_stage": zero_stage}))
        for zero_stage in range(4)
    ]
    runs.train_all([(one, tmp_path / str(number), None) for number, one in enumerate(tasks)], num_workers=2)
    for one in tasks:
        check_equal_to_first(task, tables_of(one))


def test_a_fresh_run_leaves_no_table_of_an_earlier_one(alone: dict[str, Any]) -> None:
    assert sorted(tables_of(alone["fresh"][0])) == [1]
