"""How rows are shared out for scoring: by their lengths alone, so that nothing depends on who does which part.

numpy alone: the Ray Data job and the training workers, which score again between stages, cut the rows in one way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MIN_TASKS = 16  # so that a small data set still keeps several actors busy to the end
_MIN_TASK_ROWS = 32
_MIN_FILL = 0.75  # of its width that each row of a micro-batch fills,
_MIN_BATCH_ROWS = 4  # beyond its first few rows
_LENGTH_MULTIPLE = 8  # that `collate` rounds up to

MicroBatches = list[npt.NDArray[np.int64]]
"""The work of one task: the row ids of each micro-batch."""


def plan_tasks(
    prompt_lengths: npt.NDArray[np.integer],
    response_lengths: npt.NDArray[np.integer],
    shard_rows: int,
    batch_tokens: int,
) -> list[MicroBatches]:
    """Cut rows into tasks, and these into micro-batches of rows of similar length.

    Args:
        prompt_lengths: Tokens of each prompt, shape (num_rows,).
        response_lengths: Tokens of each response, shape (num_rows,).
        shard_rows: Rows of a task, at most; fewer where there would be only a few tasks.
        batch_tokens: Padded tokens of a micro-batch, at most, save for a single row that is longer.

    Returns:
        Tasks, the longest rows first, so that the last ones to finish are short: micro-batches of row ids.
    """
    lengths = np.asarray(prompt_lengths, dtype=np.int64) + response_lengths
    order = np.argsort(-lengths, kind="stable")
    task_rows = min(shard_rows, max(_MIN_TASK_ROWS, -(-len(order) // _MIN_TASKS)))
    starts = range(0, len(order), task_rows)
    return [_micro_batches(order[start : start + task_rows], lengths, batch_tokens) for start in starts]


def _micro_batches(ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_tokens: int) -> MicroBatches:
    """Cut rows, longest first, where the padded size would pass the budget or padding would become a large share."""
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
