"""Seconds of a distillation step with padded and with packed rows, in turn, on the same global batches.

    python benchmarks/packing.py [--rows 16] [--rounds 3] [--bf16]

Three sides, each as the package cuts a global batch for one worker: rows padded to the longest of a micro-batch, the
same number of rows packed, and packed rows under a token budget of the largest padded micro-batch. The teacher's hidden
states are cached. Prints seconds, ratio to the padded side, share of padding, and the FLOPs that the rows need over the
FLOPs that are done; fails where losses differ by more than 1e-4 (bfloat16: 1e-2) of their size.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time

import numpy as np
import torch
from measuring import Agreement, Bar, Measurement, Side, Spread, add_json_option, conclude
from step_sides import SETTINGS, Row, random_model, random_rows, smollm2_shape, student_of
from transformers import PreTrainedModel

from pocl_ray.data.batching import Layout, MicroBatch, TeacherOutput
from pocl_ray.distill.step import DistillationModule
from pocl_ray.experiments.flops import size_of
from pocl_ray.models.heads import head_of, split_model
from pocl_ray.models.packing import find_packing_obstacle
from pocl_ray.models.shapes import ModelSize

MAX_TOKENS = 512
BAR = 0.9


class Way:
    """One way of cutting and laying out rows, with a student and an optimizer of its own."""

    def __init__(self, layout: Layout, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.layout, self.module = layout, DistillationModule(student)
        self.module.attach_teacher_heads(head_of(teacher))
        parts = split_model(student)
        if layout.is_packed and (
            why := find_packing_obstacle(student, parts.response_hidden, parts.logits, MAX_TOKENS)
        ):
            raise SystemExit(f"the student cannot read packed rows: {why}")
        student.train()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def micro_batches(self, rows: list[Row], cached: list[torch.Tensor]) -> list[MicroBatch]:
        """The rows as this side trains on them, with the teacher's part."""
        ids = [row.ids_T.numpy() for row in rows]
        batches = []
        for part in self.layout.deal(np.array([len(one) for one in ids]), 0, 1):
            prompts = [ids[i][: rows[i].num_prompt_tokens] for i in part]
            responses = [ids[i][rows[i].num_prompt_tokens :] for i in part]
            output = TeacherOutput(torch.cat([cached[i] for i in part]))
            batches.append(dataclasses.replace(self.layout.collate(prompts, responses), teacher_outputs=(output,)))
        return batches

    def step(self, batches: list[MicroBatch]) -> tuple[float, float]:
        """One optimizer step; (mean loss, seconds)."""
        num_tokens = sum(batch.num_response_tokens for batch in batches)
        start, total = time.perf_counter(), 0.0
        for batch in batches:
            loss = self.module(batch, SETTINGS)[0] / num_tokens
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, time.perf_counter() - start


def flops_done(size: ModelSize, batches: list[MicroBatch]) -> float:
    """FLOPs of a forward pass over the micro-batches, padding included."""
    total = 0.0
    for batch in batches:
        for length in batch.row_lengths or [batch.input_ids_BT.shape[1]] * len(batch.input_ids_BT):
            total += size.forward(length, 0, length)
        total += size.head(batch.num_response_tokens)
    return total


def read_by_teacher(teacher: PreTrainedModel, row: Row) -> torch.Tensor:
    """What the cache holds of a row."""
    ids_BT, index_N = row.ids_T.unsqueeze(0), torch.arange(row.num_prompt_tokens - 1, len(row.ids_T) - 1)
    with torch.no_grad():
        return split_model(teacher).response_hidden(ids_BT, torch.ones_like(ids_BT), index_N)


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a global batch")
    parser.add_argument("--micro", type=int, default=4, help="rows of a micro-batch of the first two sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="layers of the student; SmolLM2-135M's shape else")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights, as train.precision bf16 has them")
    add_json_option(parser)
    args = parser.parse_args()

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    teacher = random_model(smollm2_shape(args.layers), seed=0).to(dtype).eval()
    student = student_of(teacher, args.layers).to(dtype)
    size, vocab_size = size_of(student), student.config.vocab_size
    batches = [random_rows(args.rows, vocab_size, seed) for seed in range(args.rounds + 1)]
    padded = Layout(0, args.micro)
    lengths = [np.array([len(row.ids_T) for row in rows]) for rows in batches]
    widest = max(len(part) * int(one[part].max()) for one in lengths for part in padded.deal(one, 0, 1))
    layouts = {
        "padded": padded,
        "packed": Layout(0, args.micro, is_packed=True),
        "token budget": Layout(0, args.micro, widest, is_packed=True),
    }
    ways = {name: Way(layout, copy.deepcopy(student), teacher) for name, layout in layouts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens, done, worst = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0), 0.0
    for index, rows in enumerate(batches):
        cached = [read_by_teacher(teacher, row) for row in rows]
        made = {name: side.micro_batches(rows, cached) for name, side in ways.items()}
        losses = {}
        for name in [*ways][index % 3 :] + [*ways][: index % 3]:
            losses[name], took = ways[name].step(made[name])
            if index:  # the first step allocates the optimizer's moments
                seconds[name].append(took)
                tokens[name] += sum(batch.input_ids_BT.numel() for batch in made[name])
                done[name] += flops_done(size, made[name])
        worst = max(worst, *(abs(losses[name] / losses["padded"] - 1) for name in ways))
        print(f"round {index or 'warm'}: losses {[round(losses[name], 5) for name in ways]}", flush=True)
    num_tokens = sum(int(one.sum()) for one in lengths[1:])
    print(f"{num_tokens} tokens in {args.rounds} steps of {args.rows} rows, {str(dtype).removeprefix('torch.')}")
    print(f"{'side':>13} {'s/step':>7} {'spread':>13} {'ratio':>6} {'tokens/s':>9} {'padding':>8} {'needed/done':>12}")
    for name, took in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["padded"], took, strict=True))
        spread = f"{min(took):.2f} to {max(took):.2f}"
        speed, share = num_tokens / sum(took), 1 - num_tokens / tokens[name]
        print(
            f"{name:>13} {statistics.median(took):7.2f} {spread:>13} {ratio:6.2f} {speed:9.0f} {share:8.1%}"
            f" {done['packed'] / done[name]:12.3f}"
        )
    print(f"losses differ by at most {worst:.1e} of their size")
    sides = tuple(
        Side(name, Spread.of(seconds[name]), num_tokens / sum(seconds[name]), None, 1 - num_tokens / tokens[name],
             done["packed"] / done[name])
        for name in ("token budget", "padded")
    )  # fmt: skip
    ratio = Spread.of([a / b for a, b in zip(seconds["padded"], seconds["token budget"], strict=True)])
    row = Measurement(
        "step of packed rows",
        "padded rows",
        f"6 layers of SmolLM2-135M's shape, {args.rows} rows, {'bf16' if args.bf16 else 'fp32'}, {args.rounds} rounds",
        (Bar("of the FLOPs done are needed", sides[0].needed_over_done or 0.0, BAR),),
        sides,
        ratio,
        (Agreement("losses", worst, 1e-2 if args.bf16 else 1e-4),),
    )
    return conclude([row], args.json)


if __name__ == "__main__":
    sys.exit(main())
