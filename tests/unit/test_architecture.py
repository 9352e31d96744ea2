"""docs/architecture.md names what there is: every step, every room and every root module."""

from __future__ import annotations

import re
from pathlib import Path

from pocl_ray.records import STEPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pocl_ray"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first line begins with `head`, each as its cells."""
    (block,) = [part for part in TEXT.split("\n\n") if part.startswith(f"| {head} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def test_the_table_of_steps_is_that_of_the_code() -> None:
    told = [
        [s.name, s.what, ", ".join(s.rests_on) or "-", ", ".join(f"`{path}`" for path in s.writes), s.cluster]
        for s in STEPS.values()
    ]
    assert table("step") == told


def test_every_step_is_run_by_its_name_and_rests_on_earlier_ones() -> None:
    sources = [(PACKAGE / name).read_text(encoding="utf-8") for name in ("pipeline.py", "inputs.py")]
    run = {name for text in sources for name in re.findall(r'steps\.run\("(\w+)"', text)}
    by_argument = {name for text in sources for name in re.findall(r'self\._distill\("(\w+)"', text)}
    assert run | by_argument == set(STEPS)
    names = list(STEPS)
    for step in STEPS.values():
        assert set(step.rests_on) <= set(names[: names.index(step.name)]), step.name
