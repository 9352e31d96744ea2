"""Clocks that disagree: ages that need only one clock, and a word where one is far off.

Nothing here or elsewhere compares the clocks of two machines to decide whether work is lost or a lease is over.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import psutil

from pocl_ray.run_directory.storage import RunDirectory

MAX_SKEW_S = 300.0
"""Object stores refuse requests that are 15 minutes off; long before that somebody should know."""


def age_in_store(run_dir: RunDirectory, rel: str) -> float | None:
    """Return how long ago a file was written, by the clock of the store alone.

    The store is asked for the time of a file that is written now; no clock of a machine that runs pocl-ray is read.

    Args:
        run_dir: The run directory.
        rel: The file, relative to it.

    Returns:
        Seconds; None where the store tells no times, or the file is gone.

    Raises:
        StorageError: The store does not answer.
    """
    written = run_dir.written_at(rel)
    if written is None:
        return None
    probe = f".clock-{uuid.uuid4().hex}"
    run_dir.write_bytes(probe, b"now")
    try:
        now = run_dir.written_at(probe)
    finally:
        run_dir.delete(probe)
    return None if now is None else now - written


def started_after_boot_s(pid: int) -> float:
    """Return when a process of this machine started, in seconds since the boot: no setting of the clock changes it.

    Raises:
        psutil.NoSuchProcess: There is none.
    """
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time() - psutil.boot_time()
    try:
        after_name = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def skew_s(asked_at: float, theirs: float, answered_at: float) -> float:
    """Return by how much another clock is ahead, at least (negative: behind).

    Args:
        asked_at: Here, before the other was asked for its time.
        theirs: What it said.
        answered_at: Here, when that had come.
    """
    return max(0.0, theirs - answered_at) + min(0.0, theirs - asked_at)


def skew_warning(place: str, ahead_s: float) -> str | None:
    """Return what the user is told of a clock that is too far off, or None.

    Args:
        place: Where it is, such as `node 10.0.0.4`.
        ahead_s: By how much it is ahead of the driver's.
    """
    if abs(ahead_s) <= MAX_SKEW_S:
        return None
    which = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"{place}: its clock is {abs(ahead_s):.0f} s {which} the driver's; object stores and tokens refuse clocks that "
        "are far off: synchronise it (NTP)"
    )
