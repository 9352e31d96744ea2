"""The training loop in real DeepSpeed processes: what must not change the result, and what resuming must give back.

Starting a process costs more than a run, so all runs are done in three groups, each in one set of processes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import STAGES, TRAIN, Outcome, prepare, train_all, with_teacher
from safetensors.torch import load_file

from pocl_ray.config import DistillConfig
from pocl_ray.data.batching import collate
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.checkpoint import read_progress
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import StorageError
from pocl_ray.models.building import build_model
from pocl_ray.models.frozen import LiveTeacher
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.teacher_cache.top_k import top_k_of
from pocl_ray.teacher_cache.writer import write_index, write_shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Stage 0 is 2 epochs of 2 steps, stage 1 is one epoch of 4. Checkpoints: after each epoch (2, 4 and 8, of which 4 and 8
# end a stage) and after every third step (3 and 6, within an epoch).
FRESH = (STAGES[0], replace(STAGES[1], num_epochs=1, lr_num_steps=4))
CONTINUOUS = (
    replace(FRESH[0], lr_num_steps=8),
    replace(FRESH[1], restart_optimizer=False, lr_first_step=4, lr_num_steps=8),
)
WITHIN_EPOCH, STAGE_END, SECOND_STAGE = 3, 4, 6

Runs = dict[str, Outcome]


def variants(task: TrainTask) -> dict[str, TrainTask]:
    """The tasks by name; `plain` is what the others are compared with."""
    (teacher,) = task.teachers
    plain = replace(task, stages=FRESH, train=TRAIN.model_copy(update={"checkpoint_every_steps": 3, "eps": 1e-5}))

    def made(hand_off: str = "last", stages: tuple[Any, ...] = FRESH, **train: Any) -> TrainTask:
        settings = plain.train.model_copy(update=train)
        return replace(plain, hand_off=hand_off, stages=stages, train=settings)

    return {
        "plain": plain,
        "padded": made(packing="off"),
        "zero_0": made(zero_stage=0),
        "zero_2": made(zero_stage=2),
        "zero_3": made(zero_stage=3),
        "written_at_once": made(checkpoint_buffer_gib=0.0),
        "micro_8": made(micro_batch_rows=8),
        "micro_2": made(micro_batch_rows=2),
        "tokens": made(micro_batch_rows=None, micro_batch_tokens=48),
        "tokens_padded": made(micro_batch_rows=None, micro_batch_tokens=48, packing="off"),
        "tokens_offloaded": made(micro_batch_rows=None, micro_batch_tokens=48, offload_optimizer="cpu"),
        "tokens_zero_3": made(micro_batch_rows=None, micro_batch_tokens=48, zero_stage=3),
        "cached": replace(with_teacher(plain, cache="teacher_cache"), distill=DistillConfig()),
        "all_tokens_cached": replace(
            with_teacher(plain, cache="topk_cache"), distill=DistillConfig(teacher_cache="topk", top_k=300)
        ),
        "two_alike": replace(
            plain,
            teachers=(replace(teacher, weight=3.0), replace(teacher, cache="teacher_cache", stages=(1,))),
        ),
        "recomputed": replace(plain, gradient_checkpointing=True),
        "best": made("best"),
        "zero_0_best_continuous": made("best", CONTINUOUS, zero_stage=0),
        "zero_1_last_continuous": made("last", CONTINUOUS),
        "zero_3_best_continuous": made("best", CONTINUOUS, zero_stage=3),
        "bf16": made(precision="bf16"),
        "dropout": replace(plain, student=ModelRef(task.run_dir.uri_of("models/gpt2"))),
    }


RESUMED_ALONE = [
    ("plain", WITHIN_EPOCH),
    ("padded", WITHIN_EPOCH),
    ("best", STAGE_END),
    ("zero_0_best_continuous", WITHIN_EPOCH),
    ("zero_0_best_continuous", STAGE_END),
    ("zero_1_last_continuous", SECOND_STAGE),
    ("zero_3_best_continuous", STAGE_END),
    ("bf16", WITHIN_EPOCH),
    ("dropout", WITHIN_EPOCH),
]
PAIRS = ["plain", "tokens_zero_3", "zero_3", "zero_0_best_continuous"]
RESUMED_IN_PAIRS = [("plain", STAGE_END), ("zero_3", WITHIN_EPOCH), ("zero_0_best_continuous", SECOND_STAGE)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def tasks(root: Path) -> dict[str, TrainTask]:
    task = prepare(root)
    tokenizer = load_tokenizer(str(task.run_dir.local("tokenizer")))
    keys = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 64}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    model = build_model({**keys, **dropout}, len(tokenizer), tokenizer.eos_token_id, None, 3)
    save_model(model, tokenizer, Path(task.run_dir.uri) / "models" / "gpt2")
    write_cache(task, tokenizer.eos_token_id)
    return variants(task)


def write_cache(task: TrainTask, pad_id: int) -> None:
    teacher = LiveTeacher(task.teachers[0].ref)
    for summary in (task.rows, task.dev_rows):
        store = RowStore.open(task.run_dir.local(summary.path))
        ids = np.arange(summary.num_rows)
        hidden = []
        for row in ids:
            batch = collate(*store.tokens(np.array([row])), pad_id)
            hidden.append(teacher.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N))
        top_k = [top_k_of(teacher.head.logits(hidden_NK), 300) for hidden_NK in hidden]
        half = len(ids) // 2
        for name, tokens in (("teacher_cache", hidden), ("topk_cache", top_k)):
            folder = task.run_dir.uri_of(f"{name}/{summary.name}")
            shards = [write_shard(folder, part, [tokens[i] for i in part]) for part in (ids[:half], ids[half:])]
            write_index(folder, [shard.name for shard in shards], task.teachers[0].fingerprint, summary.fingerprint)


@pytest.fixture(scope="module")
def alone(tasks: dict[str, TrainTask], root: Path) -> Runs:
    """Every variant on one worker."""
    outcomes = train_all([(task, root / "alone" / name, None) for name, task in tasks.items()])
    return dict(zip(tasks, outcomes, strict=True))


@pytest.fixture(scope="module")
def resumed_alone(tasks: dict[str, TrainTask], alone: Runs, root: Path) -> dict[tuple[str, int], Outcome]:
    """Some of them again from a checkpoint, in a process of its own; the one with padded rows may pack them there."""
    may_pack = {**tasks, "padded": tasks["plain"]}
    todo = [
        (may_pack[name], root / "resumed" / f"{name}_{step}", checkpoint(alone[name], step))
        for name, step in RESUMED_ALONE
    ]
    return dict(zip(RESUMED_ALONE, train_all(todo), strict=True))


@pytest.fixture(scope="module")
def pairs(tasks: dict[str, TrainTask], alone: Runs, root: Path) -> dict[Any, Outcome]:
    """Two workers: some variants, some of these from a checkpoint, and one from a checkpoint of one worker."""
    folder = root / "pairs"
    todo: dict[Any, Any] = {name: (tasks[name], folder / name, None) for name in PAIRS}
    for name, step in RESUMED_IN_PAIRS:
        at = folder / name / "checkpoints" / f"{step:05d}"  # written by then
        todo[name, step] = (tasks[name], folder / f"{name}_{step}", at)
    todo["moved"] = (tasks["zero_3"], folder / "moved", checkpoint(alone["zero_0"], WITHIN_EPOCH))
    return dict(zip(todo, train_all(list(todo.values()), num_workers=2), strict=True))


def checkpoint(outcome: Outcome, step: int) -> Path:
    return next(path for path in outcome.checkpoints if path.name == f"{step:05d}")


def assert_same_training(run: Outcome, reference: Outcome) -> None:
    assert run.losses == pytest.approx(reference.losses, abs=1e-6)
    assert run.grad_norms == pytest.approx(reference.grad_norms, abs=1e-5)
    for key in ("eval/dev/ce_loss", "eval/dev/kd_loss"):
        figures, expected = ([m[key] for m in r.metrics if key in m] for r in (run, reference))
        assert len(expected) == 4
        assert figures == pytest.approx(expected, abs=1e-6)
    assert run.weights.keys() == reference.weights.keys()
    for name, weight in run.weights.items():
        torch.testing.assert_close(
            weight, reference.weights[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_identical(run: Outcome, reference: Outcome) -> None:
    timeless = [[{k: v for k, v in m.items() if k != "step_s"} for m in r.metrics] for r in (run, reference)]
    assert timeless[0] == timeless[1]
    assert run.weights.keys() == reference.weights.keys()
    assert all(torch.equal(weight, reference.weights[name]) for name, weight in run.weights.items())


@pytest.mark.parametrize(
    "name",
    [
        "padded",
        "zero_0",
        "zero_2",
        "zero_3",
        "micro_8",
        "micro_2",
        "tokens",
        "tokens_padded",
        "tokens_offloaded",
        "tokens_zero_3",
        "cached",
        "all_tokens_cached",
        "two_alike",
        "recomputed",
        "written_at_once",
    ],
)
def test_the_way_of_computing_does_not_change_the_training(alone: Runs, name: str) -> None:
    assert_same_training(alone[name], alone["plain"])


@pytest.mark.parametrize("name", PAIRS)
def test_two_workers_train_as_one_does(alone: Runs, pairs: dict[Any, Outcome], name: str) -> None:
    assert_same_training(pairs[name], alone[name])


def test_the_student_learns(alone: Runs) -> None:
    for outcome in alone.values():
        first, *_, last = [m["eval/dev/ce_loss"] for m in outcome.metrics if "eval/dev/ce_loss" in m]
        assert last < first - 0.1


@pytest.mark.parametrize(("name", "step"), RESUMED_ALONE)
def test_a_resumed_run_is_bit_identical(
    alone: Runs, resumed_alone: dict[tuple[str, int], Outcome], name: str, step: int
) -> None:
    assert_identical(resumed_alone[name, step], alone[name])


@pytest.mark.parametrize(("name", "step"), RESUMED_IN_PAIRS)
def test_a_resumed_run_of_two_workers_is_bit_identical(pairs: dict[Any, Outcome], name: str, step: int) -> None:
    assert_identical(pairs[name, step], pairs[name])


def test_a_checkpoint_goes_on_with_other_workers_and_another_zero_stage(alone: Runs, pairs: dict[Any, Outcome]) -> None:
    assert_same_training(pairs["moved"], alone["zero_0"])


def test_rows_are_packed_unless_the_config_or_the_run_so_far_says_otherwise(
    alone: Runs, resumed_alone: dict[tuple[str, int], Outcome]
) -> None:
    last = {name: read_progress(alone[name].checkpoints[-1]) for name in ("plain", "padded", "zero_3", "dropout")}
    assert {name: progress.is_packed for name, progress in last.items()} == {
        "plain": True,
        "padded": False,
        "zero_3": True,
        "dropout": True,
    }
    assert not read_progress(resumed_alone["padded", WITHIN_EPOCH].checkpoints[-1]).is_packed


def test_the_best_evaluation_is_handed_on_where_asked_for(alone: Runs) -> None:
    best, last = alone["best"], alone["plain"]
    assert best.losses[:4] == last.losses[:4], "the first stage is the same"
    assert best.losses[4] != last.losses[4], "the second starts from another evaluation than the last"


def test_the_best_weights_of_a_stage_are_in_each_of_its_checkpoints_so_the_newest_is_enough(alone: Runs) -> None:
    at_best, *later = alone["best"].checkpoints[:3]  # after steps 2, 3 and 4; the best evaluation is that after step 2
    best = load_file(at_best / "best" / "00000.safetensors")
    state = load_file(at_best / "state" / "00000.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in best.items())
    for each in later:
        kept = load_file(each / "best" / "00000.safetensors")
        assert all(torch.equal(tensor, kept[name]) for name, tensor in best.items())
    assert not any((each / "best").exists() for each in alone["plain"].checkpoints), "hand_off last asks for none"


def test_checkpoints_stand_after_each_epoch_and_every_so_many_steps(alone: Runs) -> None:
    assert [path.name for path in alone["plain"].checkpoints] == ["00002", "00003", "00004", "00006", "00008"]
    progress = read_progress(checkpoint(alone["plain"], STAGE_END))
    assert (progress.stage, progress.num_samples, progress.step) == (0, 32, 4), "taken before the hand-off"


@pytest.mark.parametrize("file", ["state/00000.safetensors", "metrics.jsonl", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_refused(alone: Runs, tmp_path: Path, file: str, damage: str) -> None:
    copy = Path(shutil.copytree(checkpoint(alone["plain"], WITHIN_EPOCH), tmp_path / "checkpoint"))
    content = (copy / file).read_bytes()
    if damage == "missing":
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(content[:-9] if damage == "cut" else content[:-9] + bytes(9))
    with pytest.raises(StorageError, match="is missing or damaged") as error:
        read_progress(copy)
    assert "\n" not in str(error.value)
