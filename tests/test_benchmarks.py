"""The benchmarks run, and compare with the roofline."""

import pytest
from PIL import Image

from benchmarks import sampling, training
from config import ModelConfig

SMALL = ["--hidden-size", "16", "--depth", "1", "--batch-size", "8", "--rounds", "1", "--device", "cpu"]


@pytest.mark.parametrize(("benchmark", "options"), [(training, []), (sampling, []), (sampling, ["--guidance", "2"])])
def test_both_kinds_are_compared_with_the_roofline(benchmark, options, capsys):
    benchmark.main([*SMALL, *options])
    assert capsys.readouterr().out.count("x roofline") == 2


def test_step_times_of_the_family(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FAMILY", {name: ModelConfig(hidden_size=16, depth=1, patch_size=int(name[-1]))
                                             for name in ("S/7", "S/4")})
    training.main([*SMALL, "--scaling", str(tmp_path / "step_time.png")])
    assert Image.open(tmp_path / "step_time.png").size == (768, 512)
