"""docs/architecture.md names what there is: every step, and the files to read for one optimizer step and one task."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pocl_ray.records import STEPS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pocl_ray"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTS = ("**One optimizer step**", "**One scoring task**")
MOST_FILES = 8


def table(head: str) -> list[list[str]]:
    """The rows of the table whose first line begins with `head`, each as its cells."""
    (block,) = [part for part in TEXT.split("\n\n") if part.startswith(f"| {head} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


def test_the_table_of_steps_is_that_of_the_code() -> None:
    told = [
        [s.name, s.what, ", ".join(s.depends_on) or "-", ", ".join(f"`{path}`" for path in s.writes), s.cluster]
        for s in STEPS.values()
    ]
    assert table("step") == told


def test_every_step_is_run_by_its_name_and_depends_on_earlier_ones() -> None:
    sources = [(PACKAGE / name).read_text(encoding="utf-8") for name in ("pipeline.py", "inputs.py")]
    run = {name for text in sources for name in re.findall(r'steps\.run\("(\w+)"', text)}
    by_argument = {name for text in sources for name in re.findall(r'self\._distill\("(\w+)"', text)}
    assert run | by_argument == set(STEPS)
    names = list(STEPS)
    for step in STEPS.values():
        assert set(step.depends_on) <= set(names[: names.index(step.name)]), step.name


def reading_list(heading: str) -> list[str]:
    """The files of a numbered list of the page, as it names them."""
    text = TEXT.partition(heading)[2].partition("\n\n")[2].partition("\n\n")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.MULTILINE)


def imported_files(name: str) -> set[str]:
    """The files of the package that a file imports, as the page names them; packages themselves do not count."""
    nodes = ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pocl_ray")]
    modules = {node.module or "" for node in found} | {f"{node.module}.{a.name}" for node in found for a in node.names}
    paths = {module.removeprefix("pocl_ray").lstrip(".").replace(".", "/") + ".py" for module in modules}
    return {path for path in paths if (PACKAGE / path).is_file()}


@pytest.mark.parametrize("heading", LISTS)
def test_a_reading_list_has_eight_files_at_most_each_imported_by_one_before_it(heading: str) -> None:
    names = reading_list(heading)
    assert 0 < len(names) <= MOST_FILES
    assert all((PACKAGE / name).is_file() for name in names)
    for place, name in enumerate(names[1:], 1):
        assert any(name in imported_files(before) for before in names[:place]), f"no file before {name} imports it"


@pytest.mark.parametrize("heading", LISTS)
def test_what_the_files_of_a_reading_list_import_is_open_or_said_to_stay_closed(heading: str) -> None:
    named = {name for one in LISTS for name in reading_list(one)}
    closed = re.findall(r"`([\w/]+(?:\.py|/))`", " ".join(row[0] for row in table("file")))
    folders = tuple(name for name in closed if name.endswith("/"))
    unnamed = [
        f"{name} imports {other}"
        for name in reading_list(heading)
        for other in sorted(imported_files(name) - named - set(closed))
        if not other.startswith(folders)
    ]
    assert not unnamed, unnamed


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`(?:pocl_ray/)?([a-z_]+/[\w/]+\.py)`", TEXT)) - {"tests/unit"}
    missing = [name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file()]
    assert not missing, missing
