"""A Hugging Face Trainer that is led through a curriculum: rows, settings, learning rate, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import BATCH_ROWS, VOCAB, Recording, StopAt, arguments, collate_rows, plan, tiny_model, token_rows
from transformers import Trainer, TrainingArguments
from two_processes import run_as_two

from pocl_ray.errors import ConfigError, DataError
from pocl_ray.integrations.curriculum import Curriculum
from pocl_ray.integrations.huggingface import CurriculumMixin, CurriculumTrainer


class RecordingTrainer(Recording, CurriculumTrainer):
    pass


def a_trainer(
    folder: Path,
    curriculum: Curriculum,
    callbacks: Any = None,
    teacher_vocab: int = VOCAB,
    loss: dict[str, Any] | None = None,
    **changes: Any,
) -> RecordingTrainer:
    return RecordingTrainer(
        tiny_model(1),
        TrainingArguments(**arguments(folder, **changes)),
        data_collator=collate_rows,
        train_dataset=token_rows(),
        eval_dataset=token_rows(),
        callbacks=callbacks,
        curriculum=curriculum,
        teacher_model=tiny_model(2, width=24, vocab=teacher_vocab),
        **(loss or {}),
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Trainer, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if "loss" in record]


def test_the_trainer_sees_the_rows_of_the_plan_at_its_settings(tmp_path: Path) -> None:
    curriculum = plan()
    trainer = a_trainer(tmp_path, curriculum)
    trainer.train()
    assert trainer.rows_by_step() == [rows.tolist() for rows in curriculum.batches()]
    assert trainer.settings[::2] == [(0, 1.0, 0.5)] * 2 + [(1, 2.0, 1.0)] * 6
    assert logged(trainer, "curriculum/stage") == [0] * 2 + [1] * 6
    assert logged(trainer, "curriculum/kd_temperature") == [1.0] * 2 + [2.0] * 6
    assert logged(trainer, "curriculum/kd_ratio") == [0.5] * 2 + [1.0] * 6
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[2]


def float64_loss(trainer: RecordingTrainer, rows: list[int], temperature: float, ratio: float) -> float:
    """(1 - r) ce + r T^2 KL(p || q), a mean over the response tokens of one step."""
    batch = collate_rows([token_rows()[row] for row in rows])
    features = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        student, teacher = (
            model(**features).logits[:, :-1].double() for model in (trainer.model, trainer.teacher_model)
        )
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    ce = -student.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logp, logq = ((x[..., :VOCAB] / temperature).log_softmax(-1) for x in (teacher, student))
    kd = temperature**2 * (logp.exp() * (logp - logq)).sum(-1)
    return float(((1 - ratio) * ce + ratio * kd)[keep].mean())


def test_the_loss_of_a_step_is_the_formula_whatever_the_micro_batches(tmp_path: Path) -> None:
    curriculum = plan(kd_temperature=1.5, kd_ratio=0.3)
    trainer = a_trainer(tmp_path, curriculum, teacher_vocab=VOCAB + 6)
    expected = float64_loss(trainer, next(curriculum.batches()).tolist(), 1.5, 0.3)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)
    whole = a_trainer(
        tmp_path, curriculum, None, VOCAB + 6, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    whole.train()
    np.testing.assert_allclose(logged(whole, "loss"), logged(trainer, "loss"), rtol=1e-4)


def test_evaluation_is_the_divergence_at_temperature_one(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, plan(), per_device_eval_batch_size=12)
    expected = float64_loss(trainer, list(range(12)), 1.0, 1.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_parameter_of_the_loss_moves_with_the_curriculum_and_evaluation_takes_its_last_value(tmp_path: Path) -> None:
    def trained(loss_args: dict[str, Any]) -> RecordingTrainer:
        return a_trainer(tmp_path, plan(), loss={"loss": "generalized_jsd", "loss_args": loss_args})

    moving, fixed = trained({"beta": {"start": 0, "end": 0.5, "by": "step"}}), trained({"beta": 0.5})
    assert moving.evaluate()["eval_loss"] == fixed.evaluate()["eval_loss"]
    moving.train()
    assert logged(moving, "distill/loss_args/beta") == pytest.approx([0.5 * k / 7 for k in range(8)])
    with pytest.raises(ConfigError, match=r"^loss_args\.beta: a linear schedule takes start and end$"):
        trained({"beta": {"start": 0}})


def test_a_resumed_training_goes_on_at_the_right_row_and_ends_in_the_same_weights(tmp_path: Path) -> None:
    curriculum = plan()
    undisturbed = a_trainer(tmp_path / "a", curriculum)
    undisturbed.train()
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = a_trainer(tmp_path / "b", curriculum, [StopAt(3)], **saving)
    first.train()
    second = a_trainer(tmp_path / "b", curriculum, **saving)
    second.train(resume_from_checkpoint=True)
    assert first.rows_by_step() + second.rows_by_step() == undisturbed.rows_by_step()
    assert second.settings[0] == (1, 2.0, 1.0)
    assert torch.equal(weights(second), weights(undisturbed))


def test_a_resume_at_a_stage_border_restarts_the_optimizer_as_well(tmp_path: Path) -> None:
    curriculum = plan()
    undisturbed = a_trainer(tmp_path / "a", curriculum)
    undisturbed.train()
    saving = {"save_strategy": "steps", "save_steps": 1}
    a_trainer(tmp_path / "b", curriculum, [StopAt(2)], **saving).train()
    second = a_trainer(tmp_path / "b", curriculum, **saving)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(second), weights(undisturbed))


def test_each_stage_restarts_learning_rate_and_moments(tmp_path: Path) -> None:
    restarted = a_trainer(tmp_path, plan())
    restarted.train()
    falling = [1e-2 * (1 - step / 2) for step in range(2)] + [1e-2 * (1 - step / 6) for step in range(6)]
    np.testing.assert_allclose(logged(restarted, "learning_rate"), falling, rtol=1e-6)
    adam_steps = {int(state["step"]) for state in restarted.optimizer.state.values()}
    assert adam_steps == {6}


def test_a_continuous_optimizer_has_one_schedule_over_all_stages(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, plan(optimizer="continuous"))
    trainer.train()
    np.testing.assert_allclose(logged(trainer, "learning_rate"), [1e-2 * (1 - s / 8) for s in range(8)], rtol=1e-6)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {8}


def test_without_a_teacher_the_order_alone_is_brought(tmp_path: Path) -> None:
    class Supervised(CurriculumMixin, Trainer):
        pass

    rows = [{"input_ids": row["input_ids"], "labels": row["labels"], "row": row["row"]} for row in token_rows()]
    settings = TrainingArguments(**arguments(tmp_path))
    trainer = Supervised(
        tiny_model(1),
        settings,
        train_dataset=rows,
        data_collator=lambda b: {k: v for k, v in collate_rows(b).items() if k != "row"},
        curriculum=plan(),
    )
    trainer.train()
    assert logged(trainer, "curriculum/stage") == [0] * 2 + [1] * 6
    assert "curriculum/kd_temperature" not in trainer.state.log_history[0]


def test_a_checkpoint_of_another_curriculum_is_refused(tmp_path: Path) -> None:
    a_trainer(tmp_path, plan(), [StopAt(1)], save_strategy="steps", save_steps=1).train()
    other = a_trainer(tmp_path, plan(kd_ratio=1.0))
    with pytest.raises(ConfigError, match="trained with another curriculum"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 9}, "max_steps 9 is beyond the curriculum's 8 steps"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_arguments_that_change_the_plan_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        a_trainer(tmp_path, plan(), **changes)


def test_a_batch_of_another_size_is_refused_before_training(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, plan(), per_device_train_batch_size=1)
    with pytest.raises(ConfigError, match=f"takes 2 rows .* planned with {BATCH_ROWS}"):
        trainer.train()


def test_a_trainer_with_a_sampling_of_its_own_is_refused(tmp_path: Path) -> None:
    class Repeating(Trainer):
        def get_train_dataloader(self) -> Any:
            return [None] * 3

    class Mixed(CurriculumMixin, Repeating):
        pass

    trainer = Mixed(
        tiny_model(1), TrainingArguments(**arguments(tmp_path)), train_dataset=token_rows(), curriculum=plan()
    )
    with pytest.raises(ConfigError, match="Mixed cuts the rows of the curriculum into 3 batches"):
        trainer.train()


def test_a_streamed_data_set_is_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(token_rows())

    trainer = CurriculumTrainer(
        tiny_model(1),
        TrainingArguments(**arguments(tmp_path, max_steps=8)),
        train_dataset=Stream(),
        curriculum=plan(),
    )
    with pytest.raises(DataError, match="a streamed one has not"):
        trainer.train()


def test_a_schedule_that_cannot_be_restarted_is_refused(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, plan(), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=8)
    with pytest.raises(ConfigError, match="cannot be restarted by stage"):
        trainer.train()


def test_schedules_are_finite_for_every_step(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, plan(), lr_scheduler_type="cosine", warmup_steps=0.5)
    trainer.train()
    assert all(math.isfinite(rate) and rate >= 0 for rate in logged(trainer, "learning_rate"))


def _train_as_one_of_two(rank: int, folder: Path) -> None:
    trainer = a_trainer(folder, plan(), ddp_backend="gloo", gradient_accumulation_steps=1, **PLAIN_SGD)
    trainer.train()
    torch.save({"weights": weights(trainer), "seen": trainer.rows_by_step()}, folder / f"rank{rank}.pt")


PLAIN_SGD: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.3}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_as_two(_train_as_one_of_two, tmp_path)
    halves = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = a_trainer(tmp_path, plan(), **PLAIN_SGD)
    alone.train()
    together = [[*a, *b] for a, b in zip(*(half["seen"] for half in halves), strict=True)]
    assert together == alone.rows_by_step()
    for half in halves:  # plain gradient steps, so that a gradient of half the size would show
        torch.testing.assert_close(half["weights"], weights(alone), rtol=1e-4, atol=1e-6)
