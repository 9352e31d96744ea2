"""The run directory, on a local disk or on an object store.

All files of a run are written through `RunDirectory`. A file appears complete or not at all: on a local disk it is
written under another name and renamed (`replacing`), and on an object store a put is atomic (`write_whole`). No other
module renames files. A directory is finished when the manifest says so. Readers that need a local path (memory maps,
`from_pretrained`) call `local(...)`, which copies remote files once for each node.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from filelock import FileLock

from pocl_ray.errors import StorageError
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.file_shapes import damaged, parse_json
from pocl_ray.run_directory.paths import is_remote, local_path


def check_lasts(storage_path: str) -> None:
    """Refuse a storage path in a Ray job's copy of the working directory, which Ray deletes after the job.

    Raises:
        StorageError: The path is relative.
    """
    path = storage_path.removeprefix("file://")
    if not is_remote(storage_path) and not path.startswith(("/", "~")):
        raise StorageError(
            f"storage_path: {storage_path} is relative, and a job's working directory is deleted after it; give "
            "s3://bucket/runs or the absolute path of a disk that all nodes share"
        )


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or URL, and the path on that filesystem.

    Raises:
        StorageError: The scheme is unknown, or the store cannot be reached.
    """
    if not is_remote(path):
        return pafs.LocalFileSystem(), str(local_path(path))
    try:
        return _open_remote(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be opened ({reason(error)})") from None


@lru_cache(maxsize=256)
def _open_remote(url: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a store, opened once, because pyarrow asks S3 for the bucket's region each time."""
    filesystem, path = pafs.FileSystem.from_uri(url)
    return filesystem, path


def check_bucket(storage_path: str) -> None:
    """Refuse an object store whose bucket is missing or not accessible, before anything is computed.

    Raises:
        StorageError: The bucket cannot be used; the message names the bucket and the reason.
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
    """Return whether a store refused a request because of its time stamp."""
    return any(sign in str(error) for sign in ("REQUEST_TIME_TOO_SKEWED", "RequestTimeTooSkewed"))


def reason(error: BaseException) -> str:
    """Return the first line of an error, without the store's request id."""
    if clock_is_off(error):
        return "the clock of this machine is off by more than the store allows: synchronise it (NTP)"
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of a directory: (from, to, reason) each
        text = str(error.args[0][0][-1])
    else:
        text = str(error)
    line = (text.splitlines() or [type(error).__name__])[0]
    return line.partition(" (Request ID:")[0]


DISK_FULL = ("No space left on device", "os error 28", "Errno 28", "Disk quota exceeded", "os error 122")
_LOCAL = pafs.LocalFileSystem()
_OBJECT_STORES = ("s3", "gcs", "gs", "abfs")


def _next_to(path: Path) -> Path:
    """A name that nobody else uses, in the same directory: a rename across filesystems would be a copy."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path for a new file or directory, which replaces `target` when the block ends without an error.

    This is the one atomic write: a reader sees the old file or directory, or the new one, never a part of one.
    Until then `target` is unchanged, and after an error too; the new path is then deleted.

    Raises:
        OSError: The folder cannot be created, or the rename is refused.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = _next_to(target), _next_to(target)
    try:
        yield new
        if target.is_dir() or (new.is_dir() and target.exists()):  # a rename can only replace a file by a file
            try:
                target.rename(old)
                new.rename(target)
            except BaseException:
                if old.exists() and not target.exists():  # between the two renames
                    old.rename(target)
                raise
        else:
            os.replace(new, target)
    finally:
        _remove(new)
        _remove(old)


@contextmanager
def replacing_file(target: Path, option: str) -> Iterator[Path]:
    """Yield a path for a new file at a place that a user names, as `replacing` does; only a file is ever replaced.

    Raises:
        StorageError: Something else is there, such as a directory or /dev/null, or the file cannot be written; the
            message names the option that the place comes from.
    """
    try:
        if target.exists() and not target.is_file():  # of `--out runs` all that is in it would be gone
            raise OSError(errno.EEXIST, "it is a directory" if target.is_dir() else "it is no file")
        with replacing(Path(os.path.realpath(target))) as new:  # a link stays, such as /dev/stdout
            yield new
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror}); choose another {option}") from None


def write_whole(filesystem: pafs.FileSystem, target: str, data: bytes | pa.Buffer) -> None:
    """Write a file of any filesystem, completely or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        with replacing(Path(target)) as new, new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut the name must not stand for an empty file
    elif any(kind in filesystem.type_name for kind in _OBJECT_STORES):
        with filesystem.open_output_stream(target, compression=None) as stream:
            stream.write(data)
    else:  # HDFS and the like
        folder, _, name = target.rpartition("/")
        new_path = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        filesystem.create_dir(folder, recursive=True)
        with filesystem.open_output_stream(new_path, compression=None) as stream:
            stream.write(data)
        filesystem.move(new_path, target)


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run. Every path is relative to it. It is cheap to construct and to send to workers.

    Attributes:
        uri: Absolute local path, or URL such as `s3://bucket/runs/name`.
    """

    uri: str

    @classmethod
    def open(cls, storage_path: str, name: str, create: bool = True) -> RunDirectory:
        """Return the directory `<storage_path>/<name>`, which is created if it is missing.

        Raises:
            StorageError: The directory cannot be created or written.
        """
        if is_remote(storage_path):
            if create:
                check_bucket(storage_path)
            return cls(f"{storage_path.rstrip('/')}/{name}")
        path = local_path(storage_path) / name
        if create:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"{path}: cannot be made ({error.strerror}); set storage_path elsewhere") from None
            if not os.access(path, os.W_OK):
                raise StorageError(f"{path}: no permission to write there; set storage_path elsewhere")
        return cls(str(path))

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem of the run directory."""
        return resolve(self.uri)[0]

    def fs_path(self, rel: str = "") -> str:
        """Return the path of `rel` on `filesystem`."""
        base = resolve(self.uri)[1]
        return f"{base}/{rel}" if rel else base

    def uri_of(self, rel: str) -> str:
        """Return the absolute path or URL of `rel`."""
        return f"{self.uri}/{rel}"

    def exists(self, rel: str) -> bool:
        """Return whether a file or directory exists.

        Raises:
            StorageError: The store does not answer.
        """
        return _info(self.filesystem, self.fs_path(rel), self.uri_of(rel)).type != pafs.FileType.NotFound

    def written_at(self, rel: str) -> float | None:
        """Return the time of a file by the store's clock, in seconds since 1970, or None if the store gives no times.

        Raises:
            StorageError: The store does not answer.
        """
        time = _info(self.filesystem, self.fs_path(rel), self.uri_of(rel)).mtime
        return None if time is None else time.timestamp()

    def read_bytes(self, rel: str) -> bytes:
        """Return a file's content.

        Raises:
            StorageError: The file is missing or cannot be read.
        """
        try:
            with self.filesystem.open_input_file(self.fs_path(rel)) as file:
                return file.read()
        except FileNotFoundError:
            raise StorageError(f"{self.uri_of(rel)}: no such file") from None
        except OSError as error:
            raise StorageError(f"{self.uri_of(rel)}: cannot be read ({reason(error)})") from None

    def read_text(self, rel: str) -> str:
        """Return the content of a UTF-8 file.

        Raises:
            StorageError: The file is missing, cannot be read, or is not UTF-8.
        """
        try:
            return self.read_bytes(rel).decode()
        except UnicodeDecodeError as error:
            raise damaged(self.uri_of(rel), error) from None

    def read_json(self, rel: str, shape: Any = None) -> Any:
        """Return the value in a JSON file, which has the shape that is given or the one of its name in `file_shapes`.

        Raises:
            StorageError: The file is missing, cannot be read, or is damaged.
        """
        return parse_json(self.read_bytes(rel), rel, self.uri_of(rel), shape)

    def read_table(self, rel: str, columns: list[str] | None = None) -> pa.Table:
        """Return the table in a Parquet file, or some of its columns.

        Raises:
            StorageError: The file is missing, cannot be read, or is damaged.
        """
        path = self.local(rel)
        try:
            return pq.read_table(path, columns=columns)
        except FileNotFoundError:
            raise StorageError(f"{self.uri_of(rel)}: no such file") from None
        except (OSError, pa.ArrowException) as error:
            raise damaged(self.uri_of(rel), error) from None

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a file, completely or not at all.

        Raises:
            StorageError: There is no permission to write, or the disk is full.
        """
        try:
            write_whole(self.filesystem, self.fs_path(rel), data)
        except OSError as error:
            raise _not_written(self.uri_of(rel), error) from None

    def write_text(self, rel: str, text: str) -> None:
        """Write a UTF-8 file, completely or not at all."""
        self.write_bytes(rel, text.encode())

    def write_json(self, rel: str, value: Any) -> None:
        """Write a JSON file, completely or not at all."""
        self.write_text(rel, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def write_table(self, rel: str, table: pa.Table) -> None:
        """Write a table as a Parquet file, completely or not at all."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_bytes(rel, sink.getvalue().to_pybytes())

    def local(self, rel: str) -> Path:
        """Return a local path of a file or directory: the path itself, or this node's copy of a remote one."""
        return Path(localize(self.uri_of(rel)))

    def publish(self, local: Path, rel: str) -> None:
        """Move a local file or directory to `rel`, and replace what is there.

        Raises:
            StorageError: There is no permission to write, or the disk is full.
        """
        filesystem, target = self.filesystem, self.fs_path(rel)
        try:
            if isinstance(filesystem, pafs.LocalFileSystem):
                with replacing(Path(target)) as new:
                    shutil.copytree(local, new) if local.is_dir() else shutil.copyfile(local, new)
                return
            self.delete(rel)
            pafs.copy_files(str(local), target, source_filesystem=_LOCAL, destination_filesystem=filesystem)
        except OSError as error:
            raise _not_written(self.uri_of(rel), error) from None

    def delete(self, rel: str) -> None:
        """Delete a file, or a directory with its content; a missing one is ignored.

        Raises:
            StorageError: There is no permission to delete.
        """
        filesystem, target = self.filesystem, self.fs_path(rel)
        kind = _info(filesystem, target, self.uri_of(rel)).type
        try:
            if kind == pafs.FileType.Directory:
                filesystem.delete_dir(target)
            elif kind == pafs.FileType.File:
                filesystem.delete_file(target)
        except OSError as error:
            raise StorageError(f"{self.uri_of(rel)}: cannot be deleted ({reason(error)})") from None


def _info(filesystem: pafs.FileSystem, path: str, uri: str) -> pafs.FileInfo:
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        raise StorageError(f"{uri}: cannot be reached ({reason(error)})") from None


def _not_written(uri: str, error: BaseException) -> StorageError:
    text, remedy = reason(error), ""
    if any(sign in text for sign in DISK_FULL):
        remedy = "; make room, or take another storage_path, and give the same command again"
    elif os.strerror(errno.EROFS) in text:
        remedy = "; take another storage_path, or have it mounted for writing, and give the same command again"
    return StorageError(f"{uri}: cannot be written ({text}){remedy}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cache_root() -> Path:
    """Return the directory of this node's copies of remote files (`POCL_RAY_CACHE` sets it).

    Raises:
        StorageError: Another user owns the directory, so its files cannot be trusted.
    """
    root = Path(os.environ.get("POCL_RAY_CACHE", Path(tempfile.gettempdir()) / f"pocl-ray-{os.getuid()}"))
    if root.exists() and root.stat().st_uid != os.getuid():
        raise StorageError(f"{root}: belongs to another user; set POCL_RAY_CACHE to a directory of your own")
    return root


def localize(uri: str) -> str:
    """Return a local path of a URL, whose files are copied to this node once; local paths and Hub ids do not change.

    Raises:
        StorageError: The file is missing or cannot be read, or this node's disk is full.
    """
    if not is_remote(uri):
        return uri.removeprefix("file://")
    filesystem, path = resolve(uri)
    info = _info(filesystem, path, uri)
    if info.type == pafs.FileType.NotFound:
        raise StorageError(f"{uri}: no such file or directory")
    try:
        return str(_copied(uri, filesystem, path, info))
    except OSError as error:
        raise StorageError(f"{uri}: cannot be copied to this node ({reason(error)})") from None


def _copied(uri: str, filesystem: pafs.FileSystem, path: str, info: pafs.FileInfo) -> Path:
    is_directory = info.type == pafs.FileType.Directory
    files = filesystem.get_file_info(pafs.FileSelector(path, recursive=True)) if is_directory else [info]
    state = sorted((f.path, f.size, str(f.mtime)) for f in files if f.type == pafs.FileType.File)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = root / fingerprint([uri, state])[:32]
    target = folder / Path(path).name
    (target if is_directory else folder).mkdir(parents=True, exist_ok=True)  # copy_files creates subdirectories only
    with FileLock(str(folder / ".lock")):
        if not (folder / ".complete").exists():
            pafs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=_LOCAL)
            (folder / ".complete").touch()
    return target
