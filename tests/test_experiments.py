"""The study in miniature: what is missing is done once, even if workers die or share it."""

import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from config import BLOCKS, FAMILY
from dataset import DataError
from dit import DiT
from evaluate import Classifier
from experiments import crossings, figures, fits, runs, study, tables
from experiments import rows as table_of_rows
from experiments.rows import COLUMNS, HEADER, METRICS, REAL
from experiments.study import CURVE_IMAGES, EPOCHS, FINAL_IMAGES, TABLE, Network, Setting

TINY = replace(study.RECIPE, limit=300, batch_size=100, data_dir=str(ROOT / "mnist"), device="cpu",
               compile=False)
ENTRIES = [(Network("S/7"), [Setting(1, 2, n=100), Setting(3, 2, n=100),
                             Setting(3, 1, 2.0, n=100)]),
           (Network("S/7", "in-context", seed=1), [Setting(1, 2, n=100)])]


def worker(folder) -> runs.Worker:
    torch.manual_seed(0)
    return runs.Worker(TINY, folder / "runs", folder / "results" / "runs.csv", Classifier().eval())


def in_a_process(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def rows(folder) -> list[dict]:
    return table_of_rows.read(folder / "results" / "runs.csv")


def without_times(table: list[dict]) -> list[dict]:
    return sorted(({**row, "train_seconds": None} for row in table), key=str)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a study that one worker did in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    worker(folder).work(ENTRIES)
    return folder


def test_one_row_per_measurement_and_nothing_is_done_twice(undisturbed, monkeypatch):
    table = rows(undisturbed)
    names = [REAL, *["S7-adaLN-Zero-muon-0"] * 3, "S7-in-context-muon-1"]
    assert [row["run"] for row in table] == names
    first, third = table[1], table[3]
    assert [first[name] for name in ("step", "epoch", "multiply_adds", "parameters")] == [
        3, 1, 718_848, 71_697]
    assert [third[name] for name in ("step", "epoch", "sampling_steps", "guidance", "n")] == [
        9, 3, 1, 2.0, 100]
    assert all(math.isfinite(row["FID"]) for row in table)
    assert first["test_loss"] > third["test_loss"] > 0
    assert {row["device"] for row in table} == {"CPU"}
    assert first["digest"] == Network("S/7").digest(TINY) and len(first["date"]) == 10
    samples = undisturbed / "results" / "samples"
    strips = {path.name: Image.open(path).size for path in samples.iterdir()}
    assert strips == {"S7-adaLN-Zero-muon-0.png": (280, 28), "S7-in-context-muon-1.png": (280, 28)}
    monkeypatch.setattr("train.train", None)
    worker(undisturbed).work(ENTRIES)
    assert rows(undisturbed) == table


@pytest.mark.parametrize(("moment", "count"), [("save_strip", 1), ("append", 3)])
def test_a_killed_worker_is_continued(moment, count, tmp_path, undisturbed, monkeypatch):
    """Killed between training and measuring, or between measuring and writing: nothing is lost."""
    calls, original = iter(range(1, 100)), getattr(runs.Worker, moment)

    def killed():
        def replaced(*arguments):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)

        monkeypatch.setattr(runs.Worker, moment, replaced)
        worker(tmp_path).work(ENTRIES)

    process = in_a_process(killed)
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(rows(tmp_path)) == 2
    worker(tmp_path).work(ENTRIES)
    assert without_times(rows(tmp_path)) == without_times(rows(undisturbed))


def test_two_workers_share_the_work(tmp_path, undisturbed):
    two = [in_a_process(lambda: worker(tmp_path).work(ENTRIES)) for _ in range(2)]
    for process in two:
        process.join()
    assert [process.exitcode for process in two] == [0, 0]
    assert without_times(rows(tmp_path)) == without_times(rows(undisturbed))


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "runs" / "S7-adaLN-Zero-muon-0").mkdir(parents=True)
    (tmp_path / "runs" / "S7-adaLN-Zero-muon-0" / "model.resume.pth").write_text("damaged")
    with pytest.raises(runs.TrainingError, match="not complete: S7-adaLN-Zero-muon-0"):
        worker(tmp_path).work(ENTRIES)
    assert "model.resume.pth" in capsys.readouterr().err
    assert [row["run"] for row in rows(tmp_path)] == [REAL, "S7-in-context-muon-1"]


def test_every_recipe_of_the_study_is_valid():
    names = set()
    for network, settings in study.everything():
        cfg = network.config(study.RECIPE, ROOT)
        epochs = [setting.epoch for setting in settings]
        assert cfg.model.block == network.block and epochs == sorted(epochs)
        names.add(network.name)
    designs = {Network(block=block, seed=2).name for block in BLOCKS}
    assert {Network(model).name for model in FAMILY} | designs <= names


def test_command_line(refused, call):
    refused(runs.main, 2, "no run is named nothing*", "nothing*")
    status, out, _ = call(runs.main, "--list", "S7-*")
    assert status == 0 and out.splitlines()[0].startswith("S7-adaLN-Zero-muon-0")


# The table

def test_the_committed_table_is_of_todays_recipe():
    """If it fails since a setting is new, whose value all rows share: see study.NOT_IN_DIGEST."""
    table = table_of_rows.read(TABLE)
    assert len(table) > 345 and study.current(table) == table


NEXT = len(TABLE.read_text().splitlines()) + 1  # the number of a line that is added


@pytest.fixture
def table_copy(tmp_path):
    """table_copy(change): a copy of runs.csv whose text is changed."""

    def make(change):
        path = tmp_path / "runs.csv"
        path.write_text(change(TABLE.read_text()))
        return path

    return make


@pytest.mark.parametrize("cut", [9, 1, 100, 150])
def test_a_row_that_a_full_disk_cut_does_not_count_and_is_replaced(cut, table_copy):
    """As head -c -9 leaves it; 150 cuts the row before the last one's end too."""
    whole, path = table_of_rows.read(TABLE), table_copy(lambda text: text[:-cut])
    left = table_of_rows.read(path)
    assert left == whole[:len(left)] and len(whole) - 2 <= len(left) < len(whole)
    for row in whole[len(left):]:
        network = Network(*(row[name] for name in vars(Network())))
        setting = Setting(*(row[name] for name in vars(Setting())))
        assert study.missing(network, [setting], left, study.RECIPE) == [setting]
        table_of_rows.append(path, row)
    assert table_of_rows.read(path) == whole
    assert path.read_text().count("\n") == len(whole) + 1


@pytest.mark.parametrize("damage", [
    lambda lines: lines[5][:60], lambda lines: lines[5][:60] + lines[6], lambda lines: "",
    lambda lines: lines[5].replace(lines[5].split(",")[list(COLUMNS).index("FID")], "", 1),
    lambda lines: "\0" * 40], ids=["short", "joined", "empty", "no FID", "zeros"])
def test_a_line_without_all_its_cells_does_not_count(damage, table_copy, capsys):
    def change(text):
        lines = text.split("\n")
        return "\n".join([*lines[:5], damage(lines), *lines[6:]])

    whole, path = table_of_rows.read(TABLE), table_copy(change)
    assert table_of_rows.read(path) == [*whole[:4], *whole[5:]]
    assert f"{path}, line 6: not whole" in capsys.readouterr().err
    table_of_rows.append(path, whole[4])
    assert table_of_rows.read(path) == [*whole[:4], *whole[5:], whole[4]]


def test_a_table_cut_within_its_header_starts_again(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(HEADER[:30])
    assert table_of_rows.read(path) == []
    row = table_of_rows.read(TABLE)[0]
    table_of_rows.append(path, row)
    assert table_of_rows.read(path) == [row]


@pytest.mark.parametrize(("change", "words"), [
    (lambda lines: [*lines, lines[20]], f"line {NEXT}: the same measurement as in line 21"),
    (lambda lines: [*lines[:9], lines[1], *lines[9:]], "line 10: the same measurement as in"),
    (lambda lines: [*lines, lines[20].replace(",1,2000,", ",1.0,2000,")], f"line {NEXT}: the same"),
    (lambda lines: [*lines[:9], lines[9].replace(",1,2000,", ",one,2000,")], "line 10: could not"),
    (lambda lines: [lines[0].replace(",digest", ""), *lines[1:]], "line 1: the columns are not")])
def test_a_table_that_says_two_things_is_refused_by_file_and_line(change, words, table_copy):
    path = table_copy(lambda text: "\n".join([*change(text.split("\n")[:-1]), ""]))
    with pytest.raises(DataError, match=f"{path}, {words}"):
        table_of_rows.read(path)


def test_figures_refuses_a_doubled_row_in_one_sentence(table_copy, refused, monkeypatch):
    path = table_copy(lambda text: text + text.split("\n")[1] + "\n")
    monkeypatch.setattr(figures, "TABLE", path)
    refused(figures.main, 1, f"line {NEXT}: the same measurement as in line 2")
    monkeypatch.setattr(runs, "TABLE", path)
    refused(runs.main, 1, f"line {NEXT}: the same measurement as in line 2", "--list")


@pytest.mark.parametrize("change", [{"lr": 0.005}, {"ema_decay": 0.9999}, {"loss": "l1"}])
def test_rows_of_another_recipe_are_missing_and_not_drawn(change, monkeypatch):
    table = table_of_rows.read(TABLE)
    network, settings = next((n, s) for n, s in study.everything() if n == Network())
    assert study.missing(network, settings, table, study.RECIPE) == []
    changed = replace(study.RECIPE, **change)
    assert study.missing(network, settings, table, changed) == list(settings)
    monkeypatch.setattr(study, "RECIPE", changed)
    assert Network().name not in {row["run"] for row in study.current(table)}


def test_what_changes_no_result_is_not_in_the_digest():
    same = replace(study.RECIPE, device="cpu", epochs=7, checkpoint_every=1, data_dir="elsewhere")
    assert Network().digest(same) == Network(seed=1).digest(study.RECIPE)
    assert Network().digest(study.RECIPE) != Network(recipe="adamw").digest(study.RECIPE)
    assert Network(predicts="x_0").name == "B4-adaLN-Zero-muon-x_0-0"


@pytest.mark.slow
def test_docstrings_are_not_needed():
    """python -OO drops them. In one process: torch takes long to import."""
    code = """
import importlib
for name, option in (("experiments.runs", "--list"), ("experiments.figures", "--help"),
                     ("benchmarks.training", "--help"), ("benchmarks.sampling", "--help")):
    try:
        importlib.import_module(name).main([option])
    except SystemExit as end:
        print(name, end.code)
"""
    ended = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True,
                           text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "B4-adaLN-Zero-muon-0" in ended.stdout and ended.stdout.count("usage:") == 3


# The pictures

def synthetic(network: Network, setting: Setting) -> dict:
    """A row as a run might have it."""
    costs = study.cost(network.config(TINY, ROOT).model)
    fid = 1e7 / costs["multiply_adds"] / setting.epoch * (1 + 0.1 * network.seed)
    return {"run": network.name, "step": 937 * setting.epoch, **vars(network), **vars(setting),
            **costs, **dict.fromkeys(METRICS, 0.9), "digest": network.digest(study.RECIPE),
            "FID": fid, "recall": 1 / (1 + fid), "precision": 1 / (2 + fid),
            "accuracy": 1 / (3 + fid), "density": 1 / (4 + fid), "coverage": 1 / (5 + fid),
            "test_loss": 0.03 + fid / 100, "train_seconds": 60.0, "device": "CPU", "torch": "2",
            "date": "2026-11-25", "classifier": "earlier"}


@pytest.fixture
def full_results(tmp_path):
    """runs.csv and samples/ as the whole study would leave them."""
    every = {(network, setting) for network, settings in study.everything() for setting in settings}
    real = [{"run": REAL, "n": n, **dict.fromkeys(METRICS, 0.9), "device": "CPU", "torch": "2",
             "date": "2026-11-25", "classifier": "earlier"} for n in (CURVE_IMAGES, FINAL_IMAGES)]
    every = (*real, *(synthetic(*one) for one in sorted(every, key=repr)))
    lines = [HEADER, *map(table_of_rows.line, every)]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "samples").mkdir()
    for model in FAMILY:
        Image.effect_noise((280, 28), 64).save(tmp_path / "samples" / f"{Network(model).name}.png")
    return tmp_path


PICTURES = {*(f"figure{number}.png" for number in (5, 6, 7, 8, 9, 10, 12, 13)), "guidance.png"}


def test_every_picture_is_drawn_from_the_table(full_results):
    figures.draw(study.current(table_of_rows.read(full_results / "runs.csv")), full_results)
    assert {path.name for path in full_results.glob("*.png")} == PICTURES
    text = (full_results / "tables.md").read_text()
    assert "| B/4 | adaLN-Zero | eps | muon | 8.35 | 255.8 | 3 |" in text
    assert "| XL/4 | 1.25 |" in text and "| ours | 11 | -1.00 (-1.00 to -1.00) | -1.0" in text


def test_pictures_without_rows_are_left_out(tmp_path, capsys):
    figures.draw([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]
    assert capsys.readouterr().out.count("left out") == len(PICTURES)


def test_a_started_study_can_be_drawn(full_results):
    """One network after its first epoch; a seed that is missing; no real images."""
    (full_results / "samples" / "S7-adaLN-Zero-muon-0.png").unlink()
    figures.draw([synthetic(Network(block="in-context"), Setting(EPOCHS[0])),
                  synthetic(Network("S/2"), Setting(n=FINAL_IMAGES))], full_results)
    drawn = {path.name for path in full_results.glob("*.png")}
    assert {"figure5.png", "figure7.png", "figure8.png", "figure12.png"} <= drawn


def test_the_committed_tables_are_those_of_the_table():
    text = TABLE.with_name("tables.md").read_text()
    assert text == tables.all_tables(study.current(table_of_rows.read(TABLE)))


# The statistics

@pytest.mark.parametrize(("dof", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262),
                                        (22, 2.074), (1000, 1.962)])
def test_quantiles_of_student_t(dof, t):
    """Those of every statistics book."""
    assert fits.t_quantile(dof) == pytest.approx(t, abs=6e-4)
    assert fits.t_within(t, dof) == pytest.approx(0.95, abs=1e-4)


def test_a_line_has_the_textbook_errors():
    """With one x: slope, its error, and the band, by the formulas of simple regression."""
    x, y = [1.0, 2.0, 4.0, 7.0, 8.0], [2.0, 2.5, 5.5, 6.0, 9.0]
    slope, intercept = statistics.linear_regression(x, y)
    squares = statistics.variance(x) * 4
    errors = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    residual = math.sqrt(sum(error**2 for error in errors) / 3)
    line = fits.Line(y, x)
    assert line.coefficient(1) == pytest.approx((slope, residual / math.sqrt(squares)))
    middle, width = line.at(3.0)
    error = residual * math.sqrt(1 / 5 + (3.0 - statistics.mean(x)) ** 2 / squares)
    assert (middle, width) == pytest.approx((intercept + 3 * slope, fits.t_quantile(3) * error))


def test_a_plane_is_recovered():
    x, z = [0.0, 1.0, 2.0, 3.0, 5.0], [1.0, 0.0, 4.0, 2.0, 2.0]
    line = fits.Line([3 - 0.5 * a + 2 * b for a, b in zip(x, z, strict=True)], x, z)
    assert line.b.tolist() == pytest.approx([3, -0.5, 2])


def test_paired_differences():
    """Of two degrees of freedom p has a closed form: 1 - t / sqrt(2 + t^2)."""
    mean, t, p = fits.paired([0.2, 0.5, -0.1])
    assert (mean, t) == pytest.approx((0.2, 0.2 / (0.3 / math.sqrt(3))))
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_correlation_interval():
    """Fisher's z, computed with a logarithm instead of atanh."""
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 2.0, 5.0, 4.0]
    r, low, high = fits.correlation_interval(x, y)
    z, width = 0.5 * math.log((1 + r) / (1 - r)), 1.96 / math.sqrt(2)
    assert (low, high) == pytest.approx(tuple((math.exp(2 * v) - 1) / (math.exp(2 * v) + 1)
                                              for v in (z - width, z + width)))


def test_a_token_narrower_than_its_patch_has_a_least_loss():
    """S/7: whatever x_t is, the patches of the output lie in 31 dimensions for given t and y."""
    config = FAMILY["S/7"]
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        out = model(torch.randn(16, 1, 28, 28), torch.full((16,), 300), torch.full((16,), 3))
    patches = out.reshape(16, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 49).double()
    values = torch.linalg.svdvals(patches - patches.mean(dim=0))
    assert (values > 1e-4 * values[0]).sum() == 31
    assert tables.least_loss(config) == pytest.approx(18 / 49)
    assert tables.least_loss(FAMILY["B/7"]) == 0


def test_where_curves_cross():
    small, large = [(0, 2), (4, 1)], [(1, 2.5), (2.5, 1), (3, 0.5)]  # 2 - x / 4 and 3.5 - x
    assert crossings.crossing(small, large) == pytest.approx(2)
    assert crossings.at(small, 2) == 1.5
    assert crossings.crossing(large, small) is None
    assert crossings.crossing(small, [(1, 5), (4, 2)]) is None
