"""The benchmarks run, and count the arithmetic that there is."""

import pytest
import torch
from PIL import Image

from benchmarks import measure, sampling, training
from config import ModelConfig
from dit import DiT

SMALL = ["--hidden-size", "16", "--depth", "1", "--batch-size", "8", "--rounds", "1", "--device", "cpu"]


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


@pytest.mark.parametrize(("benchmark", "options"), [(training, []), (sampling, []), (sampling, ["--guidance", "2"])])
def test_both_kinds_are_compared_with_the_roofline(benchmark, options, capsys):
    benchmark.main([*SMALL, *options])
    assert capsys.readouterr().out.count("x roofline") == 2


def test_step_times_of_the_family(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FAMILY", {name: ModelConfig(hidden_size=16, depth=1, patch_size=int(name[-1]))
                                             for name in ("S/7", "S/4")})
    training.main([*SMALL, "--scaling", str(tmp_path / "step_time.png")])
    assert Image.open(tmp_path / "step_time.png").size == (768, 512)
