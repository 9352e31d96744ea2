"""What a scoring job has found, gathered on the driver as it comes: one number a row and signal, and nothing else.

A million rows of nine signals are 72 MB here. Tables of the same kept until the end, then cut by set and sorted, would
be several times that, and as many objects as there were micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pocl_ray.difficulty.units import SET, SHARD
from pocl_ray.records import ID, RowsSummary


class Results:
    """The results of one set, by id.

    Attributes:
        rows: The set.
        num_results: Those that came.
        shards: Of the teacher cache, that hold the set.
    """

    def __init__(self, rows: RowsSummary, keeps_signals: bool = True) -> None:
        """Begin with none; `keeps_signals` is False for a set of which only the shards matter."""
        self.rows, self.num_results = rows, 0
        self.shards: set[str] = set()
        self._keeps_signals = keeps_signals
        self._has_come = np.zeros(rows.num_rows, dtype=bool)
        self._columns: dict[str, np.ndarray[Any, Any]] = {}
        self._types: dict[str, pa.DataType] = {}

    def add(self, table: pa.Table) -> None:
        """Take rows of the set in any order: `id`, `shard`, and numeric columns that are null for all rows or none."""
        ids = table[ID].to_numpy()
        self._has_come[ids] = True
        self.num_results += len(ids)
        self.shards.update(table[SHARD].unique().drop_null().to_pylist())
        if self._keeps_signals:
            for name in table.column_names:
                if name not in (ID, SET, SHARD):
                    self._fill(name, ids, table[name])

    def _fill(self, name: str, ids: np.ndarray[Any, Any], values: pa.ChunkedArray) -> None:
        self._types.setdefault(name, values.type)
        assert values.null_count in (0, len(values)), f"{name} is measured for some rows only"
        if values.null_count == 0:
            if name not in self._columns:
                self._columns[name] = np.zeros(self.rows.num_rows, values.type.to_pandas_dtype())
            self._columns[name][ids] = values.to_numpy()

    def check(self) -> None:
        """Check that each row came exactly once: a lost one would shift the rank of all others in silence."""
        num_rows = self.rows.num_rows
        if self.num_results != num_rows or not self._has_come.all():
            missing = np.flatnonzero(~self._has_come)[:5].tolist()
            raise RuntimeError(
                f"scoring gave {self.num_results} results for {num_rows} rows of {self.rows.name}; missing: {missing}"
            )

    def table(self) -> pa.Table:
        """Return one row for each of the set, in order of id; it shares the memory of what was gathered."""
        self.check()
        columns = {ID: pa.array(np.arange(self.rows.num_rows))}
        for name, kind in self._types.items():
            values = self._columns.get(name)
            columns[name] = pa.nulls(self.rows.num_rows, kind) if values is None else pa.array(values)
        return pa.table(columns)


def gather(tables: Iterable[pa.Table], results: dict[str, Results]) -> None:
    """Hand tables of results to their sets, by column `set`, and check that each set is whole."""
    for table in tables:
        for name in table[SET].unique().to_pylist():
            results[name].add(table.filter(pc.field(SET) == name))
    for made in results.values():
        made.check()
