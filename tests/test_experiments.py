"""The study in miniature: what is missing is done once, even if workers die or share it; pictures need only its results."""

import math
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from config import BLOCKS, FAMILY
from evaluate import Classifier
from experiments import figures, runs, study, tables
from experiments.study import CURVE_IMAGES, EPOCHS, REAL, Network, Setting

TINY = replace(study.RECIPE, limit=300, batch_size=100, data_dir=str(ROOT / "mnist"), device="cpu", compile=False)
ENTRIES = [(Network("S/7"), [Setting(1, 2, n=100), Setting(3, 2, n=100), Setting(3, 1, 2.0, n=100)]),
           (Network("S/7", "in-context", seed=1), [Setting(1, 2, n=100)])]


def worker(folder) -> runs.Worker:
    torch.manual_seed(0)
    return runs.Worker(TINY, folder / "runs", folder / "results" / "runs.csv", Classifier().eval())


def in_a_process(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def rows(folder) -> list[dict]:
    return study.read(folder / "results" / "runs.csv")


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
    assert [row["run"] for row in table] == [REAL, *["S7-adaLN-Zero-muon-0"] * 3, "S7-in-context-muon-1"]
    first, third = table[1], table[3]
    assert (first["step"], first["epoch"], first["multiply_adds"], first["parameters"]) == (3, 1, 718_848, 71_697)
    assert (third["step"], third["epoch"], third["sampling_steps"], third["guidance"], third["n"]) == (9, 3, 1, 2.0, 100)
    assert all(math.isfinite(row["FID"]) for row in table) and first["test_loss"] > third["test_loss"] > 0
    strips = {path.name: Image.open(path).size for path in (undisturbed / "results" / "samples").iterdir()}
    assert strips == {"S7-adaLN-Zero-muon-0.png": (280, 28), "S7-in-context-muon-1.png": (280, 28)}
    monkeypatch.setattr("train.train", None)
    worker(undisturbed).work(ENTRIES)
    assert rows(undisturbed) == table


@pytest.mark.parametrize(("moment", "count"), [("save_strip", 1), ("append", 3)])
def test_a_killed_worker_is_continued(moment, count, tmp_path, undisturbed, monkeypatch):
    """Killed between training and measuring, or between measuring and writing: the next one ends with the same table."""
    calls, original = iter(range(1, 100)), getattr(runs.Worker, moment)

    def killed():
        monkeypatch.setattr(runs.Worker, moment, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
                            if next(calls) == count else original(*arguments))
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
        assert cfg.model.block == network.block and [s.epoch for s in settings] == sorted(s.epoch for s in settings)
        names.add(network.name)
    assert {Network(model).name for model in FAMILY} | {Network(block=block, seed=2).name for block in BLOCKS} <= names


def test_command_line(refused, call):
    refused(runs.main, 2, "no run is named nothing*", "nothing*")
    status, out, _ = call(runs.main, "--list", "S7-*")
    assert status == 0 and out.splitlines()[0].startswith("S7-adaLN-Zero-muon-0")


def synthetic(network: Network, setting: Setting) -> dict:
    """A row as a run might have it."""
    costs = study.cost(network.config(TINY, ROOT).model)
    return {"run": network.name, "step": 937 * setting.epoch, **vars(network), **vars(setting), **costs, "accuracy": 0.9,
            "FID": 1e7 / costs["multiply_adds"] / setting.epoch, "precision": 0.8, "recall": 0.7,
            "train_seconds": 60.0}


@pytest.fixture
def full_results(tmp_path):
    """runs.csv and samples/ as the whole study would leave them."""
    every = {(network, setting) for network, settings in study.everything() for setting in settings}
    real = [{"run": REAL, "n": n, "FID": 0.5, "accuracy": 0.995, "precision": 0.9, "recall": 0.9}
            for n in (CURVE_IMAGES, study.FINAL_IMAGES)]
    lines = [study.line(row) for row in (*real, *(synthetic(*one) for one in sorted(every, key=repr)))]
    (tmp_path / "runs.csv").write_text(",".join(study.COLUMNS) + "\n" + "".join(lines))
    (tmp_path / "samples").mkdir()
    for model in FAMILY:
        Image.effect_noise((280, 28), 64).save(tmp_path / "samples" / f"{Network(model).name}.png")
    return tmp_path


PICTURES = {f"{name}.png" for name in ("figure5", "figure6", "figure7", "figure8", "figure9", "figure10", "guidance")}


def test_every_picture_is_drawn_from_the_table(full_results):
    figures.draw(study.read(full_results / "runs.csv"), full_results)
    assert {path.name for path in full_results.glob("*.png")} == PICTURES
    text = (full_results / "tables.md").read_text()
    assert "| B/4 | adaLN-Zero | muon | 8.35 | 255.8 | 3 |" in text and "| XL/4 | 1.25 |" in text


def test_pictures_without_rows_are_left_out(tmp_path, capsys):
    figures.draw([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]
    assert capsys.readouterr().out.count("left out") == len(PICTURES)


def test_a_started_study_can_be_drawn(full_results):
    """One network after its first epoch; a seed that is missing; no real images."""
    (full_results / "samples" / "S7-adaLN-Zero-muon-0.png").unlink()
    some = [synthetic(Network(block="in-context"), Setting(EPOCHS[0])), synthetic(Network("S/2"), Setting(n=10_000))]
    figures.draw(some, full_results)
    assert {"figure5.png", "figure7.png", "figure8.png"} <= {path.name for path in full_results.glob("*.png")}


def test_correlation_is_of_the_logarithms():
    assert figures.correlation([(10**x, 5 * 10**(-2 * x)) for x in (1, 2, 4)]) == pytest.approx(-1)


def test_where_curves_cross():
    small, large = [(0, 2), (4, 1)], [(1, 2.5), (2.5, 1), (3, 0.5)]  # 2 - x / 4 and 3.5 - x
    assert tables.crossing(small, large) == pytest.approx(2) and tables.at(small, 2) == 1.5
    assert tables.crossing(large, small) is None and tables.crossing(small, [(1, 5), (4, 2)]) is None
