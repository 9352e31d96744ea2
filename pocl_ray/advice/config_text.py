"""The text of a new config: YAML with the reason for each choice next to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pocl_ray.config.loading import in_yaml

COMMENT_COLUMN = 56


@dataclass
class ConfigText:
    """A config that grows line by line.

    Attributes:
        lines: Lines so far.
    """

    lines: list[str] = field(default_factory=list)

    def note(self, *lines: str) -> None:
        """Add lines of comment; without any, an empty line."""
        self.lines += [f"# {line}".rstrip() for line in lines] or [""]

    def key(self, key: str, value: Any, why: str = "", depth: int = 0) -> None:
        """Add a key with its value on one line, and the reason as a comment behind it."""
        line = f"{'  ' * depth}{key}: {in_yaml(value)}"
        self.lines.append(f"{line:<{COMMENT_COLUMN - 2}}  # {why}" if why else line)

    def section(self, name: str, keys: Mapping[str, Any | tuple[Any, str]], depth: int = 0) -> None:
        """Add a section; a value of a key may be a pair of value and reason, and None leaves the key out."""
        self.lines.append(f"{'  ' * depth}{name}:")
        for key, given in keys.items():
            value, why = given if isinstance(given, tuple) else (given, "")
            if value is not None:
                self.key(key, value, why, depth + 1)

    def __str__(self) -> str:
        """The text of the file."""
        return "\n".join(self.lines) + "\n"
