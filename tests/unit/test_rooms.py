"""The table of rooms in docs/architecture.md, compared with the folders and root modules that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pocl_ray"


def test_the_table_of_rooms_names_every_folder_and_root_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| layer | room | what it holds |")[2].partition("\n\n")[0]
    named = re.findall(
        r"`([\w/.]+)`", "\n".join(line.split("|")[2] for line in table.splitlines() if line.count("|") > 3)
    )
    rooms = [f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted([*rooms, *modules])
