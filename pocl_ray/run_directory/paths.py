"""Paths as a config gives them: local, or the URL of an object store. Nothing is opened here."""

from __future__ import annotations

from pathlib import Path

from pocl_ray.errors import StorageError


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
