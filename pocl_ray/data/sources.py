"""The sources of rows: one stream of rows and rejects, whatever the source is.

Files (JSONL, JSON arrays, CSV, Parquet; single, in a folder, or by glob; local or on an object store), saved `datasets`
directories, data sets of the Hugging Face Hub, and the rows that the project ships (`samples://instructions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.columns import wanted_columns
from pocl_ray.data.readers import (
    Location,
    Reject,
    SourceFile,
    SourceRow,
    Wanted,
    ending_of,
    first_line,
    locate,
    read_all,
    read_file,
)
from pocl_ray.errors import DataError
from pocl_ray.run_directory.digests import file_digest, fingerprint
from pocl_ray.run_directory.paths import is_remote
from pocl_ray.run_directory.storage import localize

_BATCH_ROWS = 1024
# Errors that decoders of features raise; an ImportError if the library for audio or images is not installed.
_UNREADABLE = (OSError, ValueError, OverflowError, RuntimeError, TypeError, ImportError, pa.ArrowException)


def read_source(
    source: SourceConfig, default_split: str = "train", wanted: Wanted = read_all
) -> Iterator[SourceRow | Reject]:
    """Return the stream of a source's rows.

    Args:
        source: Source of the rows.
        default_split: Split of the shipped samples, if `source.split` is not given.
        wanted: Function that returns the columns to read; the others are not decoded.

    Returns:
        Iterator over the first `max_rows` rows in the order of the source: a `SourceRow` for each, or a `Reject` if it
        cannot be read.

    Raises:
        DataError: The source is missing, of unknown format, without the split or empty (the last while iterating).
    """
    location = locate(source)
    rows = _stream(source, location, default_split, wanted)
    return _refuse_empty(source, islice(rows, source.max_rows))


def default_split(name: str) -> str:
    """Return the split of the shipped samples for a set of this name, if the config names none."""
    return name if name in ("train", "dev") else "test"


def count_rows(config: DataConfig) -> int:
    """Return the number of readable training rows, without a tokenizer; a few may turn out unusable later."""
    wanted = wanted_columns(config.train.columns, config.task)
    total = sum(1 for row in read_source(config.train, default_split("train"), wanted) if not isinstance(row, Reject))
    return total - config.holdout_rows


def source_fingerprint(source: SourceConfig, default_split: str = "train") -> str:
    """Return a digest of everything that the rows of a source depend on, without parsing them.

    Local files count by content, so a moved file keeps its digest. Remote files count by URL, size and modification
    time. A Hub data set counts by id and revision, so changes of an unpinned data set are not noticed.

    Raises:
        DataError: The source is missing, or its format is unclear.
    """
    location = locate(source)
    settings = source.model_dump(mode="json", exclude={"path", "format"})
    return fingerprint([location.format, settings, _content_state(source, location, default_split)])


def _stream(
    source: SourceConfig, location: Location, default_split: str, wanted: Wanted
) -> Iterator[SourceRow | Reject]:
    if location.format == "samples":
        rows = _sample_rows(source, location, default_split)
        return (SourceRow(source.path, number, values) for number, values in enumerate(rows, start=1))
    if location.format == "hub":
        return _dataset_rows(source.path, _load_from_hub(source), wanted)
    if location.format == "dataset":
        return _dataset_rows(source.path, _load_saved(source), wanted)
    return chain.from_iterable(read_file(file, wanted) for file in location.files)


def _refuse_empty(source: SourceConfig, rows: Iterator[SourceRow | Reject]) -> Iterator[SourceRow | Reject]:
    row = next(rows, None)
    if row is None:
        raise DataError(f"{source.path}: holds no rows")
    yield row
    yield from rows


def _sample_rows(source: SourceConfig, location: Location, default_split: str) -> list[dict[str, Any]]:
    from pocl_ray.data.samples import sample_rows  # rows are built on import, so import only if needed

    return sample_rows(location.path, source.split or default_split)


def _dataset_rows(name: str, dataset: Any, wanted: Wanted) -> Iterator[SourceRow | Reject]:
    """The rows of a data set; columns that are not wanted, such as audio and images, are not decoded."""
    chosen = [column for column in dataset.column_names if column in wanted(dataset.column_names)]
    others = tuple(column for column in dataset.column_names if column not in chosen)
    plain, number = dataset.with_format(None).select_columns(chosen), 0
    for start in range(0, len(dataset), _BATCH_ROWS):
        ids = range(start, min(start + _BATCH_ROWS, len(dataset)))
        for values in _values(plain, ids) if chosen else ({} for _ in ids):
            number += 1
            if isinstance(values, str):
                yield Reject(name, number, values)
            else:
                yield SourceRow(name, number, values, others)


def _values(dataset: Any, ids: range) -> Iterator[dict[str, Any] | str]:
    """The values of some rows, or the reason for a row that cannot be decoded."""
    try:
        batch = dataset[ids.start : ids.stop]
    except _UNREADABLE as error:
        if len(ids) == 1:
            yield f"cannot be decoded ({first_line(error)})"
            return
        for row in ids:
            yield from _values(dataset, range(row, row + 1))
        return
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _load_saved(source: SourceConfig) -> Any:
    import datasets  # the import takes more than a second, and most sources are files

    try:
        loaded = datasets.load_from_disk(localize(source.path))
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path}: not a readable `datasets` directory ({first_line(error)})") from None
    return _choose_split(source, loaded)


def _load_from_hub(source: SourceConfig) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, name=source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source.path}: cannot be loaded from the Hub ({first_line(error)}); check id, subset, split and network, "
            "or give a local file"
        ) from None
    return loaded if source.split else _choose_split(source, loaded)


def _choose_split(source: SourceConfig, loaded: Any) -> Any:
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        if source.split is None or str(loaded.split) == source.split:
            return loaded
        raise DataError(f"{source.path}: has no splits; leave out split {source.split!r}")
    if source.split in loaded:
        return loaded[source.split]
    if source.split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    missing = "needs `split`" if source.split is None else f"has no split {source.split!r}"
    raise DataError(f"{source.path}: {missing}; there are {', '.join(loaded)}")


def _content_state(source: SourceConfig, location: Location, default_split: str) -> list[Any]:
    if location.format == "samples":
        return [_sample_rows(source, location, default_split)]
    if location.format == "hub":
        return [source.path]
    if location.format == "dataset":
        folder = Path(localize(source.path))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [[path.relative_to(folder).as_posix(), file_digest(path)] for path in files]
    return [_file_state(file) for file in location.files]


def _file_state(file: SourceFile) -> list[Any]:
    if is_remote(file.uri):
        info = file.filesystem.get_file_info(file.path)
        return [file.uri, info.size, str(info.mtime)]
    try:
        return [ending_of(file.path), file_digest(Path(file.path))]
    except OSError as error:
        raise DataError(f"{file.uri}: cannot be read ({error.strerror})") from None
