"""Where a source's rows lie and in which format: files, folders, globs, Hub ids, shipped samples."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pafs

from pocl_ray.config.sources import SourceConfig
from pocl_ray.errors import DataError
from pocl_ray.stores import is_remote, resolve

Format = Literal["jsonl", "parquet", "csv", "dataset", "hub", "samples"]
FileFormat = Literal["jsonl", "parquet", "csv"]

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
        uri: Local path or URL, as messages name it.
        format: How it is read.
        filesystem: Where it lies.
        path: Its path on `filesystem`.
    """

    uri: str
    format: FileFormat
    filesystem: pafs.FileSystem
    path: str

    def open(self) -> pa.NativeFile:
        """Open the file for reading from the front, decompressed as its ending says."""
        return self.filesystem.open_input_stream(self.path)


@dataclass(frozen=True)
class Location:
    """Where the rows of a source lie; `files` is empty unless `format` is that of a file."""

    format: Format
    path: str
    files: tuple[SourceFile, ...] = ()


def ending_of(path: str) -> str:
    """Return the ending that tells the format, in lower case: `.jsonl` for `rows.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def locate(source: SourceConfig) -> Location:
    """Find out what `source.path` is, without reading rows.

    A path that exists is taken as a file or folder, before it is taken as a glob or a Hub id. A folder is a saved
    `datasets` directory, or the part files of one format (as Spark and Ray write them).

    Raises:
        DataError: Nothing is there (near names of the same folder are given), or the format cannot be told.
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
    return _files(source, [_source_file(source, filesystem, fs_path, info) for info in parts])


def _locate_glob(source: SourceConfig, filesystem: pafs.FileSystem, fs_path: str) -> Location:
    fixed = re.split(r"[*?\[]", fs_path, maxsplit=1)[0].rpartition("/")[0]
    pattern = _glob_pattern(fs_path)
    infos = _files_below(filesystem, fixed or "/", recursive=True)
    matches = [info for info in infos if pattern.fullmatch(info.path)]
    if not matches:
        raise DataError(f"{source.path}: no file matches{_near_names(filesystem, fs_path)}")
    return _files(source, [_source_file(source, filesystem, fs_path, info) for info in matches])


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """Translate a glob: `*` and `?` stay within a folder, `**/` spans any number of folders."""
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


def _source_file(source: SourceConfig, filesystem: pafs.FileSystem, fs_path: str, info: pafs.FileInfo) -> SourceFile:
    # A URL names its files by URL; a local path by path.
    prefix = source.path.partition("://")[0] + "://" if is_remote(source.path) else ""
    return SourceFile(prefix + info.path, _file_format(source, info.path), filesystem, info.path)


def _files_below(filesystem: pafs.FileSystem, folder: str, recursive: bool) -> list[pafs.FileInfo]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=recursive))
    return sorted((info for info in infos if info.type == pafs.FileType.File), key=lambda info: info.path)


def _may_be_hub_id(path: str, filesystem: pafs.FileSystem, fs_path: str) -> bool:
    """`owner/name`, unless `owner` is a folder here or `name` ends like a file: then it is a misspelt path."""
    if is_remote(path) or not _HUB_ID.fullmatch(path) or ending_of(path) in _FORMAT_OF_ENDING:
        return False
    parent = fs_path.rpartition("/")[0]
    return filesystem.get_file_info(parent).type != pafs.FileType.Directory


def _near_names(filesystem: pafs.FileSystem, fs_path: str) -> str:
    """Say which names of the same folder come nearest, or that the folder is missing."""
    folder, _, name = fs_path.rpartition("/")
    if filesystem.get_file_info(folder).type != pafs.FileType.Directory:
        return f" (there is no folder {folder} either)"
    names = sorted(info.base_name for info in filesystem.get_file_info(pafs.FileSelector(folder)))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    shown = [name for name in names if ending_of(name) in _FORMAT_OF_ENDING][:_MAX_NEAR_NAMES]
    return f"; the folder holds {', '.join(shown)}" if shown else ""
