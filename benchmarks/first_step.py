"""Seconds from the call of a training to the end of its first optimizer step, with a tiny model.

    python benchmarks/first_step.py [--rounds 3]

Each round is a process that connects to Ray, which is not counted, and calls `run_training`, which is: workers start,
import, load models, and step. The end of the step is when its record comes to the driver.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else workers give way to all that runs

import argparse
import sys
import tempfile
import time
from pathlib import Path

from measuring import (
    Bar,
    Measurement,
    Side,
    SideRun,
    add_json_option,
    conclude,
    peak_bytes,
    report_side,
    run_sides,
    summarize,
)
from orchestration import make_task

BAR_S = 10.0
NUM_STEPS = 4


def run_side() -> SideRun:
    """Train once on a Ray cluster of this process."""
    from pocl_ray.config import ScalingConfig
    from pocl_ray.ray_cluster.session import ray_session
    from pocl_ray.ray_train.driver import train_watched
    from pocl_ray.ray_train.progress import TrainingStatus

    seen: list[float] = []

    def watch(status: TrainingStatus) -> None:
        if not seen and status.step > 0:
            seen.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, ray_session():
        task = make_task(Path(folder), hidden=64, layers=1, num_steps=NUM_STEPS, zero_stage=1)
        started = time.perf_counter()
        train_watched(task, ScalingConfig(), watch)
        seen.append(time.perf_counter())  # a training that ended before it was watched
    return SideRun([seen[0] - started], NUM_STEPS, peak_bytes())


def main() -> int:
    """Run the rounds and print the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    parser.add_argument("--side", choices=["ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        report_side(run_side())
        return 0
    side = summarize("ours", run_sides(__file__, ["ours"], options.rounds, sys.argv[1:])["ours"])
    assert side.seconds is not None
    bar = Bar("s", side.seconds.median, BAR_S, at_least=False)
    only = Side("ours", side.seconds)
    setting = f"tiny model, 1 worker, Ray running, {options.rounds} rounds"
    return conclude(
        [Measurement("from the call of training to the first step", "", setting, (bar,), (only,))], options.json
    )


if __name__ == "__main__":
    sys.exit(main())
