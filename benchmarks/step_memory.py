"""Peak memory of a distillation step, above what models and gradients take: the common way against ours.

    python benchmarks/step_memory.py [--batch 4] [--response 16 64 128]

Every measurement is a process of its own that takes one step with a fixed number of response tokens a row (behind a
prompt of 32) and reads the peak of its resident memory. The common way holds B x 512 x V logits several times over,
however short the rows; ours grows with the tokens that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
from measuring import peak_bytes, resident_bytes
from step_sides import FullLogitsStep, OurStep, Row, random_model, smollm2_shape

NUM_PROMPT_TOKENS = 32
MIB = 2**20


def measure(side_name: str, batch: int, num_response_tokens: int, vocabulary: int, hidden: int) -> int:
    """Bytes that a step adds at its peak, in this process."""
    teacher = random_model(smollm2_shape(2, vocabulary, hidden), seed=0).eval()
    student = random_model(smollm2_shape(1, vocabulary, hidden), seed=1)
    length = NUM_PROMPT_TOKENS + num_response_tokens
    rows = [Row(torch.randint(3, vocabulary, (length,)), NUM_PROMPT_TOKENS) for _ in range(batch)]
    side = FullLogitsStep(student, teacher) if side_name == "full" else OurStep(student, teacher)
    if isinstance(side, OurStep):
        side.prepare(rows)
    for parameter in student.parameters():  # an optimizer would hold them anyway; they are not the step's
        parameter.grad = torch.ones_like(parameter)
    before = resident_bytes()
    side.loss(rows).backward()
    return peak_bytes() - before


def measure_apart(*arguments: object) -> int:
    """`measure` in a fresh process, as a peak never falls."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--response", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        side, *numbers = args.measure
        print(measure(side, *map(int, numbers)))
        return 0

    print(f"B x 512 x V in float32: {args.batch * 512 * args.vocabulary * 4 / MIB:.0f} MiB")
    print(f"{'response tokens':>15} {'full logits MiB':>16} {'ours MiB':>9} {'ratio':>6}")
    for num_response_tokens in args.response:
        sizes = (args.batch, num_response_tokens, args.vocabulary, args.hidden)
        full, ours = measure_apart("full", *sizes), measure_apart("ours", *sizes)
        print(
            f"{args.batch * num_response_tokens:15d} {full / MIB:16.0f} {ours / MIB:9.0f} {full / ours:6.1f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
