"""The notebooks run from top to bottom, on fewer images than their committed outputs had."""

import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    """In its own folder, as Jupyter runs it; each picture of the committed one appears."""
    monkeypatch.setenv("DIT_SHORT", "1")
    committed, ran = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(ran, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    assert pictures(ran) == pictures(committed) > 1


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells
               for output in cell.get("outputs", []))


@pytest.mark.slow
def test_the_projects_modules_win(tmp_path):
    """Over packages of the same names, which are empty, wherever PYTHONPATH or pip has put them."""
    for path in (*ROOT.glob("*.py"), ROOT / "runtime", ROOT / "experiments"):
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / "__init__.py").touch()
    firsts = (next(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
              for path in NOTEBOOKS)
    code = "\n".join(line for first in firsts for line in first.splitlines() if line[:1] != "%")
    ended = subprocess.run([sys.executable, "-c", code], cwd=NOTEBOOKS[0].parent, text=True,
                           capture_output=True, timeout=120,
                           env={**os.environ, "PYTHONPATH": str(tmp_path), "MPLBACKEND": "Agg"})
    assert ended.returncode == 0, ended.stderr
