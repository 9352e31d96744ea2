"""Reading files of rows, one row at a time: JSONL, JSON arrays, CSV, Parquet.

A row that cannot be read becomes a `Reject` with its number, and reading goes on. Only what makes the whole file
doubtful (not Parquet at all, a quote that is never closed) is an error.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_ray.data.location import FileFormat, SourceFile, ending_of, first_line
from pocl_ray.errors import DataError

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class SourceRow:
    """A row as the source has it.

    Attributes:
        source: File, folder or id that it comes from.
        row: Its number there, from 1: the line of a JSONL file, else the position of the row (a CSV's header is none).
        values: Column name to value.
    """

    source: str
    row: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, as rejects.jsonl holds it; `source` and `row` as in `SourceRow`."""

    source: str
    row: int
    reason: str


def read_file(file: SourceFile) -> Iterator[SourceRow | Reject]:
    """Read the rows of one file.

    Args:
        file: What to read.

    Yields:
        Every row in the order of the file, as a `SourceRow` or, where it cannot be read, a `Reject`.

    Raises:
        DataError: The file cannot be opened, or is broken as a whole.
    """
    try:
        yield from _READERS[file.format](file)
    except FileNotFoundError:
        raise DataError(f"{file.uri}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.uri}: cannot be read as {file.format} ({first_line(error)})") from None


def _read_jsonl(file: SourceFile) -> Iterator[SourceRow | Reject]:
    with io.BufferedReader(file.open()) as lines:  # type: ignore[type-var]  # pyarrow's file is a raw one to io
        if ending_of(file.path) == ".json" and lines.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _read_json_array(file, lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse_json_row(file.uri, number, line)


def _parse_json_row(uri: str, number: int, line: bytes) -> SourceRow | Reject:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject(uri, number, f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return Reject(uri, number, f"not JSON ({error})")
    return _object_row(uri, number, value)


def _object_row(uri: str, number: int, value: Any) -> SourceRow | Reject:
    if isinstance(value, dict):
        return SourceRow(uri, number, value)
    return Reject(uri, number, f"not a JSON object but {type(value).__name__}")


def _read_json_array(file: SourceFile, content: bytes) -> Iterator[SourceRow | Reject]:
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.uri}: not valid JSON ({error})") from None
    for number, value in enumerate(values, start=1):
        yield _object_row(file.uri, number, value)


def _read_csv(file: SourceFile) -> Iterator[SourceRow | Reject]:
    # Undecodable bytes become lone surrogates, so that one broken row does not end the file.
    text = io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape", newline="")
    with text:
        records = csv.reader(text, delimiter="\t" if ending_of(file.path) == ".tsv" else ",", strict=True)
        header = _csv_header(file, records)
        number = 0
        while True:
            first_line = records.line_num + 1
            try:
                record = next(records, None)
            except csv.Error as error:
                if records.line_num > first_line:  # rows were swallowed: no telling how many
                    raise DataError(
                        f"{file.uri}: a quote opened in line {first_line} is not closed ({error})"
                    ) from None
                number += 1
                yield Reject(file.uri, number, f"not CSV (line {first_line}: {error})")
                continue
            if record is None:
                return
            if record:  # a blank line gives no fields
                number += 1
                yield _csv_row(file.uri, number, header, record)


def _csv_header(file: SourceFile, records: Iterator[list[str]]) -> list[str]:
    try:
        header = next(records, [])
    except csv.Error as error:
        raise DataError(f"{file.uri}: the header is not CSV ({error})") from None
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise DataError(f"{file.uri}: the header names {', '.join(map(repr, twice))} more than once")
    return header


def _csv_row(uri: str, number: int, header: list[str], record: list[str]) -> SourceRow | Reject:
    if len(record) != len(header):
        return Reject(uri, number, f"{len(record)} fields, but the header names {len(header)}")
    try:
        "".join(record).encode("utf-8")
    except UnicodeEncodeError:
        return Reject(uri, number, "not UTF-8")
    return SourceRow(uri, number, dict(zip(header, record, strict=True)))


def _read_parquet(file: SourceFile) -> Iterator[SourceRow | Reject]:
    with file.filesystem.open_input_file(file.path) as handle, pq.ParquetFile(handle) as parquet:
        number = 0
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
            for row in _batch_rows(file.uri, number, batch):
                number += 1
                yield row


def _batch_rows(uri: str, first: int, batch: pa.RecordBatch) -> Iterator[SourceRow | Reject]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check its text; find out which rows it is
        for offset in range(batch.num_rows):
            yield _single_row(uri, first + offset + 1, batch.slice(offset, 1))
        return
    for offset, value in enumerate(values):
        yield SourceRow(uri, first + offset + 1, value)


def _single_row(uri: str, number: int, batch: pa.RecordBatch) -> SourceRow | Reject:
    try:
        return SourceRow(uri, number, batch.to_pylist()[0])
    except UnicodeDecodeError:
        return Reject(uri, number, "not UTF-8")


_READERS: dict[FileFormat, Callable[[SourceFile], Iterator[SourceRow | Reject]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
