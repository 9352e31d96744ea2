"""Local directories in which checkpoints are made, and those that killed workers left behind. No Ray."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from pocl_ray.clocks import started_after_boot_s
from pocl_ray.run_directory.lease import machine
from pocl_ray.run_directory.storage import fingerprint

_NAME = re.compile(r"pocl-ray-(?P<machine>[0-9a-f]{12})-(?P<pid>\d+)-(?P<started>\d+)-")


def make_scratch() -> Path:
    """Make a directory of this process's own below `TMPDIR`, and delete those of processes that are gone.

    A worker that is killed cannot clean up, and what it leaves is as large as a checkpoint. Only directories of this
    user, made on this machine since its start, are looked at.
    """
    here, root = fingerprint(machine())[:12], Path(tempfile.gettempdir())
    for path in root.glob(f"pocl-ray-{here}-*"):
        found = _NAME.match(path.name)
        with suppress(FileNotFoundError):  # another worker deletes it in this moment
            if found and path.stat().st_uid == os.getuid() and not _runs(int(found["pid"]), int(found["started"])):
                shutil.rmtree(path, ignore_errors=True)
    pid = os.getpid()
    return Path(tempfile.mkdtemp(prefix=f"pocl-ray-{here}-{pid}-{round(started_after_boot_s(pid))}-"))


def _runs(pid: int, started_s: int) -> bool:
    try:
        return abs(started_after_boot_s(pid) - started_s) < 2.0
    except psutil.NoSuchProcess:
        return False
