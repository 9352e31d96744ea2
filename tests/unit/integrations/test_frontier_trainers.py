"""Frontier pacing in a Hugging Face Trainer and in TRL's: rows drawn by the gaps that its own loss sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainings import BATCH_ROWS, NUM_ROWS, VOCAB, Recording, StopAt, arguments, collate_rows, tiny_model, token_rows
from transformers import Trainer, TrainingArguments
from two_processes import run_as_two

from pocl_ray.config import CurriculumConfig
from pocl_ray.curriculum.frontier import draw_rows, row_weights
from pocl_ray.data.batching import global_batches
from pocl_ray.errors import ConfigError, DataError
from pocl_ray.integrations.curriculum import Curriculum
from pocl_ray.integrations.huggingface import CurriculumMixin, CurriculumTrainer

STAGE_STEPS, NUM_STAGES = 3, 3
FIRST = np.linspace(0.05, 2.0, NUM_ROWS)
SHARP = {"num_stages": NUM_STAGES, "floor": 1e-6, "power": 8.0}


def frontier(**changes: Any) -> Curriculum:
    settings: dict[str, Any] = {"num_steps": STAGE_STEPS * NUM_STAGES, "frontier": {**SHARP, **changes}}
    config = CurriculumConfig.model_validate(settings)
    return Curriculum.from_signals({"teacher_student_kl": FIRST}, config, BATCH_ROWS, seed=7, pacing="frontier")


class Measured(Recording, CurriculumTrainer):
    """Records the gap of each row as it is seen, from the definition and in float64."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.visits: list[tuple[int, int, float]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        features = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.no_grad():
            logq, logp = (m(**features).logits[:, :-1].double().log_softmax(-1) for m in (model, self.teacher_model))
        keep = inputs["labels"][:, 1:] != -100
        kl = (logp.exp() * (logp - logq)).sum(-1)
        for number, values, mask in zip(inputs["row"].tolist(), kl, keep, strict=True):
            self.visits.append((self.state.global_step, number, float(values[mask].mean())))
        return super().training_step(model, inputs, num_items_in_batch)


def a_trainer(folder: Path, curriculum: Curriculum, callbacks: Any = None, **changes: Any) -> Measured:
    return Measured(
        tiny_model(1),
        TrainingArguments(**arguments(folder, **{"learning_rate": 3e-2, **changes})),
        data_collator=collate_rows,
        train_dataset=token_rows(),
        callbacks=callbacks,
        curriculum=curriculum,
        teacher_model=tiny_model(2, width=24, vocab=VOCAB),
    )


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_each_stage_draws_by_the_gaps_of_the_last_visits_but_those_of_the_step_before_it(tmp_path: Path) -> None:
    curriculum = frontier()
    trainer = a_trainer(tmp_path, curriculum)
    trainer.train()
    gaps, expected = FIRST.copy(), []
    for stage in curriculum.stages:
        start = stage.index * STAGE_STEPS
        for row in range(NUM_ROWS):
            seen = [(step, gap) for step, number, gap in trainer.visits if number == row and step < start - 1]
            if seen:
                last = max(step for step, _ in seen)
                gaps[row] = np.mean([gap for step, gap in seen if step == last])
        drawn = draw_rows(row_weights(gaps, SHARP["power"], SHARP["floor"]), STAGE_STEPS * BATCH_ROWS, 7, stage.index)
        expected += [ids.tolist() for ids in global_batches(stage, drawn, BATCH_ROWS, 7)]
    assert trainer.rows_by_step() == expected
    assert (gaps != FIRST).sum() > 3
    assert len(expected) == curriculum.num_steps


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    rows = []
    for size in (1, 4):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH_ROWS // size}
        trainer = a_trainer(tmp_path, frontier(), **split)
        trainer.train()
        rows.append(trainer.rows_by_step())
    assert rows[0] == rows[1]


@pytest.mark.parametrize("step", [1, STAGE_STEPS - 1, STAGE_STEPS, STAGE_STEPS + 1, 2 * STAGE_STEPS])
def test_a_resumed_training_draws_the_same_rows_and_ends_in_the_same_weights(tmp_path: Path, step: int) -> None:
    undisturbed = a_trainer(tmp_path / "a", frontier())
    undisturbed.train()
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = a_trainer(tmp_path / "b", frontier(), [StopAt(step)], **saving)
    first.train()
    second = a_trainer(tmp_path / "b", frontier(), **saving)
    second.train(resume_from_checkpoint=True)
    assert first.rows_by_step() + second.rows_by_step() == undisturbed.rows_by_step()
    assert torch.equal(weights(second), weights(undisturbed))


def test_a_checkpoint_without_gaps_is_refused(tmp_path: Path) -> None:
    a_trainer(tmp_path, frontier(), [StopAt(1)], save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1/frontier.safetensors").unlink()
    with pytest.raises(DataError, match="it is not known which rows come next"):
        a_trainer(tmp_path, frontier()).train(resume_from_checkpoint=True)


def test_a_trainer_whose_loss_reads_no_teacher_is_refused(tmp_path: Path) -> None:
    class Supervised(CurriculumMixin, Trainer):
        pass

    settings = TrainingArguments(**arguments(tmp_path))
    for kind in (Supervised, CurriculumTrainer):
        trainer = kind(tiny_model(1), settings, train_dataset=token_rows(), curriculum=frontier())
        with pytest.raises(ConfigError, match=f"the loss of {kind.__name__} reads no teacher"):
            trainer.train()


def test_rows_that_are_read_ahead_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataloader_num_workers reads rows ahead"):
        a_trainer(tmp_path, frontier(), dataloader_num_workers=1)


def _train_as_one_of_two(rank: int, folder: Path) -> None:
    trainer = a_trainer(folder, frontier(), ddp_backend="gloo", gradient_accumulation_steps=1, **PLAIN_SGD)
    trainer.train()
    torch.save(trainer.rows_by_step(), folder / f"rank{rank}.pt")


PLAIN_SGD: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.3}


@pytest.mark.slow
def test_two_processes_draw_the_same_rows_as_one(tmp_path: Path) -> None:
    run_as_two(_train_as_one_of_two, tmp_path)
    halves = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    alone = a_trainer(tmp_path, frontier(), **PLAIN_SGD)
    alone.train()
    assert [[*a, *b] for a, b in zip(*halves, strict=True)] == alone.rows_by_step()
