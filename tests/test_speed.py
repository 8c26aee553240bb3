"""runtime/speed.py: nothing it does may change a result."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script

from runtime import speed
from runtime.fused import FusedBlocks
from runtime.speed import compiled


@pytest.fixture
def unfused(monkeypatch):
    """As on a GPU: torch.compile alone."""
    monkeypatch.setattr(speed, "fused", lambda model: model)


def test_on_a_cpu_the_compiled_network_is_fused(open_network):
    assert type(compiled(open_network, 6).blocks[0]) is FusedBlocks


@pytest.mark.parametrize("works", [True, False])
def test_compiling_leaves_random_numbers_and_gradients_alone(open_network, unfused, monkeypatch, capfd, works):
    """And where there is no compiler, a line says so and the network is the plain one."""
    def broken(*batch):
        raise RuntimeError("no g++ here\nmore words")

    monkeypatch.setattr(torch, "compile", lambda model, **settings: model if works else broken)
    before = torch.get_rng_state()
    network = compiled(open_network.train(), 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert network is open_network and all(p.grad is None for p in network.parameters())
    out, err = capfd.readouterr()
    assert (out + err).count("no g++ here") == (out + err).count("\n") - 1 == (0 if works else 1)


@pytest.mark.slow
def test_training_on_a_machine_without_a_compiler(tmp_path):
    cold = os.environ | {"CXX": "/there/is/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    ended = run_script("train.py", *TINY, "--compile", "--epochs", 1, "--hidden-size", 12, cwd=tmp_path, env=cold)
    assert ended.returncode == 0, ended.stderr
    assert "slower" in ended.stdout + ended.stderr and "Traceback" not in ended.stderr
    assert (tmp_path / "model.pth").exists()


@pytest.mark.parametrize("block", ["adaLN-Zero", pytest.param("cross-attention", marks=pytest.mark.slow)])
def test_training_compiled_ends_where_plain_training_does(tmp_path, train_tiny, block):
    curves = []
    for option in ("--no-compile", "--compile"):
        folder = tmp_path / option
        assert train_tiny(folder, option, "--epochs", 2, "--block", block)[0] == 0
        curves.append([line.split(",")[:4] for line in (folder / "loss.csv").read_text().splitlines()[1:]])
    plain, fast = (torch.tensor([[float(value) for value in row] for row in curve]) for curve in curves)
    assert torch.allclose(plain, fast, rtol=1e-4), (plain, fast)


def new_pages(kept):
    """How many pages of memory Linux has to provide for four tensors of a size that was freed before."""
    if kept:
        speed.keep_freed_memory()
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept(forked):
    found = []
    for kept in (False, True):
        with forked.Pool(1) as pool:
            found.append(pool.apply(new_pages, (kept,)))
    assert found[1] < 100 < 10_000 < found[0], found


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_openmp_spins_less_unless_the_user_chose(settings, expected):
    code = "import os; from runtime.start import before_torch; before_torch(); print(os.environ.get('GOMP_SPINCOUNT'))"
    chosen = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=chosen | settings, capture_output=True, text=True)
    assert ended.stdout.strip() == expected
