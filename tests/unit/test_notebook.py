"""The notebook in examples/: its format, and what must not be in it. tests/ray/test_notebook_run.py runs it."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=nbformat.NO_CONVERT)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_it_is_a_valid_notebook_without_outputs() -> None:
    nbformat.validate(NOTEBOOK)
    assert all(not cell.outputs and cell.execution_count is None for cell in CODE)
    assert set(NOTEBOOK.metadata.kernelspec) == {"name", "display_name", "language"}
    assert NOTEBOOK.metadata.kernelspec.name == "python3"


def test_it_names_no_place_of_a_machine() -> None:
    text = (ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.}/:-])/(home|tmp|opt|usr|Users|mnt)/", text)


def test_what_it_imports_of_the_package_is_in_the_python_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for cell in CODE:
        for node in ast.walk(ast.parse(cell.source)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("pocl_ray"):
                continue
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name)
                assert re.search(rf"{node.module}\b.*?\b{alias.name}\b", reference, re.DOTALL), alias.name
