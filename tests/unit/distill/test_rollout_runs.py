"""On-policy training in real DeepSpeed processes: what must not change it, what resuming gives back, and each preset.

Starting a process costs more than a run, so all runs are done in three groups, each in one set of processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import STAGES, TRAIN, Outcome, prepare, train_all

from pocl_ray.config import DistillConfig, RolloutConfig
from pocl_ray.distill.checkpoint import read_progress
from pocl_ray.distill.rollout_schedule import AdaptiveSchedule, draw_of, source_of
from pocl_ray.distill.task import TrainTask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = Path(__file__).resolve().parents[3] / "configs" / "methods"
PRESETS = ("gkd", "gkd_on_policy", "distillm", "distillm2")
# 8 steps, checkpoints after 2, 3, 4, 6 and 8 of them.
SHORT = (STAGES[0], replace(STAGES[1], num_epochs=1, lr_num_steps=4))
WITHIN_EPOCH, SECOND_STAGE = 3, 6
# The threshold stands high from the start and the buffer is full after two rollouts, so that every source comes up.
ADAPTIVE = {"mode": "adaptive", "threshold_start": 0.8, "buffer_rows": 16, "loss_rise": 0.0}

Runs = dict[Any, Outcome]


def variants(task: TrainTask) -> dict[str, TrainTask]:
    plain = replace(task, stages=SHORT, train=TRAIN.model_copy(update={"checkpoint_every_steps": 3, "eps": 1e-5}))

    def made(rollout: dict[str, Any], distill: dict[str, Any] | None = None, **train: Any) -> TrainTask:
        return replace(
            plain,
            rollout=RolloutConfig.model_validate({"max_new_tokens": 10, **rollout}),
            distill=DistillConfig.model_validate({**(distill or {}), "teacher_cache": "none"}),
            train=plain.train.model_copy(update=train),
        )

    layers = {name: yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8")) for name in PRESETS}
    tiny = {"max_new_tokens": 8}
    return {
        "off": plain,
        "on": made({"mode": "on"}),
        "on_padded": made({"mode": "on"}, packing="off"),
        "on_zero_0": made({"mode": "on"}, zero_stage=0),
        "on_zero_3": made({"mode": "on"}, zero_stage=3),
        "on_micro_2": made({"mode": "on"}, micro_batch_rows=2),
        "on_batches": made({"mode": "on", "batch_rows": 3}),
        "mixed": made({"mode": "mixed", "lambda": 0.5}),
        "adaptive": made(ADAPTIVE),
        "adaptive_zero_3": made(ADAPTIVE, zero_stage=3),
        "beside": made({"mode": "on", "beside_data": True, "loss": "reverse_kl"}),
        **{name: made({**layer["rollout"], **tiny}, layer["distill"]) for name, layer in layers.items()},
    }


RESUMED_ALONE = [("on", WITHIN_EPOCH), ("mixed", SECOND_STAGE), ("adaptive", WITHIN_EPOCH), ("beside", SECOND_STAGE)]
PAIRS = ["on", "on_zero_3", "adaptive", "adaptive_zero_3", "beside", "distillm"]
RESUMED_IN_PAIRS = [
    ("adaptive", SECOND_STAGE),
    ("adaptive_zero_3", WITHIN_EPOCH),
    ("distillm", WITHIN_EPOCH),
]  # its buffer is empty


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollouts")


@pytest.fixture(scope="module")
def tasks(root: Path) -> dict[str, TrainTask]:
    return variants(prepare(root))


@pytest.fixture(scope="module")
def alone(tasks: dict[str, TrainTask], root: Path) -> Runs:
    outcomes = train_all([(task, root / "alone" / name, None) for name, task in tasks.items()])
    return dict(zip(tasks, outcomes, strict=True))


@pytest.fixture(scope="module")
def resumed(tasks: dict[str, TrainTask], alone: Runs, root: Path) -> Runs:
    todo = [
        (tasks[name], root / "resumed" / f"{name}_{step}", checkpoint(alone[name], step))
        for name, step in RESUMED_ALONE
    ]
    return dict(zip(RESUMED_ALONE, train_all(todo), strict=True))


@pytest.fixture(scope="module")
def pairs(tasks: dict[str, TrainTask], alone: Runs, root: Path) -> Runs:
    """Two workers: some variants, some of these from a checkpoint, and one from a checkpoint of one worker."""
    folder = root / "pairs"
    todo: dict[Any, Any] = {name: (tasks[name], folder / name, None) for name in PAIRS}
    for name, step in RESUMED_IN_PAIRS:
        todo[name, step] = (tasks[name], folder / f"{name}_{step}", folder / name / "checkpoints" / f"{step:05d}")
    todo["moved"] = (tasks["adaptive_zero_3"], folder / "moved", checkpoint(alone["adaptive"], WITHIN_EPOCH))
    return dict(zip(todo, train_all(list(todo.values()), num_workers=2), strict=True))


def checkpoint(outcome: Outcome, step: int) -> Path:
    return next(path for path in outcome.checkpoints if path.name == f"{step:05d}")


def steps_of(outcome: Outcome) -> list[dict[str, Any]]:
    return [record for record in outcome.metrics if "train/loss" in record]


def sources_of(outcome: Outcome) -> list[str]:
    return [record["rollout/source"] for record in steps_of(outcome)]


def assert_same_training(run: Outcome, reference: Outcome) -> None:
    for key in ("num_response_tokens", "rollout/source"):
        assert [step[key] for step in steps_of(run)] == [step[key] for step in steps_of(reference)]
    assert run.losses == pytest.approx(reference.losses, abs=1e-5)
    assert run.grad_norms == pytest.approx(reference.grad_norms, abs=1e-4)
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, reference.weights[name], atol=5e-5, rtol=0)


def assert_identical(run: Outcome, reference: Outcome) -> None:
    timeless = [[{k: v for k, v in m.items() if k != "step_s"} for m in r.metrics] for r in (run, reference)]
    assert timeless[0] == timeless[1]
    assert all(torch.equal(weight, reference.weights[name]) for name, weight in run.weights.items())


@pytest.mark.parametrize("name", ["on_padded", "on_zero_0", "on_zero_3", "on_micro_2", "on_batches"])
def test_the_way_of_computing_does_not_change_what_is_written_nor_the_training(alone: Runs, name: str) -> None:
    assert_same_training(alone[name], alone["on"])


@pytest.mark.parametrize("name", PAIRS)
def test_two_workers_write_and_train_as_one_does(alone: Runs, pairs: Runs, name: str) -> None:
    assert_same_training(pairs[name], alone[name])


@pytest.mark.parametrize(("name", "step"), RESUMED_ALONE)
def test_a_resumed_run_is_bit_identical(alone: Runs, resumed: Runs, name: str, step: int) -> None:
    assert_identical(resumed[name, step], alone[name])


@pytest.mark.parametrize(("name", "step"), RESUMED_IN_PAIRS)
def test_a_resumed_run_of_two_workers_is_bit_identical(pairs: Runs, name: str, step: int) -> None:
    assert_identical(pairs[name, step], pairs[name])


def test_a_checkpoint_goes_on_with_other_workers_and_another_zero_stage(alone: Runs, pairs: Runs) -> None:
    assert_same_training(pairs["moved"], alone["adaptive"])


def test_rollouts_take_the_place_of_the_rows_responses(alone: Runs) -> None:
    written, given = ([step["num_response_tokens"] for step in steps_of(alone[name])] for name in ("on", "off"))
    assert set(sources_of(alone["on"])) == {"student"}
    assert all(8 <= count <= 8 * 10 for count in written)
    assert written != given
    assert all("rollout/source" not in step for step in steps_of(alone["off"]))
    assert all(0.0 <= step["rollout/unstopped_share"] <= 1.0 for step in steps_of(alone["on"]))


def test_beside_data_a_step_is_on_both_at_once(alone: Runs) -> None:
    both, given, written = (
        [step["num_response_tokens"] for step in steps_of(alone[name])] for name in ("beside", "off", "on")
    )
    # The first step starts from the same weights in each, so the same responses are written there.
    assert both[0] == given[0] + written[0]
    assert all(total > own for total, own in zip(both, given, strict=True))


def test_a_mixed_run_writes_where_the_draw_of_the_step_says(alone: Runs, tasks: dict[str, TrainTask]) -> None:
    draws = [draw_of(tasks["mixed"].seed, step) for step in range(8)]
    assert sources_of(alone["mixed"]) == ["student" if u < 0.5 else "data" for u in draws]
    assert {"student", "data"} == set(sources_of(alone["mixed"]))


def test_an_adaptive_run_follows_the_schedule_over_its_own_dev_losses(alone: Runs, tasks: dict[str, TrainTask]) -> None:
    config, seed = tasks["adaptive"].rollout, tasks["adaptive"].seed
    schedule = AdaptiveSchedule(config.threshold_start, None, config.threshold_rise, config.loss_rise)
    expected, held = [], 0
    for record in alone["adaptive"].metrics:
        if "eval/dev/ce_loss" in record:
            schedule = schedule.observed(record["eval/dev/ce_loss"])
            continue
        step = record["step"] - 1
        expected.append(source_of(config, schedule, draw_of(seed, step), step, 8, held == config.buffer_rows))
        held = min(config.buffer_rows, held + 8 * (expected[-1] == "student"))
        assert (record["rollout/phi"], record["rollout/buffer_rows"]) == (schedule.phi, held)
    assert sources_of(alone["adaptive"]) == expected
    assert {"student", "buffer"} <= set(expected)


def test_a_checkpoint_holds_threshold_and_buffer(alone: Runs) -> None:
    at = checkpoint(alone["adaptive"], WITHIN_EPOCH)
    assert read_progress(at).rollout["phi"] >= 0.8
    assert (at / "rollouts.safetensors").exists()
    assert not (checkpoint(alone["on"], WITHIN_EPOCH) / "rollouts.safetensors").exists()


def test_on_rollouts_the_divergence_stands_alone(alone: Runs) -> None:
    for step in steps_of(alone["on"]):
        assert step["curriculum/kd_ratio"] < 1.0 or step["curriculum/stage"] > 0
        assert step["train/loss"] == pytest.approx(step["train/kd_loss"], rel=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_on_policy_preset_trains(alone: Runs, name: str) -> None:
    outcome = alone[name]
    assert len(outcome.losses) == 8
    assert all(torch.isfinite(torch.tensor(outcome.losses)))
    assert all(norm > 0 for norm in outcome.grad_norms)
    sources = set(sources_of(outcome))
    expected = {"gkd": {"student", "data"}, "gkd_on_policy": {"student"}, "distillm2": {"student"}}
    assert sources == expected.get(name, sources) and sources <= {"student", "data", "buffer"}
