"""Training with a teacher of another tokenizer in real DeepSpeed processes: the loss by hand, and what must not matter.

As in `test_loop.py`, all runs of a group share one set of processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import STAGES, TRAIN, WORDS, Outcome, prepare, train_all, with_teacher, write_rows

from pocl_ray.config import DistillConfig, LoraConfig
from pocl_ray.data.batching import collate, global_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.distill.feed import load_teachers, teachers_of
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import StorageError
from pocl_ray.models.building import build_model
from pocl_ray.models.frozen import LiveTeacher
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.teacher_cache.writer import write_index, write_shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# One epoch of 2 steps at temperature 1, one of 4 at temperature 2; the checkpoint after step 3 lies within an epoch.
SHORT = (
    replace(STAGES[0], num_epochs=1, lr_num_steps=2),
    replace(STAGES[1], num_epochs=1, lr_num_steps=4),
)
WITHIN_EPOCH = 3
CACHED = DistillConfig(loss="uld", chunk_mib=1)
LIVE = CACHED.model_copy(update={"teacher_cache": "none"})

Runs = dict[Any, Outcome]


def bridge(folder: Path) -> TrainTask:
    """The tiny task with a teacher whose tokenizer knows most of the words by heart and spells two of them out."""
    task = prepare(folder)
    run_dir = task.run_dir
    train_tokenizer([" ".join(WORDS[2:])] * 9, 340, Path(run_dir.uri) / "teacher_tokenizer")
    tokenizer = load_tokenizer(str(run_dir.local("teacher_tokenizer")))
    own = {}
    for made in (task.rows, task.dev_rows):
        store = RowStore.open(run_dir.local(made.path))
        texts = [prompt.removesuffix(" =>") for prompt in store.prompts(range(len(store)))]
        own[made.name] = replace(write_rows(run_dir, f"for_teacher/{made.name}", texts, tokenizer), name=made.name)
    sizes = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = build_model(
        {**sizes, "hidden_size": 24, "intermediate_size": 32}, len(tokenizer) + 4, tokenizer.eos_token_id, None, 9
    )
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from even distributions
    save_model(model, tokenizer, Path(run_dir.uri) / "models" / "foreign")
    train = TRAIN.model_copy(update={"checkpoint_every_steps": 3, "eps": 1e-5})
    bridged = replace(
        task,
        teachers=(replace(task.teachers[0], ref=ModelRef(run_dir.uri_of("models/foreign")), rows=own),),
        stages=SHORT,
        distill=LIVE,
        train=train,
    )
    write_cache(bridged)
    return bridged


def write_cache(task: TrainTask) -> None:
    (foreign,) = task.teachers
    assert foreign.rows is not None
    teacher = LiveTeacher(foreign.ref)
    for name, made in foreign.rows.items():
        store, hidden = RowStore.open(task.run_dir.local(made.path)), []
        for row in range(made.num_rows):
            batch = collate(*store.tokens([row]), pad_id=0)
            hidden.append(teacher.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N))
        place = task.run_dir.uri_of(f"teacher_cache/{name}")
        shard = write_shard(place, np.arange(made.num_rows), hidden)
        write_index(place, [shard.name], foreign.fingerprint, made.fingerprint)


def variants(task: TrainTask) -> dict[str, TrainTask]:
    """The tasks by name; `live` is what the others are compared with."""

    def made(**train: Any) -> TrainTask:
        return replace(task, train=task.train.model_copy(update=train))

    return {
        "live": task,
        "cached": replace(with_teacher(task, cache="teacher_cache"), distill=CACHED),
        "micro_8": made(micro_batch_rows=8),
        "micro_2": made(micro_batch_rows=2),
        "zero_3": made(zero_stage=3),
        "lora": replace(task, lora=LoraConfig(rank=2, alpha=4.0)),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uld")


@pytest.fixture(scope="module")
def tasks(root: Path) -> dict[str, TrainTask]:
    return variants(bridge(root))


@pytest.fixture(scope="module")
def alone(tasks: dict[str, TrainTask], root: Path) -> Runs:
    """Every variant on one worker, and two of them again from a checkpoint."""
    todo: dict[Any, Any] = {name: (task, root / "alone" / name, None) for name, task in tasks.items()}
    for name in ("live", "cached"):
        at = root / "alone" / name / "checkpoints" / f"{WITHIN_EPOCH:05d}"  # written by then
        todo[name, "resumed"] = (tasks[name], root / "resumed" / name, at)
    return dict(zip(todo, train_all(list(todo.values())), strict=True))


@pytest.fixture(scope="module")
def pairs(tasks: dict[str, TrainTask], root: Path) -> Runs:
    """Two workers: the teacher whole on each, cached, and split over both."""
    todo = {
        **{name: tasks[name] for name in ("live", "cached")},
        "sharded": with_teacher(tasks["live"], sharded=True),
    }
    outcomes = train_all([(task, root / "pairs" / name, None) for name, task in todo.items()], num_workers=2)
    return dict(zip(todo, outcomes, strict=True))


def figures_of(run: Outcome, key: str) -> list[float]:
    return [record[key] for record in run.metrics if key in record]


def assert_same_training(run: Outcome, reference: Outcome) -> None:
    """Exact to rounding at the first step; from there on rounding may grow.

    The gradient of |p - q| jumps where two sorted probabilities meet, and rounding decides on which side they stand.
    """
    assert len(reference.losses) == 6
    assert run.losses[0] == pytest.approx(reference.losses[0], abs=1e-6)
    assert run.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=1e-6)
    assert run.losses == pytest.approx(reference.losses, abs=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, abs=5e-5)
    for key in ("train/kd_loss", "train/ce_loss", "eval/dev/ce_loss", "eval/dev/kd_loss"):
        assert figures_of(run, key) == pytest.approx(figures_of(reference, key), abs=1e-5)
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, reference.weights[name], atol=1e-3, rtol=0)  # a tenth of a step


def test_both_models_are_now_and_then_the_one_that_needs_more_tokens(tasks: dict[str, TrainTask]) -> None:
    task = tasks["live"]
    (foreign,) = task.teachers
    assert foreign.rows is not None
    lengths = [
        RowStore.open(task.run_dir.local(made.path)).response_lengths for made in (task.rows, foreign.rows["train"])
    ]
    longer = np.sign(lengths[0] - lengths[1])
    assert {-1, 1} <= set(longer.tolist())


@torch.no_grad()
def summed_by_hand(task: TrainTask, name: str, ids: np.ndarray, temperature: float) -> tuple[float, float, int]:
    """Sums of distance and cross-entropy over rows of the untrained student, in float64, and its response tokens."""
    (foreign,) = task.teachers
    assert foreign.rows is not None
    made = {"train": task.rows, "dev": task.dev_rows}[name]
    sides = [
        (load_model(ref).double(), RowStore.open(task.run_dir.local(rows.path)))
        for ref, rows in ((task.student, made), (foreign.ref, foreign.rows[name]))
    ]
    kd, ce, num_tokens = 0.0, 0.0, 0
    for row in ids.tolist():
        logits = []
        for model, store in sides:
            (prompt,), (response,) = store.tokens([row])
            text = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
            logits.append(model(text[None]).logits[0, len(prompt) - 1 : -1])
            if model is sides[0][0]:
                targets = text[len(prompt) :]
        ce += float(torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum"))
        num_tokens += len(targets)
        for student_V, teacher_W in zip(*logits, strict=False):  # the longer one's rest is cut
            q, p = (np.sort(torch.softmax(x / temperature, -1).numpy())[::-1] for x in (student_V, teacher_W))
            width = max(len(q), len(p))
            kd += float(np.abs(np.pad(q, (0, width - len(q))) - np.pad(p, (0, width - len(p)))).sum())
    return kd, ce, num_tokens


def test_the_loss_is_the_sorted_distance_of_pairs_over_all_of_the_students_tokens(
    tasks: dict[str, TrainTask], alone: Runs
) -> None:
    task = tasks["live"]
    order = np.arange(task.rows.num_rows)
    ranked = np.argsort(
        np.random.default_rng(1).permutation(task.rows.num_rows) + 1, kind="stable"
    )  # as `prepare` does
    ids = next(global_batches(SHORT[0], ranked[: SHORT[0].end_rank], 8, task.seed))
    assert set(ids.tolist()) <= set(order.tolist())
    kd, ce, num_tokens = summed_by_hand(task, "train", ids, SHORT[0].kd_temperature)
    first = next(record for record in alone["live"].metrics if "train/loss" in record)
    assert first["num_response_tokens"] == num_tokens
    assert first["train/kd_loss"] == pytest.approx(kd / num_tokens, rel=1e-5)
    assert first["train/ce_loss"] == pytest.approx(ce / num_tokens, rel=1e-5)
    ratio = SHORT[0].kd_ratio
    assert first["train/loss"] == pytest.approx(((1 - ratio) * ce + ratio * kd) / num_tokens, rel=1e-5)

    kd, _, num_tokens = summed_by_hand(task, "dev", np.arange(task.dev_rows.num_rows), 1.0)
    assert figures_of(alone["live"], "eval/dev/kd_loss")[0] == pytest.approx(kd / num_tokens, rel=1e-5)


@pytest.mark.parametrize("name", ["cached", "micro_8", "micro_2", "zero_3"])
def test_neither_cache_nor_micro_batches_nor_zero_stage_change_the_training(alone: Runs, name: str) -> None:
    assert_same_training(alone[name], alone["live"])


@pytest.mark.parametrize("name", ["live", "cached", "sharded"])
def test_two_workers_train_as_one_does(alone: Runs, pairs: Runs, name: str) -> None:
    assert_same_training(pairs[name], alone["live"])


@pytest.mark.parametrize("name", ["live", "cached"])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(alone: Runs, name: str) -> None:
    whole, resumed = alone[name], alone[name, "resumed"]
    timeless = [[{k: v for k, v in m.items() if k != "step_s"} for m in run.metrics] for run in (whole, resumed)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in resumed.weights.items())


def test_adapters_alone_are_trained_by_it_too(alone: Runs) -> None:
    lora = alone["lora"]
    assert lora.weights and all("lora_" in name for name in lora.weights)
    assert figures_of(lora, "train/kd_loss")[0] == pytest.approx(
        figures_of(alone["live"], "train/kd_loss")[0], abs=1e-6
    )
    assert lora.losses[-1] != alone["live"].losses[-1]


def test_a_cache_of_rows_in_other_tokens_is_refused(tasks: dict[str, TrainTask]) -> None:
    cached = tasks["cached"]
    own = cached.teachers[0].rows
    assert own is not None
    others = {name: replace(made, fingerprint="of another tokenizer") for name, made in own.items()}
    task = with_teacher(cached, rows=others)
    with pytest.raises(StorageError, match="belongs to other rows; score again"):
        teachers_of(task, task.rows, load_teachers(task, torch.device("cpu")), 300)
