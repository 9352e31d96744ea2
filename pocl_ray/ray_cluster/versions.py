"""Whether the machines of a cluster run the same code: versions of what matters, and a digest of the project's files.

Two versions of the project in one run would train on different ideas of the same checkpoint, or fail somewhere in
unpickling; so it is said before, with the node and what differs there.
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
    """Return the versions that must agree on all nodes, by package; `pocl-ray` is a digest of its files."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "pocl-ray": _digest(Path(__file__).parents[1])}
    for package in COMPARED:
        try:
            found[package] = version(package).partition("+")[0]  # +cpu and +cu129 are the same code
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _digest(package: Path) -> str:
    """Hash the files once they stand still: Ray may unpack a job's working directory beside a process that runs."""
    digest, again = "", _digest_now(package)
    for _ in range(UNPACKING_LOOKS):
        if again and digest == again:
            return again
        time.sleep(BETWEEN_LOOKS_S)
        digest, again = again, _digest_now(package)
    raise ResourceError(f"{package}: its files keep changing; run from a directory that nobody writes to")


def _digest_now(package: Path) -> str:
    """Hash the files as they are; an empty string where one of them is just being replaced."""
    digest = hashlib.sha256()
    try:
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    except FileNotFoundError:
        return ""
    return digest.hexdigest()[:12]


def check_same(driver: Mapping[str, str], other: Mapping[str, str], place: str) -> None:
    """Refuse to work together with another version.

    Args:
        driver: What runs the command.
        other: What runs elsewhere.
        place: Where that is, such as `node 10.0.0.4`.

    Raises:
        ResourceError: They differ; the message names each package with both versions.
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


# Clocks that disagree: ages that need only one clock, and a word where one is far off.
#
# Nothing here or elsewhere compares the clocks of two machines to decide whether work is lost or a lease is over.

MAX_SKEW_S = 300.0
"""Object stores refuse requests that are 15 minutes off; long before that somebody should know."""


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
