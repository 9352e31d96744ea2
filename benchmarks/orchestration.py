"""The cost of Ray, DeepSpeed and the loop around a step: the same training with them and without, by turns.

    python benchmarks/orchestration.py [--rounds 3] [--steps 12] [--zero-stage 1]

One side is `run_training`: a TorchTrainer whose worker trains through a DeepSpeed engine, reports, logs and sets its
gauges at every step. The other is the shortest loop that does the same arithmetic: the same module, batches, feed and
settings, torch's AdamW and clipping, in a process without Ray, DeepSpeed and process group. Each round is a run of
either side from the same weights; counted are the seconds of the steps, not those of process starts, evaluations and
checkpoints. Ours are `step_s` of the metric stream, which run from the end of one step to the end of the next.

`--without-ray` runs our loop without Ray, to tell the two apart. Prints the ratio of the medians, and fails where it
is over 1.05 or where the losses of the sides differ.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # as many as Ray gives a worker of one CPU; before torch is imported
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else workers give way to all that runs

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measuring import (
    Agreement,
    Bar,
    Measurement,
    SideRun,
    add_json_option,
    conclude,
    peak_bytes,
    ratio_of,
    report_side,
    run_sides,
    summarize,
)
from step_sides import random_model, random_rows, smollm2_shape, student_of
from training_inputs import loop_of, one_stage, write_task

from pocl_ray.config import TrainConfig
from pocl_ray.data.batching import Layout, global_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.distill.loop import LoopHooks
from pocl_ray.distill.task import TrainTask
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.run_directory.storage import RunDirectory

BAR, SAME_LOSS = 1.05, 1e-4
BATCH_ROWS, MICRO_BATCH_ROWS = 8, 4
VOCABULARY = 16384
WARM_STEPS = 2  # that allocate moments and buffers
SIDES = ("ours", "plain")


def make_task(folder: Path, hidden: int, layers: int, num_steps: int, zero_stage: int) -> TrainTask:
    """Write models, rows and teacher cache of a run of `num_steps` optimizer steps."""
    run_dir = RunDirectory.open(str(folder), "run")
    train_tokenizer(["one two three four five six"] * 9, 270, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    teacher = random_model(smollm2_shape(2 * layers, VOCABULARY, hidden), seed=0).eval()
    num_rows = BATCH_ROWS * num_steps
    rows = {
        name: random_rows(many, VOCABULARY, seed) for seed, (name, many) in enumerate((("train", num_rows), ("dev", 1)))
    }
    train = TrainConfig(
        global_batch_rows=BATCH_ROWS, micro_batch_rows=MICRO_BATCH_ROWS, precision="fp32", zero_stage=zero_stage
    )
    models = {"teacher": teacher, "student": student_of(teacher, layers)}
    return write_task(run_dir, models, tokenizer, rows, one_stage(num_rows, num_steps, 2.0, 0.8), train)


def plain_losses(task: TrainTask) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of the loop without Ray and DeepSpeed."""
    from pocl_ray.distill.feed import Feed, load_teachers, teachers_of
    from pocl_ray.distill.kernels import resolve_divergence
    from pocl_ray.distill.step import DistillationModule, StepSettings
    from pocl_ray.models.loading import load_model

    device, stage, train = torch.device("cpu"), task.stages[0], task.train
    teachers = load_teachers(task, device)
    module = DistillationModule(load_model(task.student, dtype=torch.float32, eval_mode=False))
    module.attach_teacher_heads(*(teacher.head for teacher in teachers))
    rows = RowStore.open(task.run_dir.local(task.rows.path))
    teacher_outputs = teachers_of(task, task.rows, teachers, VOCABULARY)
    settings = StepSettings(stage.kd_temperature, stage.kd_ratio, resolve_divergence(task.distill, device))
    optimizer = torch.optim.AdamW(
        module.parameters(), train.learning_rate, train.betas, train.eps, train.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.num_steps)
    taken, started = [], time.monotonic()
    for batch in Feed(rows, Layout(0, MICRO_BATCH_ROWS), 0, 1, teacher_outputs).stage(
        stage, np.arange(task.rows.num_rows), BATCH_ROWS, task.seed, 0
    ):
        total = 0.0
        for part in batch.micro_batches:
            loss = module(part, settings)[0] / batch.num_response_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(module.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ended = time.monotonic()
        taken.append((ended - started, total))
        started = ended
    return taken


def our_losses(task: TrainTask, with_ray: bool) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of a run, from its metric stream."""
    if with_ray:
        from pocl_ray.config import ScalingConfig
        from pocl_ray.ray_train.driver import run_training

        run_training(task, ScalingConfig())
        records = [json.loads(line) for line in task.run_dir.local(task.metrics).read_text().splitlines()]
    else:
        loop = loop_of(task, LoopHooks())
        loop.run()
        records = loop.progress.metrics
    return [(record["step_s"], record["train/loss"]) for record in records if "train/loss" in record]


def num_tokens(options: argparse.Namespace) -> int:
    """The tokens of the counted steps."""
    rows = random_rows(BATCH_ROWS * options.steps, VOCABULARY, 0)
    stage = one_stage(len(rows), options.steps, 2.0, 0.8)
    drawn = [*global_batches(stage, np.arange(len(rows)), BATCH_ROWS, 0)][WARM_STEPS:]
    return sum(len(rows[row].ids_T) for batch in drawn for row in batch)


def run_side(options: argparse.Namespace) -> list[tuple[float, float]]:
    """One run of a side in this process."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), options.hidden, options.layers, options.steps, options.zero_stage)
        if options.side == "plain":
            return plain_losses(task)
        if options.without_ray:
            return our_losses(task, with_ray=False)
        from pocl_ray.ray_cluster.session import ray_session

        with ray_session():
            return our_losses(task, with_ray=True)


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4, help="of the student; the teacher has twice as many")
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of a run, of 8 rows each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--without-ray", action="store_true", help="our loop and DeepSpeed, but not Ray")
    add_json_option(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        taken = run_side(options)
        seconds = [one for one, _ in taken][WARM_STEPS:]
        report_side(SideRun(seconds, num_tokens(options), peak_bytes(), [loss for _, loss in taken]))
        return 0

    runs = run_sides(__file__, SIDES, options.rounds, sys.argv[1:], ours=SIDES)
    # Without the peak memory: that of our process is the driver's, while a worker trains.
    ours, plain = (replace(summarize(side, runs[side]), peak_gib=None) for side in SIDES)
    assert ours.seconds is not None and plain.seconds is not None
    ratio = ours.seconds.median / plain.seconds.median
    pairs = zip(runs["ours"], runs["plain"], strict=True)
    apart = max(abs(a / b - 1) for own, bare in pairs for a, b in zip(own.losses, bare.losses, strict=True))
    # The same steps of the two sides, all together: what a step costs more on the whole, outliers included.
    whole = sum(sum(run.seconds) for run in runs["ours"]) / sum(sum(run.seconds) for run in runs["plain"])
    print(f"a step takes {ratio:.3f} times as long as without orchestration ({whole:.3f} by the sum of all steps)")
    setting = (
        f"width {options.hidden}, {options.layers} layers, batch {BATCH_ROWS}, fp32, 1 thread, {options.rounds} rounds "
        f"of {options.steps - WARM_STEPS} steps; medians of all steps"
    )
    bar = Bar("times as long as the bare loop", ratio, BAR, at_least=False)
    agreement = Agreement("losses of all steps", apart, SAME_LOSS)
    row = Measurement(
        "step with Ray and DeepSpeed",
        "the bare loop",
        setting,
        (bar,),
        (ours, plain),
        ratio_of(*runs.values()),
        (agreement,),
    )
    return conclude([row], options.json)


if __name__ == "__main__":
    sys.exit(main())
