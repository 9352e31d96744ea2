"""CPU seconds and memory of drawing a stage by its gaps: python benchmarks/frontier_draw.py [ROWS].

Numpy only. The memory is the most that the process held beyond the gaps themselves.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np

from pocl_ray.curriculum.frontier import draw_rows, row_weights


def peak_mb() -> float:
    """Return the most memory that this process has held, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    """Draw as many samples as there are rows, and print what it took."""
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    gaps = np.random.default_rng(0).exponential(0.3, num_rows)
    before, started = peak_mb(), time.process_time()
    drawn = draw_rows(row_weights(gaps), num_rows, seed=42, stage=3)
    seconds = time.process_time() - started
    memory = peak_mb() - before
    print(f"{num_rows:,} rows: {seconds:.2f} s of one core, {memory:.0f} MB, {len(np.unique(drawn)):,} rows drawn")


if __name__ == "__main__":
    main()
