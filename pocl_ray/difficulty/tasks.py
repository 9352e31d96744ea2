"""The division of rows into scoring tasks: by length alone, so that results do not depend on the number of actors.

This file needs numpy alone. The Ray Data job, and the training workers that score again between stages, divide the rows
in the same way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MIN_TASKS = 16  # keeps several actors busy to the end on a small data set
_MIN_TASK_ROWS = 32
_MIN_FILL = 0.75  # of its width that each row of a micro-batch fills,
_MIN_BATCH_ROWS = 4  # beyond its first few rows
_LENGTH_MULTIPLE = 8  # that `collate` rounds up to

MicroBatches = list[npt.NDArray[np.int64]]
"""The row ids of each micro-batch of a task."""


def plan_tasks(
    prompt_lengths: npt.NDArray[np.integer],
    response_lengths: npt.NDArray[np.integer],
    shard_rows: int,
    batch_tokens: int,
) -> list[MicroBatches]:
    """Return tasks, each of which is a list of micro-batches of rows of similar length.

    Args:
        prompt_lengths: Number of tokens of each prompt, shape (num_rows,).
        response_lengths: Number of tokens of each response, shape (num_rows,).
        shard_rows: Maximum rows of a task; fewer if there would be only a few tasks.
        batch_tokens: Maximum padded tokens of a micro-batch; a single row may be longer.

    Returns:
        Tasks with the longest rows first, so that the last tasks to finish are short.
    """
    lengths = np.asarray(prompt_lengths, dtype=np.int64) + response_lengths
    order = np.argsort(-lengths, kind="stable")
    task_rows = min(shard_rows, max(_MIN_TASK_ROWS, -(-len(order) // _MIN_TASKS)))
    starts = range(0, len(order), task_rows)
    return [_micro_batches(order[start : start + task_rows], lengths, batch_tokens) for start in starts]


def _micro_batches(ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_tokens: int) -> MicroBatches:
    """Cut rows, the longest first, where the padded size would exceed the budget or padding grows too large."""
    batches: MicroBatches = []
    start = 0
    while start < len(ids):
        longest = int(lengths[ids[start]])
        width = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        fitting = ids[start : start + max(1, batch_tokens // width)]
        num_alike = int(np.count_nonzero(lengths[fitting] >= _MIN_FILL * longest))
        batches.append(fitting[: max(_MIN_BATCH_ROWS, num_alike)])
        start += len(batches[-1])
    return batches
