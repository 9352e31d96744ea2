"""Every plain method of configs/methods trains at tiny size, and those without distillation never read the teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import yaml

from pocl_ray.config import Config, GenerationConfig, load_config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.feed import Feed
from pocl_ray.distill.task import TrainTask
from pocl_ray.distill.teachers import Teachers, TeacherSource
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.responses.rows import replace_responses
from pocl_ray.responses.writing import TeacherWriter, WritingTask
from pocl_ray.teacher_use import reads_teacher

METHODS = Path(__file__).resolve().parents[3] / "configs" / "methods"
SUPERVISED = ("sft", "seqkd")
DISTILLING = ("kd", "reverse_kl", "js", "tvd", "skew_kl", "skew_rkl", "adaptive_kl")
BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}, "max_prompt_tokens": 30, "max_tokens": 64},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "curriculum": {"num_buckets": 2, "interval_epochs": 1, "hand_off": "last"},
    "distill": {"teacher_cache": "none"},
    "train": runs.TRAIN.model_dump(mode="json"),
}


def config_of(method: str, folder: Path) -> Config:
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return load_config(path, [str(METHODS / f"{method}.yaml")])


def written_by_the_teacher(task: TrainTask) -> TrainTask:
    """The task on responses of its teacher, as the pipeline makes them."""
    assert task.teacher is not None
    tokenizer = load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    writing = WritingTask(
        run_dir=task.run_dir,
        rows=task.rows.path,
        tokenizer=task.tokenizer,
        teacher=task.teacher,
        generation=GenerationConfig(sampling_temperature=1.0, max_new_tokens=6),
        max_tokens=task.max_tokens,
        seed=0,
        parts="parts",
    )
    answers = TeacherWriter(writing).answer(np.arange(task.rows.num_rows))
    return replace(task, rows=replace_responses(task.rows, answers, tokenizer, task.run_dir, "rows", 0.5))


def task_of(method: str, base: TrainTask, folder: Path) -> TrainTask:
    config = config_of(method, folder)
    task = written_by_the_teacher(base) if config.data.responses == "teacher" else base
    stages = plan_stages(config, 16)
    teacher = base.teacher if reads_teacher(config, stages) else None
    return replace(task, distill=config.distill, stages=stages, teacher=teacher, scores=None)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Outcome]:
    """A run of each method, all in one process."""
    folder = tmp_path_factory.mktemp("methods")
    base = runs.prepare(folder)
    tasks = {method: task_of(method, base, folder) for method in (*SUPERVISED, *DISTILLING)}
    done = runs.train_all([(task, folder / method, None) for method, task in tasks.items()])
    return dict(zip(tasks, done, strict=True))


@pytest.mark.parametrize("method", DISTILLING)
def test_a_distilling_method_trains_by_its_own_divergence(outcomes: dict[str, runs.Outcome], method: str) -> None:
    records = [record for record in outcomes[method].metrics if "train/loss" in record]
    assert len(records) == 3
    assert all(math.isfinite(record["train/loss"]) and record["train/kd_loss"] > 0 for record in records)
    others = [outcomes[other].losses for other in DISTILLING if other != method]
    assert outcomes[method].losses not in others


@pytest.mark.parametrize("method", SUPERVISED)
def test_a_supervised_method_is_cross_entropy_alone(outcomes: dict[str, runs.Outcome], method: str) -> None:
    records = [record for record in outcomes[method].metrics if "train/loss" in record]
    assert len(records) == 3
    assert all(r["train/loss"] == pytest.approx(r["train/ce_loss"]) and r["train/kd_loss"] == 0.0 for r in records)
    assert not any("eval/dev/kd_loss" in record for record in outcomes[method].metrics)


def test_seqkd_trains_on_other_tokens_than_sft(outcomes: dict[str, runs.Outcome]) -> None:
    assert outcomes["sft"].losses != outcomes["seqkd"].losses


def test_a_stage_without_distillation_reads_neither_cache_nor_teacher(tmp_path: Path) -> None:
    task = runs.prepare(tmp_path)
    rows = RowStore.open(task.run_dir.local(task.rows.path))

    class Untouchable:
        def __getattr__(self, name: str) -> None:
            raise AssertionError("the teacher is read")

    untouchable: Any = Untouchable()
    supervised = runs.stage(0, 16, kd_ratio=0.0)
    for source in (TeacherSource(cache=untouchable), TeacherSource(live=untouchable)):
        feed = Feed(rows, 0, 4, 0, 1, Teachers((source,)))
        (first, *_) = feed.stage(supervised, np.arange(16), 8, seed=0, first_step=0)
        assert not any(batch.taught for batch in first.micro_batches)
        with pytest.raises(AssertionError, match="the teacher is read"):
            list(feed.stage(runs.stage(0, 16), np.arange(16), 8, seed=0, first_step=0))
