"""Runs a race: trains its arms in turn up to each rung, and lets `race.decide` say which of them go on.

An arm pauses with a checkpoint and goes on from it, so it ends with the bits of a run of its own. What it left on the
dev rows at a rung is a file. A race that was killed reads those files, decides the same again, and goes on with the arm
that was under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pocl_ray.config import ScalingConfig
from pocl_ray.console import console
from pocl_ray.distill.dev import FloatArray, read_row_losses, write_row_losses
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import DivergedError
from pocl_ray.ray_train.driver import checkpoint_folder, run_training
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.trainings.race import Decision, RacePlan, Standing, decide

Train = Callable[[TrainTask, ScalingConfig], object]


def run_race(
    run_dir: RunDirectory,
    tasks: Mapping[str, TrainTask],
    plan: RacePlan,
    figure: str,
    scaling: ScalingConfig,
    train: Train = run_training,
) -> dict[str, Any]:
    """Train arms until one is left, and return the content of `race.json`; that arm has not come to its end yet.

    Args:
        run_dir: Run directory.
        tasks: Arm -> its whole training, plain distillation among them.
        plan: Rungs of the race.
        figure: Dev loss that is compared, `kl` or `ce_loss`.
        scaling: Workers of each training.
        train: Function that trains a task up to its pause, from the last checkpoint of the same task.

    Raises:
        UserError: The input of a training is wrong.
        GaveUpError: The workers failed more often than `scaling.max_failures` allows.

    Returns:
        `figure`, `plan`, `decisions` (rung, standings, arms left), `winner`, and `num_steps`: those taken so far.
    """
    left, decisions, num_steps, step = tuple(tasks), [], 0, 0
    for rung in plan.rungs:
        losses = {}
        for name in left:
            console.print(f"  {name}: to step {rung.step} of {plan.num_steps}")
            losses[name] = _losses(run_dir, replace(tasks[name], until=rung.step), figure, scaling, train)
        num_steps += len(left) * (rung.step - step)
        decision, step = decide(losses, rung, plan), rung.step
        decisions.append(decision)
        for standing in decision.standings:
            console.print(f"  {_line(standing)}")
            if standing.fate == "dropped":
                run_dir.delete(checkpoint_folder(tasks[standing.arm]))
        left = decision.left
        if len(left) == 1:
            break
    return {
        "figure": figure,
        "plan": plan.to_json(),
        "decisions": [_to_json(decision) for decision in decisions],
        "winner": left[0],
        "num_steps": num_steps,
    }


def _losses(run_dir: RunDirectory, task: TrainTask, figure: str, scaling: ScalingConfig, train: Train) -> FloatArray:
    """The losses of the dev rows at a pause, after training up to it if they are not there; NaN if it diverged."""
    if not run_dir.exists(task.dev_rows_file):
        try:
            train(task, scaling)
        except DivergedError as error:
            console.print(f"[yellow]warning:[/] {error}")
            write_row_losses(run_dir, task.dev_rows_file, dict.fromkeys(("kl", "ce_loss"), np.array([math.nan])))
    return read_row_losses(run_dir, task.dev_rows_file, figure)


def _line(standing: Standing) -> str:
    beside = ""
    if math.isfinite(standing.difference):
        beside = f" ({standing.difference:+.4f}, {standing.low:+.4f} to {standing.high:+.4f})"
    return f"{standing.arm}: dev loss {standing.loss:.4f}{beside}, {standing.fate}: {standing.why}"


def _to_json(decision: Decision) -> dict[str, Any]:
    """The decision as a JSON-like value; figures that are not finite become null."""
    content = asdict(decision)
    for standing in content["standings"]:
        for key in ("loss", "difference", "low", "high"):
            standing[key] = standing[key] if math.isfinite(standing[key]) else None
    return content
