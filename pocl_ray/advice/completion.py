"""Completion in the shell: names of configs and of run directories. It imports nothing heavy, since each Tab waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pocl_ray.config.shipped import shipped_names

_ENDINGS = (".yaml", ".yml")
_RUNS = "runs"
_MARK = "manifest.json"


def complete_config(incomplete: str) -> list[str]:
    """Return config files and folders that begin with a text, and shipped configs of such a name."""
    return [*_paths(incomplete, _ENDINGS), *(name for name in shipped_names() if name.startswith(incomplete))]


def complete_run(incomplete: str) -> list[str]:
    """Return run directories that begin with a text: those below `runs`, and those that a path leads to."""
    found = [path for path in _paths(incomplete, ()) if (Path(path) / _MARK).is_file() or path.endswith("/")]
    below = (path for path in sorted(Path(_RUNS).glob("*")) if (path / _MARK).is_file())
    return list(dict.fromkeys([*(str(p) for p in below if str(p).startswith(incomplete)), *found]))


def _paths(incomplete: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Files with one of the endings, and folders, which end in a slash."""
    folder = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if str(path).startswith(incomplete) and not path.name.startswith("."):
            if path.is_dir():
                yield f"{path}/"
            elif path.suffix in endings:
                yield str(path)
