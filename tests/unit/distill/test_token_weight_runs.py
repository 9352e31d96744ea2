"""Weights of tokens in real DeepSpeed processes: their mean is taken over the step, so nothing depends on its cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STAGES, TRAIN, Outcome, prepare, train_all

from pocl_ray.config import DistillConfig
from pocl_ray.distill.task import TrainTask
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.saving import save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Runs = dict[Any, Outcome]


def variants(task: TrainTask) -> dict[str, TrainTask]:
    """The tasks by name; `plain` is what the others are compared with."""
    settings = TRAIN.model_copy(update={"checkpoint_every_steps": 3, "eps": 1e-5})
    weighted = DistillConfig(teacher_cache="none", token_weight="teacher_entropy", token_weight_strength=0.8)
    plain = replace(task, stages=(replace(STAGES[0], kd_ratio=0.7),), train=settings, distill=weighted)
    by_student = DistillConfig(teacher_cache="none", token_weight="tip", token_weight_strength=0.8)
    even = DistillConfig(teacher_cache="none")
    return {
        "plain": plain,
        "micro_2": replace(plain, train=settings.model_copy(update={"micro_batch_rows": 2})),
        "zero_3": replace(plain, train=settings.model_copy(update={"zero_stage": 3})),
        "even": replace(plain, distill=even),
        "student": replace(plain, distill=by_student),
        "student_micro_2": replace(
            plain, distill=by_student, train=settings.model_copy(update={"micro_batch_rows": 2, "zero_stage": 3})
        ),
    }


def sharpen(task: TrainTask) -> None:
    """Spread the logits of the fresh models: entropies that differ by rounding alone would tell no tokens apart."""
    tokenizer = load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    for ref, folder, factor in ((task.teachers[0].ref, "teacher", 30.0), (task.student, "student_init", 10.0)):
        model = load_model(ref)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        save_model(model, tokenizer, Path(task.run_dir.uri) / "models" / folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every variant on one worker, one again from a checkpoint, and one on two workers."""
    root = tmp_path_factory.mktemp("weights")
    task = prepare(root)
    sharpen(task)
    tasks = variants(task)
    todo: dict[Any, Any] = {name: (task, root / "alone" / name, None) for name, task in tasks.items()}
    for name in ("plain", "student"):
        start = root / "alone" / name / "checkpoints" / "00003"
        todo[f"{name}_resumed"] = (tasks[name], root / f"{name}_resumed", start)
    outcomes: Runs = dict(zip(todo, train_all(list(todo.values())), strict=True))
    pairs = ("plain", "student")
    found = train_all([(tasks[name], root / f"{name}_pair", None) for name in pairs], num_workers=2)
    return outcomes | {f"{name}_pair": outcome for name, outcome in zip(pairs, found, strict=True)}


@pytest.mark.parametrize("name", ["micro_2", "zero_3", "plain_pair", "student_micro_2", "student_pair"])
def test_neither_micro_batches_nor_zero_nor_workers_change_the_result(runs: Runs, name: str) -> None:
    got, expected = runs[name], runs["student" if name.startswith("student") else "plain"]
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert got.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    for key, tensor in expected.weights.items():
        torch.testing.assert_close(got.weights[key], tensor, rtol=0.0, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["plain", "student"])
def test_a_resumed_run_is_bit_identical(runs: Runs, name: str) -> None:
    resumed, whole = runs[f"{name}_resumed"], runs[name]
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.weights[key], tensor) for key, tensor in whole.weights.items())


@pytest.mark.parametrize("name", ["plain", "student"])
def test_weights_change_the_distillation_loss_alone(runs: Runs, name: str) -> None:
    weighted, even = (next(m for m in runs[one].metrics if "train/loss" in m) for one in (name, "even"))
    assert weighted["train/ce_loss"] == pytest.approx(even["train/ce_loss"], rel=1e-6)
    assert weighted["train/kd_loss"] != pytest.approx(even["train/kd_loss"], rel=1e-2)
    expected = 0.3 * weighted["train/ce_loss"] + 0.7 * weighted["train/kd_loss"]
    assert weighted["train/loss"] == pytest.approx(expected, rel=1e-6)
    first = [next(m for m in runs[one].metrics if "eval/dev/kd_loss" in m) for one in (name, "even")]
    assert first[0]["eval/dev/kd_loss"] == first[1]["eval/dev/kd_loss"], "dev losses are even, to be compared"
