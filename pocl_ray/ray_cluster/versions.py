"""Checks that all machines of a cluster run the same code: versions of packages, and a digest of the project's files.

Two versions of the project in one run would read a checkpoint in different ways, or fail while unpickling. So the check
comes first, and its message names the node and the differences.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pocl_ray.errors import ResourceError

UNPACKING_LOOKS, BETWEEN_LOOKS_S = 40, 0.25
COMPARED = ("ray", "torch", "deepspeed", "transformers", "pyarrow")


@cache
def versions() -> dict[str, str]:
    """Return by package the versions that must agree on all nodes; for `pocl-ray` it is a digest of its files."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "pocl-ray": _digest(Path(__file__).parents[1])}
    for package in COMPARED:
        try:
            found[package] = version(package).partition("+")[0]  # +cpu and +cu129 are the same code
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _digest(package: Path) -> str:
    """The hash of the files after they stop changing: Ray may unpack a job's files while another process runs."""
    digest, again = "", _digest_now(package)
    for _ in range(UNPACKING_LOOKS):
        if again and digest == again:
            return again
        time.sleep(BETWEEN_LOOKS_S)
        digest, again = again, _digest_now(package)
    raise ResourceError(f"{package}: its files keep changing; run from a directory that nobody writes to")


def _digest_now(package: Path) -> str:
    """The hash of the files now, or an empty string if they are just being replaced: one of them, or all of them."""
    digest = hashlib.sha256()
    try:
        paths = sorted(package.rglob("*.py"))  # a folder may be gone by the time that it is walked
        for path in paths:
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    except FileNotFoundError:
        return ""
    return digest.hexdigest()[:12] if paths else ""


def check_same(driver: Mapping[str, str], other: Mapping[str, str], place: str) -> None:
    """Refuse another version of the code.

    Args:
        driver: Versions of the process that runs the command.
        other: Versions at the other place.
        place: Name of the other place, such as `node 10.0.0.4`.

    Raises:
        ResourceError: The versions differ; the message names each such package with both versions.
    """
    differing = [
        f"{name} {other.get(name, 'none')} (here {driver.get(name, 'none')})"
        for name in sorted({*driver, *other})
        if driver.get(name) != other.get(name)
    ]
    if differing:
        raise ResourceError(
            f"{place} runs other code: {', '.join(differing)}; install the same on all nodes (the image of "
            "cluster/Dockerfile), or let `pocl-ray submit` upload the project"
        )


MAX_SKEW_S = 300.0
"""The difference of clocks at which the user is warned. Object stores refuse requests that are 15 minutes off. Nothing
else depends on it: no code compares the clocks of two machines to decide whether work is lost or a lease is over."""


def skew_s(asked_at: float, theirs: float, answered_at: float) -> float:
    """Return the minimum by which another clock is ahead (negative: behind).

    Args:
        asked_at: Local time before the request.
        theirs: Time of the other clock.
        answered_at: Local time after the answer.
    """
    return max(0.0, theirs - answered_at) + min(0.0, theirs - asked_at)


def skew_warning(place: str, ahead_s: float) -> str | None:
    """Return the warning about a clock that is too far off, or None.

    Args:
        place: Name of the place, such as `node 10.0.0.4`.
        ahead_s: Seconds by which the clock is ahead of the driver's.
    """
    if abs(ahead_s) <= MAX_SKEW_S:
        return None
    which = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"{place}: its clock is {abs(ahead_s):.0f} s {which} the driver's; object stores and tokens refuse clocks that "
        "are far off: synchronise it (NTP)"
    )
