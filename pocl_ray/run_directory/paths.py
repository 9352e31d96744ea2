"""Paths as a config gives them: local, or the URL of an object store. Nothing is opened here."""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from pocl_ray.errors import StorageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_remote(path: str) -> bool:
    """Return whether the path names an object store and not a local file."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    """Return the absolute path of a local file or directory, with `~` and `file://` resolved.

    Raises:
        StorageError: It begins with the home of a user who has none, or holds a character that no path may hold.
    """
    if "\0" in path:
        raise StorageError(f"{path!r}: a path holds no NUL character")
    try:
        return Path(path.removeprefix("file://")).expanduser().absolute()
    except RuntimeError:
        raise StorageError(f"{path}: there is no such home directory; write the path in full") from None


def hub_id(path: str) -> str:
    """Return a place if it may be an id on the Hub, else an empty text: nothing is there on this machine."""
    return path if _HUB_ID.fullmatch(path) and not os.path.exists(path) else ""
