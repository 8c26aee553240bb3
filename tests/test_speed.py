"""runtime/speed.py: nothing it does may change a result."""

import os
from unittest import mock

import pytest
import torch
from conftest import TINY, run_script

from runtime import speed
from runtime.fused import FusedBlocks
from runtime.speed import compiled
from runtime.start import before_torch


@pytest.fixture
def unfused(monkeypatch):
    """As on a GPU: torch.compile alone."""
    monkeypatch.setattr(speed, "fused", lambda model: model)


def test_on_a_cpu_the_compiled_network_is_fused(open_network):
    assert type(compiled(open_network, 6).blocks[0]) is FusedBlocks


@pytest.mark.parametrize("works", [True, False])
def test_compiling_leaves_random_numbers_and_gradients_alone(open_network, unfused, monkeypatch,
                                                             capfd, works):
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
    cold = os.environ | {"CXX": "/there/is/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
                         "XDG_CACHE_HOME": str(tmp_path)}
    ended = run_script("train.py", *TINY, "--compile", "--epochs", 1, "--hidden-size", 12,
                       cwd=tmp_path, env=cold)
    assert ended.returncode == 0, ended.stderr
    assert "slower" in ended.stdout + ended.stderr and "Traceback" not in ended.stderr
    assert (tmp_path / "model.pth").exists()


@pytest.mark.parametrize("block", [
    "adaLN-Zero", pytest.param("cross-attention", marks=pytest.mark.slow)])
def test_training_compiled_ends_where_plain_training_does(tmp_path, train_tiny, block):
    curves = []
    for option in ("--no-compile", "--compile"):
        folder = tmp_path / option
        assert train_tiny(folder, option, "--epochs", 2, "--block", block)[0] == 0
        lines = (folder / "loss.csv").read_text().splitlines()[1:]
        curves.append(torch.tensor([[float(x) for x in line.split(",")[:4]] for line in lines]))
    plain, fast = curves
    assert torch.allclose(plain, fast, rtol=1e-4), (plain, fast)


@pytest.mark.parametrize(("settings", "spins"), [
    ({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_openmp_spins_less_unless_the_user_chose(settings, spins):
    with mock.patch.dict(os.environ, settings, clear=True), mock.patch("signal.signal"):
        before_torch()
        assert os.environ.get("GOMP_SPINCOUNT") == spins
