"""The notebook in examples/ runs from its first cell to its last, with a small budget.

Ray is needed because the notebook does a whole run; it starts its own, as a newcomer's does.
"""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny import ROOT, cli_environment, manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BUDGET = "NUM_ROWS, STEPS, STORAGE = 200, 16, {storage!r}"


def test_the_notebook_runs_to_its_end(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = BUDGET.format(storage=str(tmp_path / "runs"))
    kernel = nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3")
    kernel.execute(cwd=str(tmp_path), env=cli_environment())

    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    assert [output for output in shown if "image/png" in output.get("data", {})], "the curves"
    printed = "".join(output.text for output in shown if output.get("name") == "stdout")
    assert all(name in printed for name in ("reference", "student before", "student after", "teacher"))
    assert {step["status"] for step in manifest(tmp_path / "runs" / "notebook").values()} == {"done"}
