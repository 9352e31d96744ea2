"""The extras: what a message or a document tells to install can be installed, and what is declared is told of."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
NAMED = re.compile(r"pocl-ray\[([a-z0-9_, -]+)\]")


def named_in(folder: str, ending: str) -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob(f"*.{ending}")))
    return {name.strip() for text in texts for found in NAMED.findall(text) for name in found.split(",")}


@pytest.mark.parametrize(("folder", "ending"), [("pocl_ray", "py"), ("docs", "md")])
def test_every_extra_that_is_named_is_declared(folder: str, ending: str) -> None:
    named = named_in(folder, ending)
    assert named, "none is named: the pattern has grown old"
    assert named <= set(EXTRAS)


@pytest.mark.parametrize("extra", ["lora", "trl", "liger", "vllm", "lm-eval"])
def test_where_a_package_is_missing_the_message_names_its_extra(extra: str) -> None:
    assert extra in named_in("pocl_ray", "py")
    assert EXTRAS[extra]


def test_the_install_page_lists_every_extra() -> None:
    lines = (ROOT / "docs" / "start" / "install.md").read_text(encoding="utf-8").splitlines()
    listed = {name for line in lines if line.startswith("| `") for name in re.findall(r"`([a-z0-9-]+)`", line)}
    assert listed >= set(EXTRAS) - {"dev"}  # `make test` brings that one
