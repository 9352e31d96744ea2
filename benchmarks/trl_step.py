"""Whole optimizer steps of a distillation: TRL's GKDTrainer and the authors' way against ours, on the same rows.

    python benchmarks/trl_step.py [--teacher DIR] [--rows FILE] [--rounds 3] [--steps 6]

The sides minimise the forward KL at temperature 1, a mean over the response tokens of a batch, with AdamW from the same
weights, and read the same rows in the same order:

    trl      TRL's GKDTrainer with lmbda 0 and beta 0: logits at every position, the teacher live, rows padded to the
             longest; without gradient checkpointing, which only costs time here
    authors  POCL's own way: rows padded to 512 tokens, logits at every position, the teacher live
    cache    our training loop with the DeepSpeed engine of one worker, the teacher's hidden states cached
    live     the same loop with the teacher in memory

Each round is a process of each side, on one thread, of which the first steps are not counted. In the second step the
FLOPs of its matrix products are counted. With bfloat16 (where the CPU has instructions for it) TRL and the authors' way
run under autocast with weights in float32, as their trainers do, and ours as `train.precision: bf16` does. The first
losses must then agree to 1e-2, and those of one more step of each side in float32 to 1e-3.

`--shape` takes the shape of other models with random weights, for GPUs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many as Ray gives a worker of one CPU; before torch is imported
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import pickle
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version

import torch
from measuring import (
    Agreement,
    Bar,
    Measurement,
    SideRun,
    add_json_option,
    conclude,
    first_losses_apart,
    has_bf16,
    matmul_peak,
    ratio_of,
    report_side,
    summarize,
)
from step_sides import FullLogitsStep
from training_inputs import with_live_teacher
from training_sides import (
    LEARNING_RATE,
    PREPARE,
    SETTINGS,
    TASK,
    WARM_STEPS,
    Steps,
    add_model_options,
    load_pair,
    prepare,
    run_apart,
    train_ours,
    trl_trainer,
)

from pocl_ray.distill.task import TrainTask

SIDES = ("trl", "authors", "cache", "live")
BARS = {("cache", "trl"): 5.0, ("live", "trl"): 2.2, ("cache", "authors"): 8.0}
MEMORY_BAR = 0.5
SAME_LOSS, SAME_LOSS_IN_BF16 = 1e-3, 1e-2  # the sides round at other places, which 8 bits of a number do not hide


def train_authors(steps: Steps) -> SideRun:
    """Train with all logits of padded rows and a live teacher, in the shortest loop."""
    models = load_pair(steps)
    student = models["student"].train()
    side = FullLogitsStep(student, models["teacher"], SETTINGS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True)
    started = time.perf_counter()
    for rows in steps.rows:
        with steps.autocast:
            loss = side.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), steps.task.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.num_positions += side.num_positions(rows)
        value, ended = float(loss.detach()), time.perf_counter()
        steps.end_step(ended - started, value)
        started = ended
    return steps.report()


def train_trl(steps: Steps, scratch: str) -> SideRun:
    """Train with TRL's GKDTrainer."""
    trl_trainer(steps, scratch).train()
    return steps.report()


def run_side(options: argparse.Namespace) -> None:
    """Run one side in this process and report it; `prepare` writes the inputs of all sides."""
    if options.side == PREPARE:
        prepare(options)
        return
    task: TrainTask = pickle.loads((options.folder / TASK).read_bytes())
    steps = Steps(task, is_live=options.side == "live")
    if options.side in ("cache", "live"):
        # A folder of its own: what training writes there must not be found by the next side.
        own = task if options.side == "cache" else with_live_teacher(task)
        run = train_ours(steps, replace(own, name=options.side))
    elif options.side == "authors":
        run = train_authors(steps)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run = train_trl(steps, scratch)
    report_side(run)


def measurements(
    options: argparse.Namespace, runs: dict[str, list[SideRun]], exact: dict[str, list[SideRun]], peak: float
) -> list[Measurement]:
    """Return a row for each pair of sides that were both run; `exact` are runs in float32, for their losses."""
    models = "SmolLM2-135M" if options.teacher else f"random weights of the shape of {options.shape}"
    rows = "real rows" if options.rows and options.teacher else "random rows as long as Dolly's"
    setting = (
        f"{models}, {rows}, batch {options.batch}, {'bf16' if options.bf16 else 'fp32'}, {torch.get_num_threads()} "
        f"thread(s), {options.rounds} rounds of {options.steps - WARM_STEPS} steps"
    )
    names = {"trl": f"TRL {version('trl')} GKDTrainer, lmbda 0", "authors": "512 tokens, all logits, live teacher"}
    teacher = {"cache": "step with cached teacher", "live": "step with live teacher"}
    rows_of_table = []
    for (ours, other), bar in BARS.items():
        if ours not in runs or other not in runs:
            continue
        ratio = ratio_of(runs[ours], runs[other])
        sides = (summarize("ours", runs[ours], peak), summarize(other, runs[other], peak))
        bars = [Bar("times as fast", ratio.median, bar)]
        if (ours, other) == ("cache", "trl"):
            memory = (sides[0].peak_gib or 0.0) / (sides[1].peak_gib or 1.0)
            bars.append(Bar("of the other's peak memory", memory, MEMORY_BAR, at_least=False))
        agreements = [Agreement("first losses in fp32", first_losses_apart(exact[ours], exact[other]), SAME_LOSS)]
        if options.bf16:
            apart = first_losses_apart(runs[ours], runs[other])
            agreements.append(Agreement("first losses in bf16", apart, SAME_LOSS_IN_BF16))
        suffix = "" if options.shape == "smollm2" else f", {options.shape}"
        whose = {"trl": "TRL", "authors": "the authors' way"}[other]
        work = f"{teacher[ours]}, against {whose}{suffix}"
        rows_of_table.append(Measurement(work, names[other], setting, tuple(bars), sides, ratio, tuple(agreements)))
    return rows_of_table


def main() -> int:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help=f"of a round; the first {WARM_STEPS} are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    add_json_option(parser)
    parser.add_argument("--side", choices=[*SIDES, PREPARE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.bf16 = has_bf16() if options.bf16 is None else options.bf16
    if options.side:
        run_side(options)
        return 0
    if options.steps <= WARM_STEPS:  # one step in float32 has no counted ones, but is asked for with --side
        parser.error(f"--steps must be more than {WARM_STEPS}")
    given, one_exact = sys.argv[1:], ["--no-bf16", "--steps", "1"]
    runs = run_apart(__file__, options.sides, options.rounds, given)
    exact = run_apart(__file__, options.sides, 1, [*given, *one_exact]) if options.bf16 else runs
    peak = matmul_peak("bfloat16" if options.bf16 else "float32")
    return conclude(measurements(options, runs, exact, peak), options.json)


if __name__ == "__main__":
    sys.exit(main())
