"""Training of adapters in real DeepSpeed processes: what must not change the result, and what a checkpoint holds.

As in `test_loop.py`, all runs of a group share one set of processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STAGES, TRAIN, Outcome, prepare, train_all
from safetensors.torch import load_file

from pocl_ray.config import LoraConfig
from pocl_ray.distill.task import TrainTask
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model

pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO_STAGES = (STAGES[0], replace(STAGES[1], num_epochs=1, lr_num_steps=4))
GOES_ON = (
    replace(TWO_STAGES[0], lr_num_steps=8),
    replace(TWO_STAGES[1], restart_optimizer=False, lr_first_step=4, lr_num_steps=8),
)
WITHIN_EPOCH, STAGE_END = 3, 4
RESUMED = [("plain", WITHIN_EPOCH), ("dropout", WITHIN_EPOCH), ("zero_3_best", STAGE_END), ("bf16", WITHIN_EPOCH)]
RESUMED += [("experts", WITHIN_EPOCH)]
EXPERTS = LoraConfig(
    rank=2, alpha=4.0, target_modules=("q_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj")
)
PAIRS = ["plain", "zero_3"]

Runs = dict[Any, Outcome]


def variants(task: TrainTask) -> dict[str, TrainTask]:
    """The tasks by name; `plain` is what the others are compared with."""
    settings = TRAIN.model_copy(update={"checkpoint_every_steps": 3, "eps": 1e-5})
    plain = replace(task, stages=TWO_STAGES, train=settings, lora=LoraConfig(rank=2, alpha=4.0))

    def made(stages: tuple[Any, ...] = TWO_STAGES, hand_off: str = "last", **train: Any) -> TrainTask:
        return replace(plain, stages=stages, hand_off=hand_off, train=settings.model_copy(update=train))

    return {
        "plain": plain,
        "padded": made(packing="off"),
        "zero_0": made(zero_stage=0),
        "zero_2": made(zero_stage=2),
        "zero_3": made(zero_stage=3),
        "zero_3_best": made(GOES_ON, "best", zero_stage=3),
        "micro_2": made(micro_batch_rows=2),
        "recomputed": replace(plain, gradient_checkpointing=True),
        "recomputed_zero_3": replace(made(zero_stage=3), gradient_checkpointing=True),
        "dropout": replace(plain, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.2)),
        "targets": replace(plain, lora=LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))),
        "bf16": made(precision="bf16"),
        "whole": replace(plain, lora=None),
        "experts": replace(plain, student=mixtral(task), lora=EXPERTS),
        "experts_zero_3": replace(made(zero_stage=3), student=mixtral(task), lora=EXPERTS),
    }


def mixtral(task: TrainTask) -> ModelRef:
    """A student with fused experts, for the same tokenizer."""
    place = Path(task.run_dir.uri) / "models" / "mixtral"
    if not place.exists():
        tokenizer = load_tokenizer(str(task.run_dir.local(task.tokenizer)))
        model = build_model(
            {
                "model_type": "mixtral",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_local_experts": 3,
                "num_experts_per_tok": 2,
            },
            len(tokenizer),
            tokenizer.eos_token_id,
            None,
            3,
        )
        save_model(model, tokenizer, place)
    return ModelRef(str(place))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def tasks(root: Path) -> dict[str, TrainTask]:
    return variants(prepare(root))


@pytest.fixture(scope="module")
def alone(tasks: dict[str, TrainTask], root: Path) -> Runs:
    """Every variant on one worker, and some again from a checkpoint."""
    todo: dict[Any, Any] = {name: (task, root / "alone" / name, None) for name, task in tasks.items()}
    for name, step in RESUMED:
        at = root / "alone" / name / "checkpoints" / f"{step:05d}"  # written by then
        todo[name, step] = (tasks[name], root / "resumed" / f"{name}_{step}", at)
    return dict(zip(todo, train_all(list(todo.values())), strict=True))


@pytest.fixture(scope="module")
def pairs(tasks: dict[str, TrainTask], alone: Runs, root: Path) -> Runs:
    """Some on two workers, and one of these from a checkpoint of one worker under another ZeRO stage."""
    todo: dict[Any, Any] = {name: (tasks[name], root / "pairs" / name, None) for name in PAIRS}
    checkpoint = next(path for path in alone["zero_0"].checkpoints if path.name == f"{WITHIN_EPOCH:05d}")
    todo["moved"] = (tasks["zero_3"], root / "pairs" / "moved", checkpoint)
    return dict(zip(todo, train_all(list(todo.values()), num_workers=2), strict=True))


def assert_close(got: Outcome, expected: Outcome) -> None:
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert got.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert set(got.weights) == set(expected.weights)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(got.weights[name], tensor, rtol=0.0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["padded", "zero_0", "zero_2", "zero_3", "micro_2", "recomputed", "recomputed_zero_3"])
def test_neither_zero_stage_nor_micro_batches_nor_padding_nor_recomputation_change_the_result(
    alone: Runs, name: str
) -> None:
    assert_close(alone[name], alone["plain"])


@pytest.mark.parametrize("name", [*PAIRS, "moved"])
def test_nor_does_the_number_of_workers(alone: Runs, pairs: Runs, name: str) -> None:
    assert_close(pairs[name], alone["plain"])


@pytest.mark.parametrize(("name", "step"), RESUMED)
def test_a_resumed_run_is_bit_identical(alone: Runs, name: str, step: int) -> None:
    got, expected = alone[name, step], alone[name]
    assert got.losses == expected.losses and got.grad_norms == expected.grad_norms
    assert all(torch.equal(got.weights[key], tensor) for key, tensor in expected.weights.items())


def test_fused_experts_have_adapters_in_the_checkpoint_and_learn_alike_under_zero_3(alone: Runs) -> None:
    stored = set(load_file(alone["experts"].checkpoints[-1] / "state" / "00000.safetensors"))
    assert sum("experts" in name for name in stored) == 3 * 2 * 2 * 2, "of A and B, both weights and layers"
    assert_close(alone["experts_zero_3"], alone["experts"])


def test_the_first_step_is_that_of_the_whole_student_as_adapters_start_at_nothing(alone: Runs) -> None:
    assert alone["plain"].losses[0] == pytest.approx(alone["whole"].losses[0], rel=1e-6)
    assert alone["plain"].losses[-1] < 0.9 * alone["plain"].losses[0], "adapters learn"
    assert alone["plain"].losses[-1] != pytest.approx(alone["dropout"].losses[-1], rel=1e-4)
    assert alone["bf16"].losses[0] == pytest.approx(alone["plain"].losses[0], rel=2e-2)


def test_a_checkpoint_holds_the_adapters_alone(alone: Runs, tasks: dict[str, TrainTask]) -> None:
    for name, num_adapters in (("plain", 2 * 7), ("zero_3", 2 * 7), ("targets", 2 * 1)):
        files = sorted((alone[name].checkpoints[-1] / "state").glob("*.safetensors"))
        stored = {key for file in files for key in load_file(file)}
        assert len(stored) == 3 * 2 * num_adapters, "weight and both moments of A and B, in two layers"
        assert all("lora_A" in key or "lora_B" in key for key in stored)
    names = {f"student.{name}" for name in adapted_names(tasks["plain"])}
    assert set(alone["plain"].weights) < names, "what is trained bears the names of the adapted student"


def adapted_names(task: TrainTask) -> list[str]:
    from pocl_ray.models.lora import add_adapters

    student = load_model(task.student)
    assert task.lora is not None
    add_adapters(student, task.lora, task.seed)
    return [name for name, _ in student.named_parameters()]
