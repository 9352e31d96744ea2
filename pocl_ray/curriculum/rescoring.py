"""Which stages train on rows that are ranked anew before them, by the student as it then is."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_ray.errors import ConfigError
from pocl_ray.records import Order


def rescored_stages(slices: Sequence[tuple[int, int]], num_rows: int, order: Order, pacing: str) -> list[bool]:
    """Return of each stage whether the rows are ranked anew before it: where that can change which rows it takes.

    The first stage has the ranking of the untuned student. A stage of all rows needs none, since they are shuffled, and
    neither does an order that the seed draws.

    Args:
        slices: The rows of each stage, `(first, end)` in the order.
        num_rows: All rows.
        order: What the slices are of.
        pacing: Name of the rule.

    Raises:
        ConfigError: That is no stage at all.
    """
    rescored = [index > 0 and order == "rank" and tuple(part) != (0, num_rows) for index, part in enumerate(slices)]
    if not any(rescored):
        raise ConfigError(
            f"difficulty.rescore each_stage: with pacing {pacing} and a plan of {len(slices)} stages none after the "
            "first takes a part of the rows by rank, so nothing would be scored again; set it to never, or raise "
            "curriculum.num_buckets or change curriculum.pacing"
        )
    return rescored
