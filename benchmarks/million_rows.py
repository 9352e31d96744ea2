"""Seconds of what grows with the number of rows: ranking them, planning the stages, drawing the batch of a step.

    python benchmarks/million_rows.py [--rows 1000000]

The package's own functions, on random signals. No model, and no Ray.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
from measuring import Bar, Measurement, Side, Spread, add_json_option, conclude, peak_bytes

from pocl_ray.config import Config
from pocl_ray.curriculum.frontier import draw_rows, row_weights
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.data.batching import global_batches
from pocl_ray.difficulty.ranking import rank_rows

BARS_S = {"ranking": 2.0, "planning the stages": 1.0, "drawing the rows of a stage": 1.0, "drawing a batch": 1e-3}
BATCH_ROWS, BATCHES = 64, 2000


def seconds_of(function: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each call."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return taken


def measure(num_rows: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each work, by round."""
    rng = np.random.default_rng(0)
    signals = {"rouge_l": rng.uniform(0, 100, num_rows), "ce_loss": rng.exponential(2.0, num_rows)}
    data, model = {"train": {"path": "rows.jsonl"}, "holdout_rows": 1}, {"path": "model"}
    config = Config.model_validate({"name": "rows", "data": data, "teacher": model, "student": model})
    stages = plan_stages(config, num_rows)
    last, order = stages[-1], np.argsort(signals["ce_loss"])

    def draw_batches() -> None:
        drawn = global_batches(last, order[last.first_rank : last.end_rank], BATCH_ROWS, seed=0)
        for _, _ in zip(range(BATCHES), drawn, strict=False):
            pass

    gaps = rng.exponential(0.3, num_rows)
    return {
        "ranking": seconds_of(lambda: rank_rows(signals), rounds),
        "planning the stages": seconds_of(lambda: plan_stages(config, num_rows), rounds),
        "drawing the rows of a stage": seconds_of(lambda: draw_rows(row_weights(gaps), num_rows, 42, 3), rounds),
        # With the order of the epoch, which is drawn at its first step.
        "drawing a batch": [taken / BATCHES for taken in seconds_of(draw_batches, rounds)],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    add_json_option(parser)
    options = parser.parse_args()
    rows = []
    for work, taken in measure(options.rows, options.rounds).items():
        spread = Spread.of(taken)
        bar = Bar("s", spread.median, BARS_S[work], at_least=False)
        side = Side("ours", spread, peak_gib=peak_bytes() / 2**30)
        setting = f"{options.rows:,} rows, {options.rounds} rounds, 1 thread"
        rows.append(Measurement(f"{work}, {options.rows:,} rows", "", setting, (bar,), (side,)))
    return conclude(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
