"""The benchmarks run, and compare with the roofline."""

import json
import time

import pytest
from conftest import ROOT
from PIL import Image

from benchmarks import gpu, sampling, training
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


def test_what_a_gpu_is_measured_with(tmp_path):
    """On a CPU: each measurement gives its numbers; a process that hangs is cut, one that fails is kept."""
    recipe = {"device": "cpu", "compile": False, "batch_size": 8, "limit": 50, "data_dir": str(ROOT / "mnist"),
              "model": ModelConfig(hidden_size=16, depth=1)}
    assert gpu.step_time(tmp_path, repeats=2, **recipe)["ms"] > 0
    part = gpu.Part(tmp_path, "times", time.monotonic() + 60)
    assert gpu.sampling_time(4, 2, "cpu")["seconds per call"] > 0
    found = part.item("prints", ["-c", "print('a line'); print('{\"ms\": 3}')"], 50)
    assert found["status"] == 0 and found["ms"] == 3, found
    assert part.item("hangs", ["-c", "input()\nwhile True: pass"], 1, read=dict)["status"] != 0
    part.deadline = time.monotonic() + 5
    assert part.item("too late", ["-c", "1 / 0"], 50) == {"left out": True}
    assert json.loads((tmp_path / "times.json").read_text())["prints"] == found
    assert gpu.held_out_time("cpu", 300)["batches"] == 2
