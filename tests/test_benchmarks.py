"""The benchmarks run, and count the arithmetic that there is."""

from functools import partial

import pytest
import torch
from conftest import ROOT

from benchmarks import measure, quality, sampling, training
from config import ModelConfig
from dataset import load_mnist
from dit import DiT
from evaluate import Recogniser


def test_arithmetic_of_the_network():
    """Counted by hand: twice the multiplications of every matrix product, for one image of 49 patches."""
    L, D = 49, 64
    block = L * (3 * D * D + D * D + 8 * D * D) + 2 * L * L * D + 6 * D * D
    whole = L * 16 * D + 256 * D + D * D + 3 * block + 2 * D * D + L * D * 16
    model, zeros = DiT(ModelConfig()), torch.zeros(1, dtype=torch.long)
    assert measure.arithmetic(lambda: model(torch.zeros(1, 1, 28, 28), zeros, zeros)) == 2 * whole


def test_medians_are_of_what_was_called():
    calls = []
    times, rate = measure.medians(torch.device("cpu"), {name: lambda name=name: calls.append(name) for name in "ab"}, 3, 4)
    assert set(times) == {"a", "b"} and all(time >= 0 for time in times.values()) and rate > 1e9
    assert calls.count("a") == calls.count("b") == 3 * 4 + measure.WARM_UP


SMALL = ["--hidden-size", "16", "--depth", "1", "--rounds", "1", "--device", "cpu"]


@pytest.mark.slow
def test_training_benchmark(capsys):
    training.main(["--batch-size", "8", *SMALL])
    out = capsys.readouterr().out
    assert "plain" in out and "compiled" in out and out.count("x floor") == 2


def test_scaling_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "FAMILY", [(16, 1, 7), (16, 1, 4)])
    monkeypatch.setattr(training, "compiled", lambda model, *batch: model)
    training.main(["--batch-size", "8", "--scaling", str(tmp_path / "scaling.png"), *SMALL])
    assert capsys.readouterr().out.count("x floor") == 2 and (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize("guidance", ["1", "2"])
def test_sampling_benchmark(guidance, capsys):
    sampling.main(["--batch-size", "3", "--guidance", guidance, *SMALL])
    out = capsys.readouterr().out
    assert "plain" in out and "generate" in out and out.count("x floor") == 2


@pytest.mark.parametrize("what", ["steps", "guidance"])
def test_quality_pictures(what, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quality, "trained_recogniser", lambda *arguments: Recogniser().eval())
    monkeypatch.setattr(quality, "STEP_COUNTS", (1, 2))
    monkeypatch.setattr(quality, "STRENGTHS", (1.0, 2.0))
    monkeypatch.setattr("inference.compiled", lambda model, *batch: model)
    monkeypatch.setattr(quality, "load_mnist", partial(load_mnist, limit=200))
    quality.main([what, str(tmp_path / "picture.png"), "--n", "100", "--device", "cpu"])
    rows = (tmp_path / "picture.csv").read_text().splitlines()
    assert rows[0] == "sampler,steps,guidance,accuracy,Frechet distance,precision,coverage"
    assert len(rows) == (6 if what == "steps" else 4) and rows[-1].startswith("real images,,,")
    assert (tmp_path / "picture.png").stat().st_size > 5000
