"""Seconds of a distillation step: the common way against ours, alternately, in one process, on the same rows.

    python benchmarks/step_speed.py [--teacher DIR] [--rounds 3]

Prints a line a round and the ratio of the medians; fails where the losses differ by more than 1e-3 of their size.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import torch
from step_sides import FullLogitsStep, OurStep, Row, random_model, random_rows, smollm2_shape, student_of
from transformers import AutoModelForCausalLM, PreTrainedModel


def train_step(
    side: FullLogitsStep | OurStep, optimizer: torch.optim.Optimizer, rows: list[Row], bf16: bool
) -> tuple[float, float]:
    """One optimizer step; (loss, seconds)."""
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = side.loss(rows)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()), time.perf_counter() - start


def load_teacher(directory: str | None, num_layers: int, bf16: bool) -> PreTrainedModel:
    """A local model, or one of SmolLM2-135M's shape with random weights."""
    teacher: PreTrainedModel = (
        AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
        if directory
        else random_model(smollm2_shape(num_layers), seed=0)
    )
    teacher.eval()
    return teacher.bfloat16() if bf16 else teacher.float()


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="directory of a Llama-style model; default: random weights")
    parser.add_argument("--teacher-layers", type=int, default=12, help="layers of the random teacher (SmolLM2: 30)")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; slow on CPUs without it")
    args = parser.parse_args()

    bf16 = args.bf16
    teacher = load_teacher(args.teacher, args.teacher_layers, bf16)
    student = student_of(teacher, args.student_layers).float()
    ours = OurStep(copy.deepcopy(student), teacher)
    sides: dict[str, FullLogitsStep | OurStep] = {"full logits": FullLogitsStep(student, teacher), "ours": ours}
    modules = {"full logits": student, "ours": ours.module}
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=1e-5) for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    worst = 0.0
    print(
        f"{'round':>5} {'tokens':>7} {'response':>8} {'full logits s':>14} {'ours s':>8} {'loss':>9} {'loss ours':>9}"
    )
    for index in range(args.rounds + 1):
        rows = random_rows(args.batch, teacher.config.vocab_size, seed=index)
        ours.prepare(rows)
        results = {name: train_step(side, optimizers[name], rows, bf16) for name, side in sides.items()}
        losses = [results[name][0] for name in sides]
        worst = max(worst, abs(losses[1] / losses[0] - 1))
        num_tokens = sum(len(row.ids_T) for row in rows)
        num_response = num_tokens - sum(row.num_prompt_tokens for row in rows)
        times = [results[name][1] for name in sides]
        label = str(index) if index else "warm"
        print(
            f"{label:>5} {num_tokens:7d} {num_response:9d} {times[0]:14.2f} {times[1]:9.2f}"
            f" {losses[0]:9.4f} {losses[1]:10.4f}",
            flush=True,
        )
        if index:  # the first step allocates the optimizer's moments
            for name in sides:
                seconds[name].append(results[name][1])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["full logits"] / medians["ours"]
    print(f"median {medians['full logits']:.2f} s against {medians['ours']:.2f} s: {ratio:.1f} times as fast")
    print(f"losses differ by at most {worst:.1e} of their size")
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
