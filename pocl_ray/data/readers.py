"""Readers of files with rows, one row at a time: JSONL, JSON arrays, CSV, Parquet.

A row that cannot be read becomes a `Reject` with its number, and reading goes on. Only a fault of the whole file is an
error, such as a file that is not Parquet, or a quote that is never closed.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pocl_ray.config.sources import SourceConfig
from pocl_ray.errors import DataError
from pocl_ray.run_directory.paths import is_remote
from pocl_ray.run_directory.storage import resolve

Format = Literal["jsonl", "parquet", "csv", "dataset", "hub", "samples"]
FileFormat = Literal["jsonl", "parquet", "csv"]

MAX_FIELD_CHARS = 2**31 - 1
"""Longest field of a CSV file, in characters; Python's own limit is 131,072."""
_UNREADABLE = (UnicodeDecodeError, OverflowError, ValueError, pa.ArrowException)
SAMPLES_SCHEME = "samples://"
_FORMAT_OF_ENDING: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_SAVED_DATASET_MARKS = ("dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_GLOB_SIGN = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")
_GLOB_MEANING = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
_MAX_NEAR_NAMES = 5


@dataclass(frozen=True)
class SourceFile:
    """One file of rows.

    Attributes:
        uri: Local path or URL, for messages.
        format: Format of the file.
        filesystem: Filesystem of the file.
        path: Path on that filesystem.
    """

    uri: str
    format: FileFormat
    filesystem: pafs.FileSystem
    path: str

    def open(self) -> pa.NativeFile:
        """Return the opened file, decompressed according to its ending."""
        return self.filesystem.open_input_stream(self.path)


@dataclass(frozen=True)
class Location:
    """The place of a source's rows; `files` is empty unless `format` is a file format."""

    format: Format
    path: str
    files: tuple[SourceFile, ...] = ()


def ending_of(path: str) -> str:
    """Return the ending that gives the format, in lower case: `.jsonl` for `rows.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def locate(source: SourceConfig) -> Location:
    """Return the place of a source's rows, without reading rows.

    An existing path is a file or folder, and only otherwise a glob or a Hub id. A folder is a saved `datasets`
    directory, or holds part files of one format (as Spark and Ray write them).

    Raises:
        DataError: Nothing is there (the message gives similar names of the folder), or the format is unclear.
        StorageError: The object store cannot be reached.
    """
    try:
        return _locate(source)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be looked up ({first_line(error)})") from None


def _locate(source: SourceConfig) -> Location:
    path = source.path
    if source.format == "samples" or path.startswith(SAMPLES_SCHEME):
        return Location("samples", path.removeprefix(SAMPLES_SCHEME))
    if source.format == "hub":
        return Location("hub", path)
    filesystem, fs_path = resolve(path)
    kind = filesystem.get_file_info(fs_path).type
    if kind == pafs.FileType.Directory:
        return _locate_folder(source, filesystem, fs_path)
    if source.format == "dataset":
        raise DataError(f"{path}: no such saved `datasets` directory{_near_names(filesystem, fs_path)}")
    if kind == pafs.FileType.File:
        return _files(source, [SourceFile(path, _file_format(source, path), filesystem, fs_path)])
    if any(sign in fs_path for sign in "*?["):
        return _locate_glob(source, filesystem, fs_path)
    if _may_be_hub_id(path, filesystem, fs_path):
        return Location("hub", path)
    raise DataError(f"{path}: no such file{_near_names(filesystem, fs_path)}")


def _files(source: SourceConfig, files: list[SourceFile]) -> Location:
    formats = sorted({file.format for file in files})
    if len(formats) > 1:
        raise DataError(f"{source.path}: holds files of several formats ({', '.join(formats)}); give a narrower glob")
    return Location(formats[0], source.path, tuple(files))


def _file_format(source: SourceConfig, name: str) -> FileFormat:
    if source.format in ("jsonl", "parquet", "csv"):
        return source.format
    found = _FORMAT_OF_ENDING.get(ending_of(name))
    if found is None:
        raise DataError(
            f"{name}: its ending does not tell the format (known: {', '.join(_FORMAT_OF_ENDING)}); "
            "set `format` to jsonl, parquet or csv"
        )
    return found


def _locate_folder(source: SourceConfig, filesystem: pafs.FileSystem, fs_path: str) -> Location:
    infos = _files_below(filesystem, fs_path, recursive=False)
    saved = any(info.base_name in _SAVED_DATASET_MARKS for info in infos)
    if saved and source.format in ("auto", "dataset"):
        return Location("dataset", source.path)
    if source.format == "dataset":
        raise DataError(f"{source.path}: is not a saved `datasets` directory (no {' or '.join(_SAVED_DATASET_MARKS)})")
    parts = [i for i in infos if ending_of(i.base_name) in _FORMAT_OF_ENDING and i.base_name[0] not in "._"]
    if not parts:
        raise DataError(f"{source.path}: a folder without files of rows ({', '.join(_FORMAT_OF_ENDING)})")
    return _files(source, [_source_file(source, filesystem, info) for info in parts])


def _locate_glob(source: SourceConfig, filesystem: pafs.FileSystem, fs_path: str) -> Location:
    fixed = re.split(r"[*?\[]", fs_path, maxsplit=1)[0].rpartition("/")[0]
    pattern = _glob_pattern(fs_path)
    infos = _files_below(filesystem, fixed or "/", recursive=True)
    matches = [info for info in infos if pattern.fullmatch(info.path)]
    if not matches:
        raise DataError(f"{source.path}: no file matches{_near_names(filesystem, fs_path)}")
    return _files(source, [_source_file(source, filesystem, info) for info in matches])


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """The pattern of a glob: `*` and `?` match within a folder, `**/` matches any number of folders."""
    parts, end = [], 0
    for sign in _GLOB_SIGN.finditer(glob):
        parts.append(re.escape(glob[end : sign.start()]))
        text = sign.group()
        if text.startswith("["):
            negated = text.startswith("[!")
            parts.append(f"[{'^' if negated else ''}{text[1 + negated : -1]}]".replace("\\", "\\\\"))
        else:
            parts.append(_GLOB_MEANING[text])
        end = sign.end()
    return re.compile("".join(parts) + re.escape(glob[end:]), re.DOTALL)


def _source_file(source: SourceConfig, filesystem: pafs.FileSystem, info: pafs.FileInfo) -> SourceFile:
    # Files of a URL are named by URL, files of a local path by path.
    prefix = source.path.partition("://")[0] + "://" if is_remote(source.path) else ""
    return SourceFile(prefix + info.path, _file_format(source, info.path), filesystem, info.path)


def _files_below(filesystem: pafs.FileSystem, folder: str, recursive: bool) -> list[pafs.FileInfo]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=recursive))
    return sorted((info for info in infos if info.type == pafs.FileType.File), key=lambda info: info.path)


def _may_be_hub_id(path: str, filesystem: pafs.FileSystem, fs_path: str) -> bool:
    """Return whether a path may be `owner/name` on the Hub, and not a folder or a file name."""
    if is_remote(path) or not _HUB_ID.fullmatch(path) or ending_of(path) in _FORMAT_OF_ENDING:
        return False
    parent = fs_path.rpartition("/")[0]
    return filesystem.get_file_info(parent).type != pafs.FileType.Directory


def _near_names(filesystem: pafs.FileSystem, fs_path: str) -> str:
    """The end of a message: the most similar names in the folder, or that the folder is missing."""
    folder, _, name = fs_path.rpartition("/")
    if filesystem.get_file_info(folder).type != pafs.FileType.Directory:
        return f" (there is no folder {folder} either)"
    names = sorted(info.base_name for info in filesystem.get_file_info(pafs.FileSelector(folder)))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    shown = [name for name in names if ending_of(name) in _FORMAT_OF_ENDING][:_MAX_NEAR_NAMES]
    return f"; the folder holds {', '.join(shown)}" if shown else ""


_BATCH_ROWS = 1024


@dataclass(frozen=True)
class SourceRow:
    """A row of a source.

    Attributes:
        source: File, folder or id that the row comes from.
        row: Number of the row there, from 1: the line of a JSONL file, or else the position of the row (a CSV's header
            does not count).
        values: Column name to value, of the columns that are wanted.
        others: Names of the other columns.
    """

    source: str
    row: int
    values: dict[str, Any]
    others: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return [*self.values, *self.others]


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, in the form of rejects.jsonl; `source` and `row` are as in `SourceRow`."""

    source: str
    row: int
    reason: str


Wanted = Callable[[Collection[str]], Collection[str]]
"""A function from the columns of a file to those that are read."""


def read_all(found: Collection[str]) -> Collection[str]:
    """Want every column."""
    return found


def read_file(file: SourceFile, wanted: Wanted = read_all) -> Iterator[SourceRow | Reject]:
    """Yield the rows of one file.

    Args:
        file: File to read.
        wanted: Function that returns the columns to read. The content of the others makes no row unusable: times out of
            Python's range, bytes that are not text.

    Yields:
        Each row in the order of the file: a `SourceRow`, or a `Reject` if the row cannot be read.

    Raises:
        DataError: The file cannot be opened, or is broken as a whole.
    """
    try:
        yield from _READERS[file.format](file, wanted)
    except FileNotFoundError:
        raise DataError(f"{file.uri}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.uri}: cannot be read as {file.format} ({first_line(error)})") from None


def _read_jsonl(file: SourceFile, wanted: Wanted) -> Iterator[SourceRow | Reject]:
    with io.BufferedReader(file.open()) as lines:  # type: ignore[type-var]  # pyarrow's file is a raw one to io
        if ending_of(file.path) == ".json" and lines.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from _read_json_array(file, lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse_json_row(file.uri, number, line, wanted)


class DoubledKeyError(ValueError):
    """A JSON object that gives a key twice: which of the values is meant cannot be known."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise DoubledKeyError(f"the key {name!r} stands twice in one object")
    return values


def _parse_json_row(uri: str, number: int, line: bytes, wanted: Wanted) -> SourceRow | Reject:
    try:
        value, broken = json.loads(line.decode("utf-8"), object_pairs_hook=_unique), None
    except UnicodeDecodeError as error:
        try:
            text = line.decode("utf-8", errors="surrogateescape")
            value, broken = json.loads(text, object_pairs_hook=_unique), error
        except (ValueError, RecursionError):
            return Reject(uri, number, f"not UTF-8 (byte {error.start + 1} of the line)")
    except DoubledKeyError as error:
        return Reject(uri, number, str(error))
    except (ValueError, RecursionError) as error:
        return Reject(uri, number, f"not JSON ({error})")
    row = _object_row(uri, number, value)
    if broken is None or isinstance(row, Reject):
        return row
    chosen = {name: row.values[name] for name in wanted(row.values)}
    if not _is_text(json.dumps(chosen, ensure_ascii=False)):
        return Reject(uri, number, f"not UTF-8 (byte {broken.start + 1} of the line)")
    return SourceRow(uri, number, chosen, tuple(name for name in row.values if name not in chosen and _is_text(name)))


def _is_text(text: str) -> bool:
    """Whether a text has no bytes that were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _object_row(uri: str, number: int, value: Any) -> SourceRow | Reject:
    if isinstance(value, dict):
        return SourceRow(uri, number, value)
    return Reject(uri, number, f"not a JSON object but {type(value).__name__}")


def _read_json_array(file: SourceFile, content: bytes) -> Iterator[SourceRow | Reject]:
    try:
        values = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.uri}: not valid JSON ({error})") from None
    for number, value in enumerate(values, start=1):
        yield _object_row(file.uri, number, value)


def _read_csv(file: SourceFile, wanted: Wanted) -> Iterator[SourceRow | Reject]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    # Undecodable bytes become lone surrogates, so that one broken row does not stop the whole file.
    text = io.TextIOWrapper(file.open(), encoding="utf-8-sig", errors="surrogateescape", newline="")
    with text:
        records = csv.reader(text, delimiter="\t" if ending_of(file.path) == ".tsv" else ",", strict=True)
        header = _csv_header(file, records)
        chosen = [place for place, name in enumerate(header) if name in wanted(header)]
        number = 0
        while True:
            first_line = records.line_num + 1
            try:
                record = next(records, None)
            except csv.Error as error:
                if records.line_num > first_line:  # an unknown number of rows was swallowed
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
                yield _csv_row(file.uri, number, header, record, chosen)


def _csv_header(file: SourceFile, records: Iterator[list[str]]) -> list[str]:
    try:
        header = next(records, [])
    except csv.Error as error:
        raise DataError(f"{file.uri}: the header is not CSV ({error})") from None
    if any("\0" in name for name in header):
        raise DataError(f"{file.uri}: is UTF-16, as some tables are exported; save it as CSV in UTF-8")
    if len(set(header)) < len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise DataError(f"{file.uri}: the header names {', '.join(map(repr, twice))} more than once")
    return header


def _csv_row(uri: str, number: int, header: list[str], record: list[str], chosen: Sequence[int]) -> SourceRow | Reject:
    if len(record) != len(header):
        return Reject(uri, number, f"{len(record)} fields, but the header names {len(header)}")
    values = {header[place]: record[place] for place in chosen}
    if not _is_text("".join(values.values())):
        return Reject(uri, number, "not UTF-8")
    return SourceRow(uri, number, values, tuple(name for name in header if name not in values))


def _read_parquet(file: SourceFile, wanted: Wanted) -> Iterator[SourceRow | Reject]:
    with file.filesystem.open_input_file(file.path) as handle, pq.ParquetFile(handle) as parquet:
        names = parquet.schema_arrow.names
        chosen = [name for name in names if name in wanted(names)]
        if twice := sorted({name for name in chosen if chosen.count(name) > 1}):
            raise DataError(f"{file.uri}: has the column {', '.join(map(repr, twice))} more than once")
        others = tuple(name for name in names if name not in chosen)
        number = 0
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=chosen):
            for row in _batch_rows(file.uri, number, batch, others):
                number += 1
                yield row


def _batch_rows(uri: str, first: int, batch: pa.RecordBatch, others: tuple[str, ...]) -> Iterator[SourceRow | Reject]:
    try:
        values = batch.to_pylist()
    except _UNREADABLE:  # Parquet checks neither its text nor its times; find out which rows it is
        for offset in range(batch.num_rows):
            yield _single_row(uri, first + offset + 1, batch.slice(offset, 1), others)
        return
    for offset, value in enumerate(values if batch.num_columns else [{}] * batch.num_rows):
        yield SourceRow(uri, first + offset + 1, value, others)


def _single_row(uri: str, number: int, batch: pa.RecordBatch, others: tuple[str, ...]) -> SourceRow | Reject:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError:
            return Reject(uri, number, f"{name} is not UTF-8")
        except _UNREADABLE as error:
            return Reject(uri, number, f"{name} cannot be read ({first_line(error)})")
    return SourceRow(uri, number, values, others)


_READERS: dict[FileFormat, Callable[[SourceFile, Wanted], Iterator[SourceRow | Reject]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
