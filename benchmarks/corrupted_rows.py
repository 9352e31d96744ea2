"""Writes the samples' training rows with a share of the responses exchanged, for experiments with wrong references.

    python benchmarks/corrupted_rows.py FILE [--share 0.25] [--seed 0]

The rows whose responses are wrong are drawn by the seed; each takes the response of the next one drawn, so that every
response still occurs as often as before. Prompts, order and all other rows stay as they are.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from pocl_ray.data.samples import sample_rows

SAMPLES, RESPONSE = "instructions", "output"


def exchange_responses(rows: list[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Return rows of which a share has the response of another row.

    Args:
        rows: Rows with a field `output`.
        share: Share of rows that get another response, from 0 to 1; fewer have a wrong one where responses are equal.
        seed: Seed of the draw.

    Raises:
        ValueError: The share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: {share} is not from 0 to 1")
    drawn = random.Random(seed).sample(range(len(rows)), round(share * len(rows)))
    found = [dict(row) for row in rows]
    for row, other in zip(drawn, [*drawn[1:], *drawn[:1]], strict=True):
        found[row][RESPONSE] = rows[other][RESPONSE]
    return found


def main() -> None:
    """Write the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--share", type=float, default=0.25, help="share of exchanged responses (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = sample_rows(SAMPLES, "train")
    changed = exchange_responses(rows, options.share, options.seed)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    wrong = sum(old[RESPONSE] != new[RESPONSE] for old, new in zip(rows, changed, strict=True))
    print(f"{options.file}: {len(rows):,} rows, {wrong:,} with another response than their own")


if __name__ == "__main__":
    main()
