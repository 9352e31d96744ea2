"""TRL's GKDTrainer that is led through a curriculum, with the temperature and kd_ratio that it has not itself."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainings import BATCH_ROWS, NUM_ROWS, VOCAB, Recording, StopAt, arguments, byte_tokenizer, plan, tiny_model

from pocl_ray.config import CurriculumConfig
from pocl_ray.distill.losses import generalized_jsd
from pocl_ray.errors import ConfigError
from pocl_ray.integrations.curriculum import Curriculum

trl_gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed (extra trl)")
trl_utils = pytest.importorskip("trl.experimental.utils")
ours = pytest.importorskip("pocl_ray.integrations.gkd")
GKDConfig, GKDTrainer = trl_gkd.GKDConfig, trl_gkd.GKDTrainer

WORDS = ("one", "two", "three", "four", "five", "six")


class RecordingGKDTrainer(Recording, ours.CurriculumGKDTrainer):
    pass


class NumberedCollator(trl_utils.DataCollatorForChatML):
    """TRL's collator, which also hands on the number that stands in each row."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**super().__call__(examples), "row": torch.tensor([example["row"] for example in examples])}


def chats() -> Any:
    rows = []
    for number in range(NUM_ROWS):
        question, answer = WORDS[number % 6], WORDS[(number + 1) % 6]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "row": number})
    return Dataset.from_list(rows)


def a_trainer(
    folder: Path,
    curriculum: Curriculum,
    callbacks: Any = None,
    kind: type[RecordingGKDTrainer] = RecordingGKDTrainer,
    **changes: Any,
) -> RecordingGKDTrainer:
    settings = {"lmbda": 0.0, "beta": 0.3, "max_new_tokens": 4, "max_length": 64, "bf16": False, **changes}
    loss = {key: settings.pop(key) for key in ("loss", "loss_args") if key in settings}
    tokenizer = byte_tokenizer()
    return kind(
        tiny_model(1),
        tiny_model(2, width=24),
        GKDConfig(**arguments(folder, **settings)),
        data_collator=NumberedCollator(tokenizer=tokenizer, max_length=64),
        train_dataset=chats(),
        processing_class=tokenizer,
        callbacks=callbacks,
        curriculum=curriculum,
        **loss,
    )


def logged(trainer: Any, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if "loss" in record]


def test_the_trainer_sees_the_rows_of_every_stage_at_its_temperature_and_ratio(tmp_path: Path) -> None:
    curriculum = plan()
    trainer = a_trainer(tmp_path, curriculum)
    trainer.train()
    assert trainer.rows_by_step() == [rows.tolist() for rows in curriculum.batches()]
    assert trainer.settings[::2] == [(0, 1.0, 0.5)] * 2 + [(1, 2.0, 1.0)] * 6
    assert logged(trainer, "curriculum/stage") == [0] * 2 + [1] * 6
    assert logged(trainer, "curriculum/kd_temperature") == [1.0] * 2 + [2.0] * 6
    assert trainer.generation_config.temperature == trainer.args.temperature  # that of sampling stays the user's


def test_a_resumed_training_goes_on_at_the_right_row(tmp_path: Path) -> None:
    curriculum = plan()
    undisturbed = a_trainer(tmp_path / "a", curriculum)
    undisturbed.train()
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = a_trainer(tmp_path / "b", curriculum, [StopAt(5)], **saving)
    first.train()
    second = a_trainer(tmp_path / "b", curriculum, **saving)
    second.train(resume_from_checkpoint=True)
    assert first.rows_by_step() + second.rows_by_step() == undisturbed.rows_by_step()
    for mine, theirs in zip(second.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_at_ratio_one_and_temperature_one_the_loss_is_that_of_trl(tmp_path: Path) -> None:
    curriculum = plan(kd_temperature=1.0, kd_ratio=1.0, optimizer="continuous")

    class TheirLoss(RecordingGKDTrainer):
        compute_loss = GKDTrainer.compute_loss

    mine, theirs = a_trainer(tmp_path, curriculum), a_trainer(tmp_path, curriculum, kind=TheirLoss)
    mine.train()
    theirs.train()
    assert logged(mine, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_divergence_is_that_of_trl_at_every_temperature(beta: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, VOCAB), torch.randn(2, 5, VOCAB)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=1.7, reduction="sum")
    mine = generalized_jsd(student.flatten(0, 1), teacher.flatten(0, 1), 1.7, beta=beta).sum()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_it_trains_on_the_students_own_answers(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, plan(), lmbda=1.0, loss="skewed_reverse_kl", loss_args={"alpha": 0.2})
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.divergence.name == "skewed_reverse_kl"
    assert trainer.state.global_step == 8
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def drawn_by_gaps() -> Curriculum:
    config = CurriculumConfig.model_validate({"num_steps": 8, "frontier": {"num_stages": 4, "power": 4.0}})
    gaps = np.linspace(0.1, 2.0, NUM_ROWS)
    return Curriculum.from_signals({"teacher_student_kl": gaps}, config, BATCH_ROWS, pacing="frontier")


def test_rows_are_drawn_by_the_gaps_that_the_loss_sees(tmp_path: Path) -> None:
    undisturbed = a_trainer(tmp_path / "a", drawn_by_gaps())
    undisturbed.train()
    sampler = undisturbed.frontier_sampler
    sampler.gaps.settle()
    seen = {row for rows in undisturbed.rows_by_step() for row in rows}
    assert set(np.flatnonzero(sampler.gaps.values_R != drawn_by_gaps().gaps)) == seen
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = a_trainer(tmp_path / "b", drawn_by_gaps(), [StopAt(4)], **saving)
    first.train()
    second = a_trainer(tmp_path / "b", drawn_by_gaps(), **saving)
    second.train(resume_from_checkpoint=True)
    assert first.rows_by_step() + second.rows_by_step() == undisturbed.rows_by_step()


def test_answers_of_the_student_leave_the_gaps_of_the_data_alone(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path, drawn_by_gaps(), lmbda=0.999999)
    trainer.train()
    trainer.frontier_sampler.gaps.settle()
    assert np.array_equal(trainer.frontier_sampler.gaps.values_R, drawn_by_gaps().gaps)
    with pytest.raises(ConfigError, match="lmbda 1 or seq_kd"):
        a_trainer(tmp_path, drawn_by_gaps(), lmbda=1.0)


def test_the_example_trains_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(seed).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    lines = "".join(json.dumps({"messages": row["messages"]}) + "\n" for row in chats())
    (tmp_path / "rows.jsonl").write_text(lines)
    places = [str(tmp_path / name) for name in ("student", "teacher", "rows.jsonl", "out")]
    monkeypatch.setattr(sys, "argv", ["example", *places, "--epochs", "1"])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    example = Path(__file__).resolve().parents[3] / "examples" / "gkd_with_curriculum.py"
    runpy.run_path(str(example), run_name="__main__")
    assert "stage 1: 12 rows, 3 steps, T 2.0" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
