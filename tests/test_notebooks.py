"""The notebooks run from top to bottom, on fewer images than their committed outputs had."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_three_run_from_top_to_bottom_and_small():
    assert [path.stem for path in NOTEBOOKS] == ["diffusion", "inference", "train"]
    for path in NOTEBOOKS:
        assert path.stat().st_size < 600_000, path
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), path
        outputs = [output for cell in cells for output in cell.outputs]
        assert not any(output.output_type == "error" for output in outputs)
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv("DIT_SHORT", "1")
    NotebookClient(nbformat.read(path, as_version=4), timeout=300, resources={"metadata": {"path": path.parent}}).execute()
