"""A loss or a gradient that is not finite: the step changes nothing on any worker, and training stops after a few."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import TRAIN, prepare

from pocl_ray.config import Config
from pocl_ray.config.neutral import neutral_free
from pocl_ray.distill.checkpoint import PendingCheckpoint, Progress
from pocl_ray.distill.loop import LoopHooks, TrainingLoop
from pocl_ray.distill.setup import set_up_loop
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import DivergedError, GaveUpError, UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_WORKERS = 2
EVALUATED = [8, 12]  # there is no checkpoint amid steps that are skipped, as 2 and 4 are
CASES = [(stage, "fp32") for stage in range(4)] + [(1, "bf16"), (3, "bf16")]


def spoil(loop: TrainingLoop, is_bad: Callable[[], bool], what: str) -> None:
    """Make the loss, or its gradient alone, NaN or infinite in the forward passes that `is_bad` tells."""
    head = loop.engine.module.loss_head
    forward = head.forward

    def spoilt(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, ce, kd = forward(*arguments)
        if torch.is_grad_enabled() and is_bad():
            if what == "loss":
                return loss * float("nan"), ce, kd
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, ce, kd

    head.forward = spoilt  # type: ignore[method-assign]


def _group(rank: int, num_workers: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers), LOCAL_WORLD_SIZE="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_workers)


def _step(loop: TrainingLoop, batch: Any) -> Any:
    settings = loop._settings(loop.task.stages[0], 0)
    return loop.engine.train_step(batch.micro_batches, settings, 1e-2, batch.num_response_tokens)


def _state(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    tensors = {f"{kind} {name}": tensor.clone() for kind, name, tensor in loop.state.gather()}
    return {**tensors, "adam": torch.tensor(loop.state.num_adam_steps)}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def _compare(task: TrainTask, what: str) -> dict[str, Any]:
    """Take a step, a step that fails on the last worker's first micro-batch, and that step again without the fault."""
    results = []
    for is_spoilt in (False, True):
        loop = set_up_loop(task, torch.device("cpu"), LoopHooks())
        is_on, (stage, rows) = [False], (task.stages[0], loop._rows(task.stages[0]))
        spoil(loop, lambda on=is_on: on[0] and (on.pop() or True) and not on.append(False), what)  # type: ignore[misc]
        with closing(loop.feed.stage(stage, rows, task.train.global_batch_rows, task.seed, 0, None)) as batches:
            first, second = next(batches), next(batches)
        _step(loop, first)
        found: dict[str, Any] = {}
        if is_spoilt:
            before = _state(loop)
            is_on[0] = dist.get_rank() == NUM_WORKERS - 1
            losses = _step(loop, second)
            found = {"is_skipped": losses.is_skipped, "is_untouched": _same(before, _state(loop))}
        again = _step(loop, second)
        results.append({**found, "last": [again.loss, again.grad_norm], "state": _state(loop)})
        loop.engine.deepspeed.destroy()
    clean, spoilt = results
    is_same = _same(clean.pop("state"), spoilt.pop("state"))
    return {**spoilt, "is_same": is_same, "clean": clean["last"]}


def _compare_all(rank: int, task: TrainTask, folder: Path) -> None:
    _group(rank, NUM_WORKERS, folder)
    results = {}
    for zero_stage, precision in CASES:
        train = {"zero_stage": zero_stage, "precision": precision, "micro_batch_rows": 2}
        for what in ("loss", "gradient"):
            changed = replace(task, train=TRAIN.model_copy(update=train))
            results[f"{zero_stage} {precision} {what}"] = _compare(changed, what)
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")


def test_a_step_that_is_not_finite_on_one_worker_changes_nothing_on_any(tmp_path: Path) -> None:
    mp.start_processes(_compare_all, (prepare(tmp_path / "task"), tmp_path), NUM_WORKERS, start_method="forkserver")
    for rank in range(NUM_WORKERS):
        results = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert len(results) == 2 * len(CASES)
        for case, found in results.items():
            assert found["is_skipped"] and found["is_untouched"] and found["is_same"], (case, found)
            assert found["last"] == found["clean"], (case, found)


def _run(task: TrainTask, bad_steps: set[int], kept: list[int]) -> tuple[list[str], str, Progress]:
    warnings: list[str] = []

    def keep(progress: Progress, written: PendingCheckpoint | None) -> None:
        if written is not None:
            written.wait()
            kept.append(progress.step)

    loop = set_up_loop(task, torch.device("cpu"), LoopHooks(on_checkpoint=keep, warn=warnings.append))
    spoil(loop, lambda: loop.progress.step + 1 in bad_steps, "loss")
    try:
        loop.run()
    except DivergedError as error:
        return warnings, str(error), loop.progress
    return warnings, "", loop.progress


def _run_both(_: int, task: TrainTask, folder: Path) -> None:
    _group(0, 1, folder)
    results = []
    for bad_steps in ({2, 4, 5}, {5, 6, 7}):
        kept: list[int] = []
        warnings, error, progress = _run(task, bad_steps, kept)
        results.append([warnings, error, progress.step, kept])
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def test_training_goes_on_after_a_few_such_steps_and_stops_after_three_in_a_row(tmp_path: Path) -> None:
    task = prepare(tmp_path / "task")
    mp.start_processes(_run_both, (task, tmp_path), 1, start_method="forkserver")
    goes_on, stops = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert goes_on[0] == [f"distill: step {step} is skipped, since the loss is nan" for step in (2, 4, 5)]
    assert goes_on[1:] == ["", task.num_steps, EVALUATED]
    assert len(stops[0]) == 3 and stops[2:] == [7, [2, 4]]
    assert "the loss is nan at step 7, the last of 3 in a row" in stops[1] and "\n" not in stops[1]


def test_a_diverged_training_is_not_the_users_mistake() -> None:
    assert issubclass(DivergedError, GaveUpError) and not issubclass(DivergedError, UserError)


def test_the_number_of_such_steps_is_no_part_of_a_runs_identity() -> None:
    trees = [
        neutral_free(Config.model_validate({**_config(), "train": {"max_nonfinite_steps": number}}))
        for number in (3, 9)
    ]
    assert trees[0] == trees[1] and "max_nonfinite_steps" not in trees[0]["train"]


def _config() -> dict[str, Any]:
    return {
        "name": "run",
        "teacher": {"path": "t"},
        "student": {"path": "s"},
        "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 1},
    }
