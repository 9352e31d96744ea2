"""The configs that come with the package: `quickstart` is `configs/quickstart.yaml`, in a checkout and in a wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"
_PREFIX = "configs/"
_ENDING = ".yaml"


@cache
def shipped_names() -> tuple[str, ...]:
    """Return the names of all shipped configs, such as `quickstart` and `methods/seqkd`."""
    return tuple(
        sorted(path.relative_to(FOLDER).as_posix().removesuffix(_ENDING) for path in FOLDER.rglob(f"*{_ENDING}"))
    )


def shipped_config(place: str) -> Path | None:
    """Return the file of a shipped config; None if there is none of that name.

    Args:
        place: Name such as `quickstart`, or a path as the documents give it, such as `configs/quickstart.yaml`.
    """
    name = place.removeprefix(_PREFIX).removesuffix(_ENDING)
    return FOLDER / f"{name}{_ENDING}" if name in shipped_names() else None
