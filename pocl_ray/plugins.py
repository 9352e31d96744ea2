"""Plug-ins of other installed packages, found through entry points and imported only when a config names them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pocl_ray.errors import UserError


def installed(group: str) -> dict[str, EntryPoint]:
    """Return the plug-ins of a group by name, without importing them."""
    return {entry_point.name: entry_point for entry_point in entry_points(group=group)}


def load(kind: str, entry_point: EntryPoint) -> Any:
    """Return the object of an entry point, imported now.

    Args:
        kind: Kind of the plug-in, for the message: `loss`, `pacing`, `signal`.
        entry_point: Entry point from `installed`.

    Raises:
        UserError: The import fails.
    """
    try:
        return entry_point.load()
    except Exception as error:  # a plug-in's import runs foreign code, which may fail in any way
        raise UserError(
            f"{kind} plug-in '{entry_point.name}' ({entry_point.value}) cannot be imported: {reason(error)}; "
            "repair or uninstall it"
        ) from error


def reason(error: Exception) -> str:
    """Return an exception of foreign code as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
