"""The rows of a source as examples, before any tokenizer: columns are told from the first rows, bad rows set aside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from pocl_ray.config.sources import ColumnRole, SourceConfig, Task
from pocl_ray.data.columns import Columns, UnusableRowError, check_numbers, resolve_columns
from pocl_ray.data.prompts import Example, Fit, PromptTemplate, read_example
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.data.sources import read_source
from pocl_ray.errors import DataError

CHUNK_ROWS = 2048


def read_examples(
    source: SourceConfig, template: PromptTemplate, default_split: str, task: Task = "instruction"
) -> Iterator[Example | Reject]:
    """Stream the rows of a source as examples.

    Args:
        source: Where the rows are, and what their columns mean.
        template: Makes the prompts.
        default_split: Split of the shipped samples, where the source names none.
        task: What rows are for.

    Yields:
        An `Example` for each usable row and a `Reject` for each other one, in order.

    Raises:
        DataError: The source is missing or empty, or lacks a column.
    """
    stream = read_source(source, default_split)
    reader = ExampleReader(source.columns, template, task=task)
    while chunk := list(islice(stream, CHUNK_ROWS)):
        yield from reader.read(chunk)


class ExampleReader:
    """Turns chunks of a source into examples; the first chunk that has columns decides what they mean.

    Args:
        mapping: Role to column, as far as the user gave it.
        template: Makes the prompts.
        numbers: Numeric columns that are carried along.
        task: What rows are for; decides which columns are looked for.
        fit: Shortens what a request is about, where its prompt would be too long; None: it is left as it is.
    """

    def __init__(
        self,
        mapping: Columns,
        template: PromptTemplate,
        numbers: Sequence[str] = (),
        task: Task = "instruction",
        fit: Fit | None = None,
    ) -> None:
        self._task: Task = task
        self._fit = fit
        self._mapping = mapping
        self._numbers = numbers
        self._template = template
        self._columns: dict[ColumnRole, str] | None = None

    def read(self, chunk: Sequence[SourceRow | Reject]) -> list[Example | Reject]:
        """Return an example or a reject for each row of the chunk.

        Raises:
            DataError: The columns needed are not there.
        """
        if self._columns is None:
            found = {column for item in chunk if isinstance(item, SourceRow) for column in item.values}
            if not found:  # nothing but unreadable rows so far
                return [_reject(item, "has no columns") for item in chunk]
            try:
                self._columns = resolve_columns(found, self._mapping, self._task)
                check_numbers(found, self._numbers)
            except DataError as error:
                raise DataError(
                    f"{next(item.source for item in chunk if isinstance(item, SourceRow))}: {error}"
                ) from None
        columns = self._columns
        return [item if isinstance(item, Reject) else self._read_row(item, columns) for item in chunk]

    def _read_row(self, row: SourceRow, columns: Columns) -> Example | Reject:
        try:
            return read_example(row, columns, self._template, self._numbers, self._fit)
        except UnusableRowError as unusable:
            return _reject(row, str(unusable))


def _reject(row: SourceRow | Reject, reason: str) -> Reject:
    return row if isinstance(row, Reject) else Reject(row.source, row.row, reason)
