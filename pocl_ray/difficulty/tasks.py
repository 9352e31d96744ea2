"""The tasks of scoring: the division of rows, and the tables in which tasks and their results pass from actor to actor.

Rows are divided by length alone, so that results do not depend on the number of actors. The Ray Data job, and the
training workers that score again between stages, divide the rows in the same way. A table has one row for each
micro-batch up to the teacher, and one for each row after it. Axes: N response tokens of a unit in one flat axis, R its
rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pocl_ray.records import ID, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS

_MIN_TASKS = 16  # keeps several actors busy to the end on a small data set
_MIN_TASK_ROWS = 32
_MIN_FILL = 0.75  # of its width that each row of a micro-batch fills,
_MIN_BATCH_ROWS = 4  # beyond its first few rows
_LENGTH_MULTIPLE = 8  # that `collate` rounds up to

SET = "set"
IDS = "ids"
SHARD = "shard"
ANSWER_STOPPED = "answer_stopped"
STUDENT_COLUMNS = {
    "rouge_l": pa.float64(),
    ANSWER_STOPPED: pa.bool_(),
    "ce_loss": pa.float64(),
    "student_confidence": pa.float64(),
}
STUDENT_HIDDEN = "student_hidden"
STUDENT_DTYPE = "student_dtype"

IntArray = npt.NDArray[np.int64]
Lengths = tuple[IntArray, IntArray]
"""The number of tokens of each prompt and of each response, both of shape (R,)."""
MicroBatches = list[IntArray]
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


def _micro_batches(ids: IntArray, lengths: IntArray, batch_tokens: int) -> MicroBatches:
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


def with_place(table: pa.Table, name: str, shard: str | None) -> pa.Table:
    """Return rows with two more columns: their set, and the shard of the cache that holds them."""
    table = table.append_column(SET, pa.array([name] * table.num_rows, pa.string()))
    return table.append_column(SHARD, pa.array([shard] * table.num_rows, pa.string()))


def unit_table(name: str, batches: Sequence[IntArray]) -> pa.Table:
    """Return the input of one task: the set, and the row ids of each micro-batch."""
    ends = np.cumsum([0, *map(len, batches)], dtype=np.int32)
    ids = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(batches)))
    return pa.table({SET: pa.array([name] * len(batches), pa.string()), IDS: ids})


def unscored_units(name: str, batches: Sequence[IntArray]) -> pa.Table:
    """Return the input of one task of a `TeacherActor` in a job without a student."""
    return pa.concat_tables(student_unit(name, ids, None, None) for ids in batches)


def ids_of(units: pa.Table) -> list[IntArray]:
    """Return the row ids of each unit."""
    return [np.array(ids, dtype=np.int64) for ids in units[IDS].to_pylist()]


def student_unit(
    name: str, ids: IntArray, by_row: Mapping[str, Any] | None, hidden_NH: torch.Tensor | None
) -> pa.Table:
    """Return a unit as the teacher's actor receives it.

    Args:
        name: Name of the set.
        ids: Row ids of the unit.
        by_row: Student's signals by name; None if the student did not read the unit.
        hidden_NH: Student's hidden states, if signals compare the two models.
    """
    table = unit_table(name, [ids])
    for column, value_type in STUDENT_COLUMNS.items():
        values = list(by_row[column]) if by_row is not None and column in by_row else None
        table = table.append_column(column, pa.array([values], pa.list_(value_type)))
    payload = None if hidden_NH is None else hidden_NH.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    dtype = None if hidden_NH is None else str(hidden_NH.dtype).removeprefix("torch.")
    table = table.append_column(STUDENT_HIDDEN, pa.array([payload], pa.large_binary()))
    return table.append_column(STUDENT_DTYPE, pa.array([dtype], pa.string()))


def row_table(
    ids: IntArray,
    lengths: Lengths,
    signals: Mapping[str, npt.NDArray[np.float64]],
    units: pa.Table,
    index: int,
    names: Sequence[str],
) -> pa.Table:
    """Return a table with one row for each row id of a unit.

    Args:
        ids: Row ids of the unit.
        lengths: Lengths in the student's tokens.
        signals: Signals that the teacher measured.
        units: Table of units, with the student's signals.
        index: Place of the unit in that table.
        names: Columns of the teacher's signals; a signal that was not measured is null.
    """
    columns = {ID: pa.array(ids)}
    for name, value_type in STUDENT_COLUMNS.items():
        values = units[name][index]
        columns[name] = values.values if values.is_valid else pa.nulls(len(ids), value_type)
    for name in names:
        values = signals.get(name)
        columns[name] = pa.nulls(len(ids), pa.float64()) if values is None else pa.array(values)
    columns[NUM_PROMPT_TOKENS], columns[NUM_RESPONSE_TOKENS] = map(pa.array, lengths)
    return pa.table(columns)
