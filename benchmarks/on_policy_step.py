"""Whole on-policy steps: TRL's GKDTrainer with lmbda 1 against our rollouts, on the same prompts and lengths.

    python benchmarks/on_policy_step.py [--teacher DIR] [--rows FILE] [--rounds 2] [--steps 2] [--new-tokens 64]

In a step the student writes a response of `--new-tokens` tokens to each prompt, sampled at temperature 1 from the whole
vocabulary; no token ends one early. Both models read the responses, the teacher live, and the student learns from
the forward KL, with AdamW. Both sides write with a key-value cache: TRL runs without gradient checkpointing, which
would turn its cache off. The rows' own responses, which nobody reads, are as long as those that are written, because
TRL divides the loss by their tokens.

Each round is a process of each side, on one thread, whose first step is not counted. Precisions are those of
`trl_step.py`. Sampled responses differ between the sides, so their counts of tokens must agree, and the loss of one
more step of each side in float32 with the likeliest tokens, to 1e-3.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many as Ray gives a worker of one CPU; before torch is imported
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import pickle
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

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
    peak_bytes,
    ratio_of,
    report_side,
    summarize,
)
from step_sides import Row
from training_inputs import with_live_teacher
from training_sides import PREPARE, TASK, Steps, add_model_options, our_loop, prepare, run_apart, trl_trainer
from transformers import TrainerCallback

from pocl_ray.config import RolloutConfig
from pocl_ray.distill.task import TrainTask
from pocl_ray.experiments.flops import model_size

BAR, SAME_LOSS = 3.0, 1e-3
SIDES = ("ours", "trl")
WARM_STEPS = 1  # that allocates moments and buffers
NEARLY_GREEDY = 1e-6  # temperature at which TRL, which must sample, takes the likeliest token


class OnPolicySteps(Steps):
    """The rows of each step, with a count of the tokens that are written."""

    num_written = 0

    def end_step(self, seconds: float, loss: float | None = None) -> None:
        """Take the seconds of the step that has ended; the memory is that of the steps."""
        self.seconds.append(seconds)
        self.losses += [] if loss is None else [loss]
        self.peak = peak_bytes()

    def report(self) -> SideRun:
        """Return what the round reports: of rows as long as the responses, and of what their writing takes."""
        student, counted = model_size(self.task.student), self.rows[WARM_STEPS:]
        needed = sum(self.needed[WARM_STEPS:])
        for row in (row for rows in counted for row in rows):
            length, num_new = len(row.ids_T), len(row.ids_T) - row.num_prompt_tokens
            needed += student.forward(length - 1, num_new, length / 2)
        due = sum(len(row.ids_T) - row.num_prompt_tokens for rows in self.rows for row in rows)
        if self.num_written != due:
            raise SystemExit(f"{self.num_written} tokens were written in place of {due}")
        return SideRun(
            seconds=self.seconds[WARM_STEPS:] or self.seconds,  # a run for its loss alone has no counted step
            num_tokens=sum(len(row.ids_T) for rows in counted or self.rows for row in rows),
            peak_bytes=self.peak,
            losses=self.losses,
            flops_needed=needed,
        )


class NeverStops(TrainerCallback):
    """Takes the end of an answer from the student's settings, where TRL's trainer writes that of the tokenizer."""

    def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Before each step."""
        model.generation_config.eos_token_id = None


def train_ours(steps: OnPolicySteps, task: TrainTask, options: argparse.Namespace) -> SideRun:
    """Train through our loop and its rollouts."""
    rollout = RolloutConfig(
        mode="on", max_new_tokens=options.new_tokens, sampling_temperature=0.0 if options.greedy else 1.0
    )
    loop = our_loop(steps, replace(with_live_teacher(task), name="ours", rollout=rollout))
    loop.rollouts.writer.stop_ids = []
    train_step = loop.engine.train_step

    def counted(micro_batches: Any, *arguments: Any) -> Any:
        steps.num_written += sum(batch.num_response_tokens for batch in micro_batches)
        return train_step(micro_batches, *arguments)

    loop.engine.train_step = counted  # type: ignore[method-assign]
    loop.run()
    return steps.report()


def train_trl(steps: OnPolicySteps, options: argparse.Namespace, scratch: str) -> SideRun:
    """Train with TRL's GKDTrainer, which writes for each micro-batch."""
    trainer = trl_trainer(
        steps,
        scratch,
        lmbda=1.0,
        max_new_tokens=options.new_tokens,
        temperature=NEARLY_GREEDY if options.greedy else 1.0,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
    )
    trainer.generation_config.eos_token_id = None
    trainer.add_callback(NeverStops())
    write = trainer.generate_on_policy_outputs

    def counted(*arguments: Any) -> Any:
        written = write(*arguments)
        steps.num_written += int((written[2] != -100).sum())
        return written

    trainer.generate_on_policy_outputs = counted
    trainer.train()
    return steps.report()


def run_side(options: argparse.Namespace) -> None:
    """Run one side in this process and report it; `prepare` writes the inputs of all sides."""
    if options.side == PREPARE:

        def with_place(row: Row) -> Row:
            prompt_T = row.ids_T[: row.num_prompt_tokens]
            return Row(torch.cat([prompt_T, prompt_T[:1].expand(options.new_tokens)]), row.num_prompt_tokens)

        prepare(options, with_place)
        return
    task: TrainTask = pickle.loads((options.folder / TASK).read_bytes())
    train = task.train.model_copy(update={"micro_batch_rows": options.micro_batch})
    task = replace(task, train=train)
    steps = OnPolicySteps(task, is_live=True)
    if options.side == "ours":
        report_side(train_ours(steps, task, options))
        return
    with tempfile.TemporaryDirectory() as scratch:
        report_side(train_trl(steps, options, scratch))


def measurement_of(
    options: argparse.Namespace, runs: dict[str, list[SideRun]], exact: dict[str, list[SideRun]], peak: float
) -> Measurement:
    """Return the row of the table; `exact` are runs in float32 with the likeliest tokens, for their losses."""
    models = "SmolLM2-135M" if options.teacher else "random weights of the shape of SmolLM2-135M"
    rows = "real prompts" if options.rows and options.teacher else "random prompts as long as Dolly's"
    setting = (
        f"{models} to {options.student_layers} layers, {rows}, {options.new_tokens} new tokens, batch {options.batch}, "
        f"{options.micro_batch} rows at once, {'bf16' if options.bf16 else 'fp32'}, {torch.get_num_threads()} "
        f"thread(s), {options.rounds} rounds of {options.steps - WARM_STEPS} steps"
    )
    ours, other = (runs[side] for side in SIDES)
    ratio = ratio_of(ours, other)
    counts = [run.num_tokens for run in (*ours, *other)]
    return Measurement(
        "on-policy step, against TRL",
        f"TRL {version('trl')} GKDTrainer, lmbda 1, with its cache",
        setting,
        (Bar("times as fast", ratio.median, BAR),),
        (summarize("ours", ours, peak), summarize("trl", other, peak)),
        ratio,
        (
            Agreement("counts of tokens", max(counts) / min(counts) - 1, 0.0),
            Agreement("losses in fp32, greedy", first_losses_apart(*(exact[side] for side in SIDES)), SAME_LOSS),
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds and print the figures."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a forward pass, and of a rollout of TRL")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help=f"of a round; the first {WARM_STEPS} is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    add_json_option(parser)
    parser.add_argument("--greedy", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=[*SIDES, PREPARE], help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.bf16 = has_bf16() if options.bf16 is None else options.bf16
    if options.batch % options.micro_batch:
        parser.error("--batch must be a multiple of --micro-batch")
    if options.side:
        run_side(options)
        return 0
    if options.steps <= WARM_STEPS:
        parser.error(f"--steps must be more than {WARM_STEPS}")
    runs = run_apart(__file__, SIDES, options.rounds, given)
    exact = run_apart(__file__, SIDES, 1, [*given, "--no-bf16", "--steps", "1", "--greedy"])
    peak = matmul_peak("bfloat16" if options.bf16 else "float32")
    return conclude([measurement_of(options, runs, exact, peak)], options.json)


if __name__ == "__main__":
    sys.exit(main())
