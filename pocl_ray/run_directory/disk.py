"""Free space on disks: an estimate before work begins, and a clear message if a disk is full later."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from pocl_ray.errors import ResourceError, StorageError, UserError
from pocl_ray.run_directory.storage import DISK_FULL, RunDirectory, clock_is_off, reason

GIB = float(1 << 30)
_NOTHING = 1 << 18  # bytes; a disk that is full may still have a block or two
MARGIN = 1.05
"""The factor on the estimate, since indexes, file systems and other files need some space too."""


def check_free(run_dir: RunDirectory, num_bytes: int, what: str, remedy: str) -> None:
    """Check that a run directory on a local disk has enough space; object stores have no limit.

    Args:
        run_dir: Run directory.
        num_bytes: Number of bytes that will be written.
        what: Name of the data, for the message.
        remedy: Advice that makes the data smaller, for the message.

    Raises:
        ResourceError: There is too little space.
    """
    if isinstance(run_dir.filesystem, pafs.LocalFileSystem):
        check_free_at(Path(run_dir.fs_path()), num_bytes, what, remedy)


def check_free_at(directory: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Check that a directory, or its nearest existing parent, has space for `num_bytes`.

    Raises:
        ResourceError: There is too little space.
    """
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes * MARGIN > free:
        raise ResourceError(f"{directory}: {what} need {_amount(num_bytes)} and {_amount(free)} are free; {remedy}")


def _amount(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= 0.01 * GIB else f"{num_bytes / 2**20:.2f} MiB"


def disk_full(error: BaseException) -> bool:
    """Return whether a full disk is the cause of an error; libraries in C++ and Rust say so only in the text."""
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(sign in str(link) for sign in DISK_FULL)
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
    """Return the error for a full disk."""
    detail = next(reversed(str(error).strip().splitlines()), "")[
        :200
    ]  # the last line of a remote error follows its traceback
    scratch = Path(tempfile.gettempdir())
    if shutil.disk_usage(scratch).free < _NOTHING:
        full, remedy = f"the disk of {scratch}, for scratch files,", "set TMPDIR to a directory with room"
    else:
        full, remedy = "the disk", "move the run to another storage_path"
    return ResourceError(
        f"{full} is full while {what} ({detail}); what was finished before is kept: make room, or {remedy}, and give "
        "the same command again"
    )


def machine_fault(error: BaseException, what: str) -> UserError | None:
    """Return the error for a fault of the machine (a full disk or a wrong clock), or None for other errors.

    Args:
        error: Any error.
        what: Description of the interrupted work.
    """
    if disk_full(error):
        return full_disk_error(error, what)
    refused = [reason(link) for link in _chain(error) if clock_is_off(link)]
    return StorageError(f"a store refused its part while {what}: {refused[0]}") if refused else None
