"""Peak memory of every loss, above what models and inputs take: all logits at once against chunks.

    python benchmarks/loss_memory.py [--tokens 4096] [--vocabulary 49152] [--losses forward_kl adaptive_kl]

Every measurement is a process of its own that takes one head loss, value and gradients, in float32 and reads the peak
of its resident memory. The gradient of the head's weight is counted in. The naive way makes the logits of all tokens
with plain autograd; it would need 5 to 15 GB here, so it is measured with fewer tokens (`--naive-tokens`) and scaled
up: every array in it has a row for each token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from measuring import Bar, Measurement, add_json_option, conclude, peak_bytes, resident_bytes
from step_memory import MIB
from torch import Tensor

from pocl_ray.distill.chunked import HeadLoss, chunked_head_loss
from pocl_ray.distill.losses import LOSSES, resolve_loss
from pocl_ray.models.heads import HeadWeights

KD_RATIO, KD_TEMPERATURE = 0.8, 2.0
LIMIT_BYTES = 1.5e9


def measure(way: str, name: str, num_tokens: int, vocabulary: int, hidden: int) -> tuple[int, float]:
    """Bytes that a loss adds at its peak in this process, and the seconds it takes."""
    torch.manual_seed(0)
    teacher = HeadWeights(torch.randn(vocabulary, hidden) / hidden**0.5)
    teacher_hidden_NK = torch.randn(num_tokens, hidden)
    hidden_NH = torch.randn(num_tokens, hidden, requires_grad=True)
    weight_VH = (torch.randn(vocabulary, hidden) / hidden**0.5).requires_grad_()
    targets_N = torch.randint(vocabulary, (num_tokens,))
    before, started = resident_bytes(), time.perf_counter()
    if way == "naive":
        loss = all_at_once(name, hidden_NH, weight_VH, targets_N, teacher.logits(teacher_hidden_NK))
    else:
        kd, teacher_logits = resolve_loss(name), lambda rows: teacher.logits(teacher_hidden_NK[rows])
        head_loss = HeadLoss(targets_N, KD_RATIO, kd, KD_TEMPERATURE, teacher_logits)
        loss, *_ = chunked_head_loss(hidden_NH, weight_VH, None, head_loss)
    loss.backward()
    return peak_bytes() - before, time.perf_counter() - started


def all_at_once(name: str, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, teacher_NV: Tensor) -> Tensor:
    """The same loss with the logits of all tokens in memory."""
    logits_NV = F.linear(hidden_NH, weight_VH)
    kd = resolve_loss(name)(logits_NV, teacher_NV, KD_TEMPERATURE).sum()
    return (1.0 - KD_RATIO) * F.cross_entropy(logits_NV, targets_N, reduction="sum") + KD_RATIO * kd


def measure_apart(*arguments: object) -> tuple[int, float]:
    """`measure` in a fresh process, as a peak never falls."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    num_bytes, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(num_bytes), float(seconds)


def main() -> int:
    """Print the table; 1 where a loss is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--naive-tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    add_json_option(parser)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, name, *numbers = args.measure
        print(*measure(way, name, *map(int, numbers)))
        return 0

    print(f"{args.tokens} response tokens x {args.vocabulary} entries, float32, head of width {args.hidden}")
    print(f"all logits: {args.tokens * args.vocabulary * 4 / MIB:.0f} MiB an array")
    print(f"{'loss':>18} {'naive MiB':>10} {'ours MiB':>9} {'ratio':>6} {'seconds':>8}")
    worst = 0
    for name in args.losses:
        naive, _ = measure_apart("naive", name, args.naive_tokens, args.vocabulary, args.hidden)
        fixed = 4 * args.vocabulary * args.hidden  # the gradient of the weight does not grow with the tokens
        naive = fixed + (naive - fixed) * args.tokens // args.naive_tokens
        ours, seconds = measure_apart("ours", name, args.tokens, args.vocabulary, args.hidden)
        worst = max(worst, ours)
        print(f"{name:>18} {naive / MIB:10.0f} {ours / MIB:9.0f} {naive / ours:6.1f} {seconds:8.1f}", flush=True)
    setting = f"{args.tokens} response tokens x {args.vocabulary} entries, float32, {' and '.join(args.losses)}"
    bar = Bar("GB at the peak of the largest", worst / 1e9, LIMIT_BYTES / 1e9, at_least=False)
    return conclude([Measurement("memory of a loss", "all logits at once", setting, (bar,))], args.json)


if __name__ == "__main__":
    sys.exit(main())
