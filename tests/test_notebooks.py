"""The notebooks run from top to bottom, on fewer images than their committed outputs had."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells
               for output in cell.get("outputs", []))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    """In its own folder, as Jupyter runs it; each picture of the committed one appears."""
    monkeypatch.setenv("DIT_SHORT", "1")
    committed, ran = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(ran, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    assert pictures(ran) == pictures(committed) > 1
