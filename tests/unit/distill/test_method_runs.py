"""Every method of configs/methods trains at tiny size, and those without distillation never read the teacher.

A method is its file, read as a run reads it: the stages, the responses, the loss and the rollouts are the file's.
"""

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
from pocl_ray.data.batching import Layout, global_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.feed import Feed, Teachers, TeacherSource
from pocl_ray.distill.losses import LOSSES
from pocl_ray.distill.rollout_schedule import draw_of
from pocl_ray.distill.task import TrainTask
from pocl_ray.fingerprints import reads_teacher
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.responses.replace import replace_responses
from pocl_ray.responses.writing import TeacherWriter, WritingTask

METHODS = Path(__file__).resolve().parents[3] / "configs" / "methods"
SUPERVISED = ("sft", "seqkd")
DISTILLING = ("kd", "reverse_kl", "js", "tvd", "skew_kl", "skew_rkl", "adaptive_kl")
WITHOUT_FILE = {
    "symmetric_kl": ("distill.loss=symmetric_kl",),
    "top_k_kl": ("distill.loss=top_k_kl", "distill.loss_args={k: 5}"),
}
ON_POLICY = ("gkd", "gkd_on_policy", "distillm", "distillm2")
SHORT = "rollout.max_new_tokens=8"
# The dev loss of a student that learns in strides this wide rises, and the threshold of DistiLLM's schedule with it.
WIDE_STRIDES = ("train.learning_rate=1.0", "rollout.threshold_rise=0.4", "rollout.buffer_rows=8")
LONGER = ("curriculum.interval_epochs=3",)
VARIANTS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*SUPERVISED, *DISTILLING)},
    **WITHOUT_FILE,
    **{name: (name, SHORT) for name in ON_POLICY},
    "plain": ("plain", "reverse_kl"),
    "gkd_seq_kd": ("gkd", SHORT, "data.responses=teacher", "rollout.lambda=0"),
    "distillm_worsening": ("distillm", SHORT, *WIDE_STRIDES, *LONGER),
}
BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}, "max_prompt_tokens": 30, "max_tokens": 64},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "curriculum": {"num_buckets": 2, "interval_epochs": 1, "hand_off": "last"},
    "distill": {"teacher_cache": "none"},
    "train": runs.TRAIN.model_dump(mode="json"),
}


def config_of(layers: tuple[str, ...], folder: Path) -> Config:
    """The tiny config with methods, by name, and overrides laid over it."""
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(BASE), encoding="utf-8")
    return load_config(path, [layer if "=" in layer else str(METHODS / f"{layer}.yaml") for layer in layers])


def written_by_the_teacher(task: TrainTask) -> TrainTask:
    """The task on responses of its teacher, as the pipeline makes them."""
    tokenizer = load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    writing = WritingTask(
        run_dir=task.run_dir,
        rows=task.rows.path,
        tokenizer=task.tokenizer,
        teacher=task.teachers[0].ref,
        generation=GenerationConfig(sampling_temperature=1.0, max_new_tokens=6),
        max_tokens=task.max_tokens,
        seed=0,
        parts="parts",
    )
    answers = TeacherWriter(writing).answer(np.arange(task.rows.num_rows))
    return replace(task, rows=replace_responses(task.rows, answers, tokenizer, task.run_dir, "rows", 0.5))


def task_of(layers: tuple[str, ...], base: TrainTask, by_teacher: TrainTask, folder: Path) -> TrainTask:
    config = config_of(layers, folder)
    task = by_teacher if config.data.responses == "teacher" else base
    stages = plan_stages(config, 16)
    return replace(
        task,
        stages=stages,
        teachers=base.teachers if reads_teacher(config, stages) else (),
        scores=None,
        distill=config.distill,
        rollout=config.rollout,
        train=config.train,
        hand_off=config.curriculum.hand_off,
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainTask]:
    folder = tmp_path_factory.mktemp("methods")
    base = runs.prepare(folder)
    by_teacher = written_by_the_teacher(base)
    return {name: task_of(layers, base, by_teacher, folder) for name, layers in VARIANTS.items()}


@pytest.fixture(scope="module")
def outcomes(tasks: dict[str, TrainTask], tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Outcome]:
    """A run of each method, all in one process."""
    folder = tmp_path_factory.mktemp("outcomes")
    done = runs.train_all([(task, folder / name, None) for name, task in tasks.items()])
    return dict(zip(tasks, done, strict=True))


def steps_of(outcome: runs.Outcome) -> list[dict[str, Any]]:
    return [record for record in outcome.metrics if "train/loss" in record]


def test_every_file_of_methods_is_run_here_or_where_it_belongs() -> None:
    named = {layer for layers in VARIANTS.values() for layer in layers if "=" not in layer}
    elsewhere = {"minillm_evaluation", "uld"}  # evaluation/test_protocol.py, test_uld_runs.py
    assert named | elsewhere == {path.stem for path in METHODS.glob("*.yaml")}


def test_every_loss_is_trained_with(tasks: dict[str, TrainTask]) -> None:
    assert {loss for task in tasks.values() for loss in (task.distill.loss, task.rollout.loss)} >= set(LOSSES) - {"uld"}


@pytest.mark.parametrize("method", [*DISTILLING, *WITHOUT_FILE])
def test_a_distilling_method_trains_by_its_own_divergence(outcomes: dict[str, runs.Outcome], method: str) -> None:
    records = steps_of(outcomes[method])
    assert len(records) == 3
    assert all(math.isfinite(record["train/loss"]) and record["train/kd_loss"] > 0 for record in records)
    others = [outcomes[other].losses for other in (*DISTILLING, *WITHOUT_FILE) if other != method]
    assert outcomes[method].losses not in others


@pytest.mark.parametrize("method", SUPERVISED)
def test_a_supervised_method_is_cross_entropy_alone(outcomes: dict[str, runs.Outcome], method: str) -> None:
    records = steps_of(outcomes[method])
    assert len(records) == 3
    assert all(r["train/loss"] == pytest.approx(r["train/ce_loss"]) and r["train/kd_loss"] == 0.0 for r in records)
    assert not any("eval/dev/kd_loss" in record for record in outcomes[method].metrics)


def test_seqkd_trains_on_other_tokens_than_sft(outcomes: dict[str, runs.Outcome]) -> None:
    assert outcomes["sft"].losses != outcomes["seqkd"].losses


@pytest.mark.parametrize("method", ON_POLICY)
def test_an_on_policy_method_trains_by_divergence_alone_on_what_its_rule_says(
    outcomes: dict[str, runs.Outcome], tasks: dict[str, TrainTask], method: str
) -> None:
    records = steps_of(outcomes[method])
    assert len(records) == 3
    assert all(r["curriculum/kd_ratio"] == 1.0 and r["train/loss"] == r["train/kd_loss"] > 0 for r in records)
    draws = [draw_of(tasks[method].seed, step) for step in range(3)]
    # DistiLLM begins on the rows: its threshold is 0 until the dev loss rises.
    share = {"gkd": 0.5, "gkd_on_policy": 1.0, "distillm": 0.0, "distillm2": 1.0}[method]
    assert [r["rollout/source"] for r in records] == ["student" if u < share else "data" for u in draws]


def test_distillm_2_trains_on_responses_of_teacher_and_student_in_one_step(
    outcomes: dict[str, runs.Outcome], tasks: dict[str, TrainTask]
) -> None:
    (first, *_), task = steps_of(outcomes["distillm2"]), tasks["distillm2"]
    lengths = RowStore.open(task.run_dir.local(task.rows.path)).response_lengths
    by_the_teacher = int(lengths[next(global_batches(task.stages[0], np.arange(8), 8, task.seed))].sum())
    assert by_the_teacher + 8 <= first["num_response_tokens"] <= by_the_teacher + 8 * 8
    assert (task.distill.loss, task.rollout.loss) == ("skewed_forward_kl", "skewed_reverse_kl")


def test_gkd_with_seq_kd_trains_on_responses_of_the_teacher_where_the_student_does_not_write(
    outcomes: dict[str, runs.Outcome], tasks: dict[str, TrainTask]
) -> None:
    records = steps_of(outcomes["gkd_seq_kd"])
    assert {r["rollout/source"] for r in records} == {"data"}
    assert tasks["gkd_seq_kd"].rows == tasks["seqkd"].rows != tasks["kd"].rows


def test_the_threshold_of_distillm_moves_from_nothing_as_the_dev_loss_rises(outcomes: dict[str, runs.Outcome]) -> None:
    phi, reference, sources = 0.0, None, set()
    for record in outcomes["distillm_worsening"].metrics:
        if "eval/dev/ce_loss" in record:
            dev_ce = record["eval/dev/ce_loss"]
            if reference is None:
                reference = dev_ce
            elif dev_ce >= reference + 0.1:
                phi, reference = min(1.0, phi + 0.4), dev_ce
        else:
            assert record["rollout/phi"] == pytest.approx(phi)
            sources.add(record["rollout/source"])
    assert phi >= 0.8, "it has risen twice at least"
    assert sources == {"data", "student", "buffer"}


def test_without_the_curriculum_all_rows_are_trained_on_from_the_first_step(
    outcomes: dict[str, runs.Outcome], tasks: dict[str, TrainTask]
) -> None:
    (stage,) = tasks["plain"].stages
    assert (stage.first_rank, stage.end_rank, tasks["plain"].distill.loss) == (0, 16, "reverse_kl")
    records = steps_of(outcomes["plain"])
    assert [(r["curriculum/stage"], r["curriculum/kd_temperature"]) for r in records] == [(0, 1.0)] * 3
    assert all(r["train/loss"] == r["train/kd_loss"] > 0 for r in records)


def test_a_stage_without_distillation_reads_neither_cache_nor_teacher(tmp_path: Path) -> None:
    task = runs.prepare(tmp_path)
    rows = RowStore.open(task.run_dir.local(task.rows.path))

    class Untouchable:
        def __getattr__(self, name: str) -> None:
            raise AssertionError("the teacher is read")

    untouchable: Any = Untouchable()
    supervised = runs.stage(0, 16, kd_ratio=0.0)
    for source in (TeacherSource(cache=untouchable), TeacherSource(live=untouchable)):
        feed = Feed(rows, Layout(0, 4), 0, 1, Teachers((source,)))
        (first, *_) = feed.stage(supervised, np.arange(16), 8, seed=0, first_step=0)
        assert not any(batch.teacher_outputs for batch in first.micro_batches)
        with pytest.raises(AssertionError, match="the teacher is read"):
            list(feed.stage(runs.stage(0, 16), np.arange(16), 8, seed=0, first_step=0))
