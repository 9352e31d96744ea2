"""A hook of mkdocs: the notebook as a page, made from its cells whenever the site is built, and the file itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
PAGE = "start/notebook.md"


def render(notebook: Path) -> str:
    """Return the cells of a notebook as Markdown; a link to the file follows its title."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    blocks = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    ]
    title, _, rest = blocks[0].partition("\n")
    return "\n\n".join([title, f"[{notebook.name}]({notebook.name}) is this page as a notebook.", rest, *blocks[1:]])


def on_files(files: Any, config: Any) -> Any:
    """Add the page, and next to it the notebook."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=render(NOTEBOOK)))
    copy = (Path(PAGE).parent / NOTEBOOK.name).as_posix()
    files.append(File.generated(config, copy, content=NOTEBOOK.read_text(encoding="utf-8")))
    return files
