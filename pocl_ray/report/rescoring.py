"""What ranking the rows anew between stages changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pocl_ray.records import PREVIOUS_RANK, RANK
from pocl_ray.report.difficulty import buckets_of, spearman
from pocl_ray.report.files import Plan


@dataclass(frozen=True)
class Reranked:
    """A ranking beside the one before it.

    Attributes:
        stage: The stage that it was made for.
        num_rows: All rows.
        num_moved: Rows that it puts into another bucket.
        num_replaced: Rows of the stage that the ranking before would not have put there.
        num_stage_rows: Rows of the stage.
        spearman: Rank correlation of the two.
    """

    stage: int
    num_rows: int
    num_moved: int
    num_replaced: int
    num_stage_rows: int
    spearman: float


def reranked(tables: Mapping[int, dict[str, np.ndarray]], plan: Plan) -> list[Reranked]:
    """Compare each ranking made between stages with the one before it."""
    found = []
    for index, table in sorted(tables.items()):
        now, before, stage = table[RANK], table[PREVIOUS_RANK], plan.stages[index]
        moved = buckets_of(now, plan.bucket_ends) != buckets_of(before, plan.bucket_ends)
        taken, was_taken = ((stage.first_rank < rank) & (rank <= stage.end_rank) for rank in (now, before))
        found.append(
            Reranked(
                stage=index,
                num_rows=len(now),
                num_moved=int(moved.sum()),
                num_replaced=int((taken & ~was_taken).sum()),
                num_stage_rows=stage.num_rows,
                spearman=float(spearman([now, before])[0, 1]),
            )
        )
    return found
