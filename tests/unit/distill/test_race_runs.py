"""Races of tiny models in one process, without Ray: pauses to the bit, and a race that was killed ends the same."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from pocl_ray.config import ScalingConfig
from pocl_ray.distill.task import TrainTask
from pocl_ray.records import Ramp
from pocl_ray.trainings.race import PLAIN, plan_rungs

NUM_STEPS = 12
PLAN = plan_rungs(4, NUM_STEPS, 2.0, shares=[0.25, 0.5])
STAGE = runs.stage(0, 32, num_epochs=3, kd_temperature=1.0, kd_ratio=1.0, lr_num_steps=NUM_STEPS)
HOT = replace(STAGE, kd_temperature_ramp=Ramp((1.0, 2.0), "linear", NUM_STEPS))
EAGER = runs.TRAIN.model_copy(update={"checkpoint_every_steps": 1})
DIVERGING = runs.TRAIN.model_copy(update={"learning_rate": 1e39, "max_nonfinite_steps": 1})


class Killed(Exception):
    """What ends a race in the middle of an arm."""


def arms_of(task: TrainTask) -> dict[str, TrainTask]:
    def arm(name: str, **changes: Any) -> TrainTask:
        own = replace(task, name=f"race_{name}", fingerprint=name * 12, stages=(STAGE,), train=EAGER)
        return replace(own, output=f"race/{name}/student", metrics=f"race/{name}/metrics.jsonl", **changes)

    slow = EAGER.model_copy(update={"learning_rate": 1e-6})
    return {
        PLAIN: arm(PLAIN, train=slow),
        "fast": arm("fast"),
        "hot": arm("hot", stages=(HOT,), train=slow),
        "bad": arm("bad", train=DIVERGING),
    }


class Trainer:
    """Trains as the driver does, from the newest checkpoint; dies after some steps."""

    def __init__(self, lives: float) -> None:
        self.lives, self.num_steps = lives, 0

    def __call__(self, task: TrainTask, scaling: ScalingConfig) -> None:
        from pocl_ray.distill.checkpoint import read_progress
        from pocl_ray.distill.dev import write_row_losses
        from pocl_ray.distill.loop import LoopHooks
        from pocl_ray.distill.setup import set_up_loop
        from pocl_ray.ray_train.driver import checkpoint_folder

        folder = Path(task.run_dir.uri) / checkpoint_folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        moves = runs._Moves(folder)
        hooks = LoopHooks(moves.take, self._count, wait_for_uploads=moves.wait, meet=moves.meet)
        loop = set_up_loop(task, torch.device("cpu"), hooks)
        if kept := sorted(folder.glob("*")):
            loop.restore(read_progress(kept[-1]), kept[-1])
        loop.run()
        if loop.is_paused:
            write_row_losses(task.run_dir, task.dev_rows_file, loop.dev_row_losses())
        else:
            weights = {name: tensor.clone() for _, name, tensor in loop.state.gather(("weight",))}
            save_file(weights, f"{task.run_dir.uri}/{task.output}.safetensors")

    def _count(self, progress: Any, record: dict[str, Any]) -> None:
        self.num_steps += "train/loss" in record
        if self.num_steps > self.lives:
            raise Killed


def _race(task: TrainTask, lives: float = math.inf) -> tuple[dict[str, Any], int]:
    """Run a race to its end, and return what it decided and how many steps it took."""
    from pocl_ray.trainings.heats import run_race

    scaling, trainer, arms = ScalingConfig(), Trainer(lives), arms_of(task)
    decided = run_race(task.run_dir, arms, PLAN, "kl", scaling, train=trainer)
    trainer(replace(arms[decided["winner"]], output="student", metrics="metrics.jsonl"), scaling)
    return decided, trainer.num_steps


def _worker(_: int, tasks: dict[str, TrainTask], target: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, Any] = {"whole": _race(tasks["whole"])}
    for lives in (5, 2, 7):  # within an arm, at its first step after a rung, and in the winner's last part
        try:
            _race(tasks["killed"], lives)
        except Killed:
            found.setdefault("kills", []).append(lives)
    found["killed"] = _race(tasks["killed"])
    alone = arms_of(tasks["alone"])[found["whole"][0]["winner"]]
    Trainer(math.inf)(replace(alone, output="student"), ScalingConfig())
    target.write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, TrainTask]]:
    folder = tmp_path_factory.mktemp("race")
    made = runs.prepare(folder / "whole")
    tasks = {"whole": made}
    for name in ("killed", "alone"):
        shutil.copytree(folder / "whole", folder / name)
        tasks[name] = replace(made, run_dir=made.run_dir.open(str(folder / name), "run"))
    mp.start_processes(_worker, (tasks, folder / "found.json"), 1, start_method="forkserver")
    return json.loads((folder / "found.json").read_text(encoding="utf-8")), tasks


def student(task: TrainTask) -> dict[str, torch.Tensor]:
    return load_file(f"{task.run_dir.uri}/student.safetensors")


def test_the_arm_that_learns_is_handed_out_and_one_that_diverges_is_dropped(raced: Any) -> None:
    found, tasks = raced
    decided, num_steps = found["whole"]
    assert decided["winner"] == "fast"
    first, last = decided["decisions"]
    reasons = {standing["arm"]: standing for standing in first["standings"]}
    assert reasons["bad"]["why"] == "its dev losses are not finite" and reasons["bad"]["loss"] is None
    assert first["left"] == ["fast", PLAIN] and last["left"] == ["fast"]
    assert {standing["arm"]: standing["high"] for standing in last["standings"]}["fast"] < 0
    checkpoints = {path.name for path in (Path(tasks["whole"].run_dir.uri) / "checkpoints").glob("*")}
    assert checkpoints == {"race_fast-fastfastfast"}, "those of dropped arms are deleted"
    taken = decided["num_steps"] + NUM_STEPS - PLAN.rungs[-1].step
    assert taken <= PLAN.most_steps and num_steps <= taken


def test_the_winner_ends_with_the_bits_of_a_run_of_its_own(raced: Any) -> None:
    _, tasks = raced
    for name, tensor in student(tasks["alone"]).items():
        assert torch.equal(student(tasks["whole"])[name], tensor)


def test_a_race_that_is_killed_again_and_again_ends_bit_identical(raced: Any) -> None:
    found, tasks = raced
    assert found["kills"] == [5, 2, 7]
    assert found["killed"][0] == found["whole"][0]
    for name, tensor in student(tasks["whole"]).items():
        assert torch.equal(student(tasks["killed"])[name], tensor)


def _measure(rank: int, task: TrainTask, num_workers: int, port_file: str, target: str) -> None:
    from pocl_ray.distill.loop import LoopHooks
    from pocl_ray.distill.setup import set_up_loop

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=num_workers)
    loop = set_up_loop(replace(task, until=5), torch.device("cpu"), LoopHooks())
    loop.run()
    losses = loop.dev_row_losses()
    with loop.average.applied():
        mean = loop.dev.evaluate()["eval/dev/ce_loss"]
    if rank == 0:
        np.savez(target, **losses, mean=mean, lengths=loop.dev.feed.rows.response_lengths)
    dist.barrier()


def test_the_losses_of_dev_rows_are_those_of_dev_figures_for_any_workers_and_packing(
    raced: Any, tmp_path: Path
) -> None:
    task = arms_of(raced[1]["alone"])["fast"]
    padded = replace(task, train=task.train.model_copy(update={"packing": "off"}))
    averaged = replace(task, train=task.train.model_copy(update={"average": "ema", "average_decay": 0.9}))
    found = []
    for place, (one, num_workers) in enumerate(((task, 1), (task, 2), (padded, 1), (averaged, 1))):
        target = str(tmp_path / f"{place}.npz")
        arguments = (one, num_workers, str(tmp_path / f"port{place}"), target)
        mp.start_processes(_measure, arguments, num_workers, start_method="forkserver")
        found.append(np.load(target))
    for figure in ("kl", "ce_loss"):
        assert found[0][figure].shape == (9,) and (found[0][figure] > 0).all()
        for other in found[1:3]:
            np.testing.assert_allclose(found[0][figure], other[figure], rtol=1e-4)
    assert abs(found[3]["ce_loss"] / found[0]["ce_loss"] - 1).max() > 1e-3
    for one in found:  # dev figures are means over tokens, of the average where one is kept
        np.testing.assert_allclose(np.average(one["ce_loss"], weights=one["lengths"]), one["mean"], rtol=1e-5)
