"""Averages of weights in real DeepSpeed processes: against the weights of every step, with ZeRO, resumed, by LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STAGES, TRAIN, Outcome, prepare, train_all
from safetensors.torch import load_file

from pocl_ray.config import LoraConfig
from pocl_ray.distill.averaging import ema_decay
from pocl_ray.distill.task import TrainTask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DECAY, LAST = 0.6, 2
FRESH = (STAGES[0], replace(STAGES[1], num_epochs=1, lr_num_steps=4))  # 4 steps each; evaluations at 2, 4 and 8
GOES_ON = (
    replace(FRESH[0], lr_num_steps=8),
    replace(FRESH[1], restart_optimizer=False, lr_first_step=4, lr_num_steps=8),
)
WITHIN, STAGE_END = 3, 4
RESUMED = [("ema", WITHIN), ("last_k", STAGE_END), ("best_zero_3", WITHIN), ("fresh_best", STAGE_END)]

Runs = dict[Any, Outcome]
Weights = dict[str, torch.Tensor]


def variants(task: TrainTask) -> dict[str, TrainTask]:
    settings = TRAIN.model_copy(update={"checkpoint_every_steps": 1, "num_checkpoints": 9, "eps": 1e-5})

    def made(average: str, stages: tuple[Any, ...] = GOES_ON, hand_off: str = "last", **train: Any) -> TrainTask:
        keys = {"average": average, "average_decay": DECAY, "average_last": LAST, **train}
        return replace(task, stages=stages, hand_off=hand_off, train=settings.model_copy(update=keys))

    return {
        "none": made("none"),
        "ema": made("ema"),
        "ema_zero_0": made("ema", zero_stage=0),
        "ema_zero_3": made("ema", zero_stage=3),
        "best_zero_3": made("ema", hand_off="best", zero_stage=3),
        "fresh": made("ema", FRESH),
        "fresh_best": made("ema", FRESH, "best"),
        "last_k": made("last_k"),
        "bf16": made("ema", precision="bf16"),
        "lora": replace(made("ema"), lora=LoraConfig(rank=2, alpha=4.0)),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every variant on one worker, some again from a checkpoint, and one on two workers."""
    pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")
    root = tmp_path_factory.mktemp("averages")
    tasks = variants(prepare(root))
    todo: dict[Any, Any] = {name: (task, root / name, None) for name, task in tasks.items()}
    for name, step in RESUMED:
        todo[name, step] = (tasks[name], root / f"{name}-{step}", root / name / "checkpoints" / f"{step:05d}")
    outcomes: Runs = dict(zip(todo, train_all(list(todo.values())), strict=True))
    outcomes["pair"] = train_all([(tasks["ema"], root / "pair", None)], num_workers=2)[0]
    return outcomes


def read(checkpoint: Path, folder: str) -> Weights:
    (file,) = (checkpoint / folder).glob("*.safetensors")
    return {k.removeprefix("weight/"): v for k, v in load_file(file).items() if k.startswith("weight/")}


def assert_close(got: Weights, expected: Weights, atol: float = 2e-6) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.float(), rtol=0.0, atol=atol, msg=name)


def plain_loop(weights: list[Weights]) -> list[Weights]:
    """The average after each of the steps, the first being the weights before training."""
    averages = [{name: tensor.double() for name, tensor in weights[0].items()}]
    for number, now in enumerate(weights[1:]):
        share = ema_decay(number, DECAY)
        averages.append({name: share * averages[-1][name] + (1 - share) * now[name].double() for name in now})
    return averages


def start(task_dir: Path) -> Weights:
    return {f"student.{k}": v for k, v in load_file(task_dir / "model.safetensors").items()}


def test_the_student_is_the_average_of_the_weights_of_every_step(runs: Runs) -> None:
    raw = [read(path, "state") for path in runs["none"].checkpoints]
    assert len(raw) == 8
    for checkpoint, weights in zip(runs["ema"].checkpoints, raw, strict=True):
        assert_close(read(checkpoint, "state"), weights, atol=0.0)  # an average does not change the steps
    init = start(next(iter(runs["none"].checkpoints)).parents[2] / "run" / "models" / "student_init")
    averages = plain_loop([{name: init[name] for name in raw[0]}, *raw])
    for checkpoint, average in zip(runs["ema"].checkpoints, averages[1:], strict=True):
        assert_close(read(checkpoint, "average/0"), average)
    assert_close(runs["ema"].weights, averages[-1])


def test_the_mean_is_that_of_the_last_evaluations(runs: Runs) -> None:
    raw = [read(runs["none"].checkpoints[step - 1], "state") for step in (4, 8)]
    assert_close(runs["last_k"].weights, {name: (raw[0][name] + raw[1][name]) / 2 for name in raw[0]})


@pytest.mark.parametrize("name", ["ema_zero_0", "ema_zero_3", "pair"])
def test_neither_zero_nor_workers_change_the_average(runs: Runs, name: str) -> None:
    assert_close(runs[name].weights, runs["ema"].weights, atol=1e-5)
    assert dev(runs[name]) == pytest.approx(dev(runs["ema"]), rel=1e-5)


@pytest.mark.parametrize(("name", "step"), RESUMED)
def test_a_resumed_run_is_bit_identical(runs: Runs, name: str, step: int) -> None:
    whole, resumed = runs[name], runs[name, step]
    assert (resumed.losses, dev(resumed)) == (whole.losses, dev(whole))
    assert all(torch.equal(resumed.weights[key], tensor) for key, tensor in whole.weights.items())


def dev(outcome: Outcome) -> list[float]:
    return [record["eval/dev/ce_loss"] for record in outcome.metrics if "eval/dev/ce_loss" in record]


def test_dev_figures_are_those_of_the_average(runs: Runs) -> None:
    none, ema = dev(runs["none"]), dev(runs["ema"])
    assert none[0] == ema[0], "before training"
    assert all(a != b for a, b in zip(none[1:], ema[1:], strict=True))
    assert runs["none"].losses == runs["ema"].losses


def test_a_fresh_stage_starts_from_the_average_and_averages_afresh(runs: Runs) -> None:
    fresh = runs["fresh"]
    handed_on = read(fresh.checkpoints[3], "average/0")
    raw = [read(path, "state") for path in fresh.checkpoints[4:]]
    assert_close(fresh.weights, plain_loop([handed_on, *raw])[-1])


def test_the_best_is_an_average_too(runs: Runs) -> None:
    for name in ("best_zero_3", "fresh_best"):
        best = read(runs[name].checkpoints[-1], "best/average/0" if name == "best_zero_3" else "best")
        assert_close(runs[name].weights, best, atol=0.0)


def test_adapters_and_low_precision_are_averaged_in_float32(runs: Runs) -> None:
    assert all("lora" in name for name in runs["lora"].weights)
    for name in ("lora", "bf16"):
        last = runs[name].checkpoints[-1]
        assert_close(runs[name].weights, read(last, "average/0"), atol=0.0)
        assert any(not torch.equal(read(last, "state")[key], value) for key, value in runs[name].weights.items())
