"""The rooms of the package: their table in docs/architecture.md, and the names of their files and classes."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pocl_ray"

# The file names that stand in several rooms, and the one kind of thing that each of them means.
SHARED_NAMES = {
    "__init__.py": "the package",
    "arms.py": "configs that differ by some keys, which are compared",
    "frontier.py": "frontier pacing: its rule, and what the report shows of it",
    "internals.py": "the names that Ray does not promise to keep",
    "loading.py": "loads the thing of the room from files: a config, a model",
    "page.py": "writes an HTML page",
    "plots.py": "draws the plots of a page",
    "prepare.py": "makes the things of the room ready in the run directory: rows, models",
    "race.py": "the race of curricula with plain distillation: its config, its policy",
    "results.py": "the records of many trainings, and the table of them",
    "shipped.py": "finds what comes with the package: configs, models",
    "sources.py": "the sources of rows: their config, and how they are read",
    "writing.py": "writes the texts that are the room's result: a commented config, responses",
}


def test_the_table_of_rooms_names_every_folder_and_root_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| layer | room | what it holds |")[2].partition("\n\n")[0]
    named = re.findall(
        r"`([\w/.]+)`", "\n".join(line.split("|")[2] for line in table.splitlines() if line.count("|") > 3)
    )
    rooms = [f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted([*rooms, *modules])


def test_a_file_name_that_stands_in_several_rooms_means_one_kind_of_thing() -> None:
    """A new one needs its kind in SHARED_NAMES: think of a name that says what the file is to a stranger first."""
    rooms = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        rooms[path.name].append(str(path.parent.relative_to(PACKAGE)))
    shared = {name: sorted(places) for name, places in rooms.items() if len(places) > 1}
    assert set(shared) == set(SHARED_NAMES), shared


def test_no_two_classes_of_a_room_share_a_name() -> None:
    names: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        names.update((room if room != path.name else "the root", node.name) for node in classes)
    assert not [name for name, count in names.items() if count > 1]
