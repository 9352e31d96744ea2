"""What passes through the scoring job: micro-batches of row ids with what the student measured, and a row each behind.

Axes: N response tokens of a unit in one flat axis, R its rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pocl_ray.difficulty.signals import Signals
from pocl_ray.records import ID, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS

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
"""Tokens of each prompt and of each response, both of shape (R,)."""


def with_place(table: pa.Table, name: str, shard: str | None) -> pa.Table:
    """Return rows with the set that they are of, and the shard of the cache that they are in."""
    table = table.append_column(SET, pa.array([name] * table.num_rows, pa.string()))
    return table.append_column(SHARD, pa.array([shard] * table.num_rows, pa.string()))


def unit_table(name: str, batches: Sequence[IntArray]) -> pa.Table:
    """Return the input of one task: the set and the row ids of each of its micro-batches."""
    ends = np.cumsum([0, *map(len, batches)], dtype=np.int32)
    ids = pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(batches)))
    return pa.table({SET: pa.array([name] * len(batches), pa.string()), IDS: ids})


def unscored_units(name: str, batches: Sequence[IntArray]) -> pa.Table:
    """Return the input of one task of a `TeacherActor` that no student comes before."""
    return pa.concat_tables(student_unit(name, ids, None, None) for ids in batches)


def ids_of(units: pa.Table) -> list[IntArray]:
    """Return the row ids of each unit."""
    return [np.array(ids, dtype=np.int64) for ids in units[IDS].to_pylist()]


def student_unit(
    name: str, ids: IntArray, by_row: Mapping[str, Any] | None, hidden_NH: torch.Tensor | None
) -> pa.Table:
    """Return a unit as it goes to the teacher.

    Args:
        name: The set.
        ids: Its rows.
        by_row: The student's signals, by name; None where the student did not read it.
        hidden_NH: The student's hidden states, where signals compare the two models.
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
    ids: IntArray, lengths: Lengths, signals: Signals, units: pa.Table, index: int, names: Sequence[str]
) -> pa.Table:
    """Return a row for each row id of a unit.

    Args:
        ids: The rows.
        lengths: In the student's tokens.
        signals: What the teacher measured.
        units: The table of the unit, with what the student measured.
        index: Its place there.
        names: Columns for the teacher's signals; null where one was not measured.
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
