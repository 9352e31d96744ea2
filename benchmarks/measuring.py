"""What the benchmarks share: sides that run in turn, each in a process of its own, their figures, bars, and JSON.

A *side* is one way of doing a piece of work. `run_sides` starts a process for each side and round, which prints a
`SideRun` as its last line. A `Measurement` compares two sides, and is what `table.py` reads from the file that each
benchmark writes with `--json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pocl_ray.ray_cluster.startup import memory_settings

GIB = 2**30
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
OURS = ("ours", "cache", "live")
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "trl")


@dataclass(frozen=True)
class SideRun:
    """What the process of a side reports of one round.

    Attributes:
        seconds: Seconds of each counted step or call.
        num_tokens: Tokens of the work in these seconds, without padding.
        peak_bytes: Most memory that the process held, or that it held on the GPU.
        losses: Loss of each step from the first one, uncounted ones included.
        answers: Digest of the answers.
        padding: Share of padding among the tokens that the model read.
        flops_needed: FLOPs that the work needs in the counted seconds.
        needed_over_done: FLOPs that the work needs over those that were done, in one step.
    """

    seconds: list[float]
    num_tokens: int
    peak_bytes: int
    losses: list[float] = field(default_factory=list)
    answers: str = ""
    padding: float | None = None
    flops_needed: float | None = None
    needed_over_done: float | None = None


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, the least and the most."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of these values, at least one."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Side:
    """The figures of a side over all rounds; None for what was not measured.

    Attributes:
        name: Name of the side.
        seconds: Seconds of a step or call.
        tokens_per_s: Tokens of the work a second, without padding.
        peak_gib: Most memory of a process of its own, in GiB.
        padding: Share of padding among the tokens that the model read.
        needed_over_done: FLOPs that the work needs over those that were done.
        matmul_share: FLOPs a second that the work needs over the measured peak of matrix products (MFU).
    """

    name: str
    seconds: Spread | None = None
    tokens_per_s: float | None = None
    peak_gib: float | None = None
    padding: float | None = None
    needed_over_done: float | None = None
    matmul_share: float | None = None


@dataclass(frozen=True)
class Bar:
    """A measured figure and its bar.

    Attributes:
        figure: Name of the figure, with its unit.
        measured: The figure.
        limit: The bar.
        at_least: Whether the figure must be at least the bar; else at most.
    """

    figure: str
    measured: float
    limit: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the figure reaches the bar; a figure that is not a number does not."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Agreement:
    """How far the results of two sides are apart, and how far they may be."""

    what: str
    difference: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the results are as near as they must be."""
        return self.difference <= self.allowed


@dataclass(frozen=True)
class Measurement:
    """A row of the table.

    Attributes:
        work: The work, a name that no other row has.
        against: The other side.
        setting: Models, rows, batch, precision, threads, and number of rounds.
        bars: Figures with a bar.
        sides: Ours first.
        ratio: Seconds of the other side over ours, by round.
        agreements: Comparisons of the results of the two sides.
    """

    work: str
    against: str
    setting: str
    bars: tuple[Bar, ...] = ()
    sides: tuple[Side, ...] = ()
    ratio: Spread | None = None
    agreements: tuple[Agreement, ...] = ()

    @property
    def is_met(self) -> bool:
        """Whether all bars are met and the results agree."""
        return all(bar.is_met for bar in self.bars) and all(one.holds for one in self.agreements)

    @staticmethod
    def from_json(read: dict[str, Any]) -> Measurement:
        """Return the measurement of which `dataclasses.asdict` made this."""

        def spread(values: dict[str, float] | None) -> Spread | None:
            return None if values is None else Spread(**values)

        return Measurement(
            read["work"],
            read["against"],
            read["setting"],
            tuple(Bar(**bar) for bar in read["bars"]),
            tuple(Side(**{**side, "seconds": spread(side["seconds"])}) for side in read["sides"]),
            spread(read["ratio"]),
            tuple(Agreement(**one) for one in read["agreements"]),
        )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the file of the measurements."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to this file, for table.py")


def conclude(measurements: Sequence[Measurement], file: Path | None) -> int:
    """Print each bar with the measured figure and write the file; return the exit status, 1 where a bar is missed."""
    for row in measurements:
        for line in bar_lines(row):
            print(line, flush=True)
    if file is not None:
        file.write_text(json.dumps({"measurements": [asdict(row) for row in measurements]}, indent=1) + "\n")
    return 0 if all(row.is_met for row in measurements) else 1


def bar_lines(row: Measurement) -> list[str]:
    """Return a line for each bar of a measurement, and one for each agreement of its sides."""
    lines = []
    for bar in row.bars:
        verdict = "met" if bar.is_met else "MISSED"
        kind = "at least" if bar.at_least else "at most"
        lines.append(f"{verdict:>6}  {row.work}: {bar.figure} {bar.measured:.4g}, bar {kind} {bar.limit:g}")
    for one in row.agreements:
        verdict = "same" if one.holds else "DIFFER"
        lines.append(f"{verdict:>6}  {row.work}: {one.what} differ by {one.difference:.1e}, allowed {one.allowed:g}")
    return lines


def run_sides(
    script: str, sides: Sequence[str], rounds: int, arguments: Sequence[str], ours: Collection[str] = OURS
) -> dict[str, list[SideRun]]:
    """Run each side in a process of its own, round after round; the order of the sides changes from round to round.

    Args:
        script: Path of a program that takes `--side NAME` and prints a `SideRun` by `report_side` as its last line.
        sides: Names of the sides.
        rounds: Number of processes of each side.
        arguments: Further arguments of the program.
        ours: Sides whose processes are set up as the workers of a run are; the others are as people run them.
    """
    runs: dict[str, list[SideRun]] = {side: [] for side in sides}
    for index in range(rounds):
        for side in sides if index % 2 == 0 else [*sides][::-1]:
            runs[side].append(SideRun(**ask_side(script, side, arguments, side in ours)))
            last = runs[side][-1]
            print(
                f"round {index + 1}: {side:>14} {statistics.median(last.seconds):8.3f} s"
                f" {last.num_tokens / sum(last.seconds):8.1f} tokens/s {last.peak_bytes / GIB:6.2f} GiB",
                flush=True,
            )
    return runs


def ask_side(script: str, side: str, arguments: Sequence[str], is_ours: bool = False) -> Any:
    """Return the JSON that a program prints as its last line when it is asked for one side."""
    command = [sys.executable, script, *arguments, "--side", side]
    env = {**memory_settings(), **os.environ} if is_ours else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode != 0:
        raise SystemExit(f"{Path(script).name} --side '{side}' failed with exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def report_side(run: SideRun) -> None:
    """Print what `run_sides` reads."""
    print(json.dumps(asdict(run)), flush=True)


def summarize(name: str, runs: Sequence[SideRun], peak_rate: float | None = None) -> Side:
    """Return the figures of a side from its rounds.

    Args:
        name: Name of the side.
        runs: Its rounds.
        peak_rate: Measured peak of matrix products, FLOPs a second.
    """
    seconds = [taken for run in runs for taken in run.seconds]
    needed = [run.flops_needed for run in runs if run.flops_needed is not None]
    shares = [run.needed_over_done for run in runs if run.needed_over_done is not None]
    is_rated = peak_rate is not None and len(needed) == len(runs)
    return Side(
        name,
        Spread.of(seconds),
        sum(run.num_tokens for run in runs) / sum(seconds),
        max(run.peak_bytes for run in runs) / GIB,
        runs[0].padding,
        min(shares) if shares else None,
        sum(needed) / sum(seconds) / peak_rate if is_rated and peak_rate else None,
    )


def ratio_of(ours: Sequence[SideRun], other: Sequence[SideRun]) -> Spread:
    """Return how many times the other side's seconds are ours, by round: the counted steps of a round together."""
    return Spread.of([sum(theirs.seconds) / sum(own.seconds) for own, theirs in zip(ours, other, strict=True)])


def first_losses_apart(ours: Sequence[SideRun], other: Sequence[SideRun]) -> float:
    """Return how far the first losses of two sides are apart at most, of their size; infinity if one is not finite."""
    apart = [abs(own.losses[0] / theirs.losses[0] - 1) for own, theirs in zip(ours, other, strict=True)]
    return max(apart) if all(map(math.isfinite, apart)) else math.inf  # `max` may pass over what is not a number


def resident_bytes() -> int:
    """Return the memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the most memory that the process ever held; on the GPU, if it computed there."""
    torch = sys.modules.get("torch")  # not imported for this: a process without torch holds nothing on a GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_flags() -> set[str]:
    """Return what the CPU says it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def has_bf16() -> bool:
    """Return whether the device computes in bfloat16: a GPU that has it, or a CPU with instructions for it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(BF16_FLAGS & cpu_flags())


def matmul_peak(dtype: str, size: int = 1536, seconds: float = 1.0) -> float:
    """Return the FLOPs a second of the fastest of several square matrix products, on as many threads as torch has."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    fastest, count, ends = float("inf"), 0, time.perf_counter() + seconds
    while count < 5 or time.perf_counter() < ends:  # some at least: the first ones, or one amid other work, are slow
        count += 1
        started = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * size**3 / fastest


def device_name() -> str:
    """Return the name of the GPU, or of the CPU."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code: device, cores, and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = sorted(BF16_FLAGS & cpu_flags())
    return {"device": device_name(), "cores": os.cpu_count(), "bf16": found, "versions": versions}
