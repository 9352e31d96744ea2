"""Room on disks: estimated before work begins, and a clear word where a disk is full all the same."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from pocl_ray.errors import ResourceError, StorageError, UserError
from pocl_ray.run_directory.storage import RunDirectory, clock_is_off, reason

GIB = float(1 << 30)
MARGIN = 1.05
"""Of the estimate: indexes, file systems and the files of others take a little too."""
_SIGNS = ("No space left on device", "os error 28", "Errno 28", "Disk quota exceeded", "os error 122")


def check_free(run_dir: RunDirectory, num_bytes: int, what: str, remedy: str) -> None:
    """Check that a run directory on a local disk has room; an object store has no end.

    Args:
        run_dir: The run directory.
        num_bytes: How much is to be written.
        what: What it is, for the message.
        remedy: What makes it smaller.

    Raises:
        ResourceError: There is too little room.
    """
    if isinstance(run_dir.filesystem, pafs.LocalFileSystem):
        check_free_at(Path(run_dir.fs_path()), num_bytes, what, remedy)


def check_free_at(directory: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Check that a directory, or the one it will lie in, has room for `num_bytes`.

    Raises:
        ResourceError: It has not.
    """
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes * MARGIN > free:
        raise ResourceError(
            f"{directory}: {what} need {num_bytes / GIB:.2f} GiB and {free / GIB:.2f} GiB are free; {remedy}"
        )


def disk_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error; what libraries in C++ and Rust raise carries it as text."""
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(sign in str(link) for sign in _SIGNS)
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def full_disk_error(error: BaseException, what: str) -> ResourceError:
    """Return what the user is told of a disk that is full."""
    detail = next(reversed(str(error).strip().splitlines()), "")[:200]  # of a remote error, the line after its trace
    return ResourceError(
        f"the disk is full while {what} ({detail}); what was finished before is kept: make room, or move the run to "
        "another storage_path, and give the same command again"
    )


def machine_fault(error: BaseException, what: str) -> UserError | None:
    """Return what the user is told of an error that a machine is to blame for: a full disk, or a wrong clock.

    Args:
        error: Any.
        what: Was being done.
    """
    if disk_full(error):
        return full_disk_error(error, what)
    refused = [reason(link) for link in _chain(error) if clock_is_off(link)]
    return StorageError(f"a store refused its part while {what}: {refused[0]}") if refused else None
