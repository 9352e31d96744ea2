"""Models that come with the package: `samples://NAME` is a directory in it, on every node that has it installed."""

from __future__ import annotations

from pathlib import Path

from pocl_ray.errors import ModelError

SCHEME = "samples://"
FOLDER = Path(__file__).parent / "samples"


def shipped_directory(place: str) -> Path | None:
    """Return the directory of a shipped model, as it is installed here; None for any other place.

    Raises:
        ModelError: The package ships no model of that name.
    """
    if not place.startswith(SCHEME):
        return None
    name, shipped = place.removeprefix(SCHEME), sorted(one.name for one in FOLDER.iterdir() if one.is_dir())
    if name not in shipped:
        raise ModelError(f"{place}: no such model comes with the package; there is {SCHEME}{shipped[0]}")
    return FOLDER / name
