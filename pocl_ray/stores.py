"""Stores: the filesystem that a path or URL lies on, and whether we may use it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pyarrow.fs as pafs

from pocl_ray.errors import StorageError


def is_remote(path: str) -> bool:
    """Whether the path names an object store rather than a local file."""
    return "://" in path and not path.startswith("file://")


def check_lasts(storage_path: str) -> None:
    """Refuse a storage path inside a Ray job's copy of the working directory, which Ray deletes after the job.

    Raises:
        StorageError: It is relative.
    """
    if not is_remote(storage_path) and not Path(storage_path.removeprefix("file://")).expanduser().is_absolute():
        raise StorageError(
            f"storage_path: {storage_path} is relative, and a job's working directory is deleted after it; give "
            "s3://bucket/runs or the absolute path of a disk that all nodes share"
        )


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or URL, and the path on it.

    Raises:
        StorageError: The scheme is unknown, or the store cannot be reached.
    """
    if not is_remote(path):
        return pafs.LocalFileSystem(), str(Path(path.removeprefix("file://")).expanduser().absolute())
    try:
        return _open_remote(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be opened ({reason(error)})") from None


@lru_cache(maxsize=256)
def _open_remote(url: str) -> tuple[pafs.FileSystem, str]:
    """Open a store once: pyarrow asks S3 for the bucket's region each time."""
    filesystem, path = pafs.FileSystem.from_uri(url)
    return filesystem, path


def check_bucket(storage_path: str) -> None:
    """Refuse an object store whose bucket is missing or closed to us, before anything is computed.

    Raises:
        StorageError: With the bucket and the reason.
    """
    filesystem, path = resolve(storage_path)
    if not isinstance(filesystem, (pafs.S3FileSystem, pafs.GcsFileSystem)):
        return
    bucket = path.partition("/")[0]
    url = f"{storage_path.partition('://')[0]}://{bucket}"
    try:
        kind = filesystem.get_file_info(bucket).type
    except OSError as error:
        raise StorageError(
            f"{url}: cannot be used ({reason(error)}); check its name, your credentials and this machine's clock"
        ) from None
    if kind == pafs.FileType.NotFound:
        raise StorageError(f"{url}: there is no such bucket; create it, or set storage_path elsewhere")


def clock_is_off(error: BaseException) -> bool:
    """Whether a store refused a request because of the time on it."""
    return any(sign in str(error) for sign in ("REQUEST_TIME_TOO_SKEWED", "RequestTimeTooSkewed"))


def reason(error: BaseException) -> str:
    """Return the first line of an error, without the number that a store gives every request."""
    if clock_is_off(error):
        return "the clock of this machine is off by more than the store allows: synchronise it (NTP)"
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(" (Request ID:")[0]
