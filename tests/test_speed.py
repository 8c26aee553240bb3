"""runtime/speed.py: nothing it does may change a result."""

import os
import resource
import sys
from functools import partial

import pytest
import torch
from conftest import TINY, run_script
from torch import nn

from config import ModelConfig
from dit import DiT
from inference import generate
from runtime import speed
from runtime.fused import is_fused
from runtime.speed import compiled


def gradients(network, model):
    generator = torch.Generator().manual_seed(1)
    model.zero_grad()
    out = network(torch.randn(6, 2, 12, 12, generator=generator), torch.tensor([0, 3, 50, 400, 998, 999]), torch.arange(6))
    (out**2).sum().backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def unfused(monkeypatch):
    """As on a GPU: torch.compile alone."""
    monkeypatch.setattr(speed, "fused", lambda model: model)


def test_on_a_cpu_the_compiled_network_is_fused(open_network):
    assert is_fused(compiled(open_network, 6))


@pytest.mark.slow
def test_compiled_network_and_its_gradients_are_the_same(open_network, unfused):
    plain = gradients(open_network, open_network)
    network = compiled(open_network, 6)
    assert network is not open_network, "no compiler here?"
    fast = gradients(network, open_network)
    for name, value in plain.items():
        assert torch.allclose(value, fast[name], rtol=1e-4, atol=1e-4 * value.abs().max().item()), name


@pytest.mark.parametrize("works", [True, False])
def test_compiling_leaves_random_numbers_and_gradients_alone(open_network, unfused, monkeypatch, capfd, works):
    """And where there is no compiler, one line says so and the network is the plain one."""
    def broken(*batch):
        raise RuntimeError("no g++ here\nmore words")

    monkeypatch.setattr(torch, "compile", lambda model, **settings: model if works else broken)
    before = torch.get_rng_state()
    network = compiled(open_network.train(), 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert network is open_network and all(p.grad is None for p in network.parameters())
    out, err = capfd.readouterr()
    assert (out + err).count("no g++ here") == (out + err).count("\n") == (0 if works else 1)


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
        folder.mkdir()
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


def test_where_there_is_no_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda name: object())
    speed.keep_freed_memory()
    monkeypatch.setattr(speed.sys, "platform", "darwin")
    speed.keep_freed_memory()


@pytest.mark.parametrize("guidance", [0, 1, 3])
def test_sampling_is_the_same_with_and_without_fused_blocks(guidance, monkeypatch):
    torch.manual_seed(0)
    model = DiT(ModelConfig(hidden_size=16, depth=1, num_heads=2)).eval()
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight, std=0.5)
    sample = partial(generate, model, torch.tensor([3, 1, 4]), steps=10, guidance=guidance, seed=1)
    fast = sample()
    monkeypatch.setattr("inference.fused", lambda model, **settings: model)
    plain = sample()
    assert torch.allclose(fast, plain, atol=1e-4) and plain.std() > 0.1
