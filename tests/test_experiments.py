"""The study in miniature, its table, its figures, and its statistics."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, random_network
from PIL import Image

from config import FAMILY
from dataset import DataError
from evaluate import Classifier
from experiments import figures, fits, runs, study, tables
from experiments import rows as table_of_rows
from experiments.rows import COLUMNS, REAL
from experiments.study import TABLE, Network, Setting

TINY = replace(study.RECIPE, limit=300, batch_size=100, data_dir=str(ROOT / "mnist"), device="cpu",
               compile=False)
ENTRIES = [(Network("S/7"), [Setting(1, 2, n=100), Setting(3, 2, n=100),
                             Setting(3, 1, 2.0, n=100)]),
           (Network("S/7", "in-context", seed=1), [Setting(1, 2, n=100)])]


def worker(folder) -> runs.Worker:
    torch.manual_seed(0)
    return runs.Worker(TINY, folder / "runs", folder / "results" / "runs.csv", Classifier().eval())


def rows(folder) -> list[dict]:
    return table_of_rows.read(folder / "results" / "runs.csv")


def test_one_row_per_measurement_and_nothing_is_done_twice(tmp_path, monkeypatch):
    worker(tmp_path).work(ENTRIES)
    table = rows(tmp_path)
    names = [REAL, *["S7-adaLN-Zero-muon-0"] * 3, "S7-in-context-muon-1"]
    assert [row["run"] for row in table] == names
    columns = ("step", "epoch", "sampling_steps", "guidance", "n", "multiply_adds", "parameters")
    assert [table[3][name] for name in columns] == [9, 3, 1, 2.0, 100, 718_848, 71_697]
    assert all(math.isfinite(row["FID"]) for row in table)
    assert table[1]["test_loss"] > table[3]["test_loss"] > 0
    assert [Image.open(path).size for path in tmp_path.glob("results/samples/*")] == 2 * [(280, 28)]
    monkeypatch.setattr("train.train", None)
    worker(tmp_path).work(ENTRIES)
    assert rows(tmp_path) == table


# The table

@pytest.fixture
def table_copy(tmp_path):
    """table_copy(change): a copy of runs.csv whose text is changed."""
    path = tmp_path / "runs.csv"
    return lambda change: (path.write_text(change(TABLE.read_text())), path)[1]


def test_a_row_that_a_full_disk_cut_does_not_count_and_is_replaced(table_copy):
    whole, path = table_of_rows.read(TABLE), table_copy(lambda text: text[:-9])
    assert table_of_rows.read(path) == whole[:-1]
    table_of_rows.append(path, whole[-1])
    assert table_of_rows.read(path) == whole


@pytest.mark.parametrize("damage", [
    lambda lines: lines[5][:60], lambda lines: lines[5][:60] + lines[6], lambda lines: "\0" * 40,
    lambda lines: lines[5].replace(lines[5].split(",")[list(COLUMNS).index("FID")], "", 1),
], ids=["short", "joined", "zeros", "no FID"])
def test_a_line_without_all_its_cells_does_not_count(damage, table_copy):
    def change(text):
        lines = text.split("\n")
        return "\n".join([*lines[:5], damage(lines), *lines[6:]])

    whole = table_of_rows.read(TABLE)
    assert table_of_rows.read(table_copy(change)) == [*whole[:4], *whole[5:]]


def test_a_doubled_measurement_which_would_count_as_two_seeds_is_refused(table_copy):
    with pytest.raises(DataError, match=r"line \d+: the same measurement as in line 2"):
        table_of_rows.read(table_copy(lambda text: text + text.split("\n")[1] + "\n"))


def test_rows_of_another_recipe_are_missing():
    table = table_of_rows.read(TABLE)
    network, settings = next((n, s) for n, s in study.everything() if n == Network())
    assert study.missing(network, settings, table, study.RECIPE) == []
    changed = replace(study.RECIPE, lr=0.005)
    assert study.missing(network, settings, table, changed) == list(settings)
    same = replace(study.RECIPE, device="cpu", epochs=7, data_dir="elsewhere")
    assert study.missing(network, settings, table, same) == []


# The tables and figures

def test_the_committed_tables_are_those_of_the_table():
    """Which is of today's recipe; for settings that come later, see study.NOT_IN_DIGEST."""
    table = table_of_rows.read(TABLE)
    assert study.current(table) == table
    assert TABLE.with_name("tables.md").read_text() == tables.all_tables(table)


def test_every_committed_figure_is_drawn_from_the_table(tmp_path):
    for name in ("samples", "median.json"):
        (tmp_path / name).symlink_to(TABLE.with_name(name))
    figures.draw(table_of_rows.read(TABLE), tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in TABLE.parent.glob("*.png")}


# The statistics

def test_a_line_has_the_textbook_errors():
    """With one x: slope, its error, and the band, by the formulas of simple regression."""
    x, y = [1.0, 2.0, 4.0, 7.0, 8.0], [2.0, 2.5, 5.5, 6.0, 9.0]
    slope, intercept = statistics.linear_regression(x, y)
    squares = statistics.variance(x) * 4
    errors = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    residual = math.sqrt(sum(error**2 for error in errors) / 3)
    line = fits.Line(y, x)
    assert line.coefficient(1) == pytest.approx((slope, residual / math.sqrt(squares)))
    error = residual * math.sqrt(1 / 5 + (3.0 - statistics.mean(x)) ** 2 / squares)
    assert line.at(3.0) == pytest.approx((intercept + 3 * slope, 3.182446 * error))


def test_a_token_narrower_than_its_patch_has_a_least_loss():
    """S/7: whatever x_t is, the patches of the output lie in 31 dimensions for given t and y."""
    model = random_network(FAMILY["S/7"])
    with torch.no_grad():
        out = model(torch.randn(16, 1, 28, 28), torch.full((16,), 300), torch.full((16,), 3))
    patches = out.reshape(16, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 49).double()
    values = torch.linalg.svdvals(patches - patches.mean(dim=0))
    assert (values > 1e-4 * values[0]).sum() == 31
    assert tables.least_loss(FAMILY["S/7"]) == pytest.approx(18 / 49)
