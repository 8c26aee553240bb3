"""speed.py: nothing it does may change a result."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script
from torch import nn

import speed
import train
from config import ModelConfig
from dit import DiT
from speed import SigmoidGELU, compiled


def gradients(network, model, x, t, y):
    model.zero_grad()
    out = network(x, t, y)
    (out**2).sum().backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(6, 2, 12, 12), torch.tensor([0, 3, 50, 400, 998, 999]), torch.tensor([0, 1, 2, 3, 4, 5])


def test_compiled_network_and_its_gradients_are_the_same(open_network, batch):
    plain = gradients(open_network, open_network, *batch)
    network = compiled(open_network, *batch)
    assert network is not open_network, "no compiler here?"
    fast = gradients(network, open_network, *batch)
    for name, value in plain.items():
        assert torch.allclose(value, fast[name], rtol=1e-4, atol=1e-4 * value.abs().max().item()), name


def test_compiling_leaves_the_random_stream_and_the_gradients_alone(open_network, batch, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    before = torch.get_rng_state()
    network = compiled(open_network, *batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in network.parameters())


def test_without_a_compiler_the_plain_network_goes_on(open_network, batch, monkeypatch, capfd):
    def broken(model, dynamic):
        def call(*batch):
            raise RuntimeError("no g++ here\nmore words")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    network = compiled(open_network, *batch)
    assert network is open_network
    assert all(isinstance(block.mlp.act, nn.GELU) for block in network.blocks)
    out, err = capfd.readouterr()
    assert (out + err).strip().splitlines() == ["goes on uncompiled, which is slower: no g++ here"]


@pytest.mark.slow
def test_training_on_a_machine_without_a_compiler(tmp_path):
    cold = {"CXX": "/there/is/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = run_script("train.py", *TINY, "--compile", "--epochs", 1, "--checkpoint", "model.pth", cwd=tmp_path,
                       env=os.environ | cold)
    assert ended.returncode == 0, ended.stderr
    assert (ended.stdout + ended.stderr).count("goes on uncompiled") == 1 and "Traceback" not in ended.stderr
    assert (tmp_path / "model.pth").exists()


def test_training_compiled_ends_where_plain_training_does(tmp_path, train_tiny):
    curves = []
    for option in ("--no-compile", "--compile"):
        folder = tmp_path / option
        folder.mkdir()
        assert train_tiny(folder, option, "--epochs", 2)[0] == 0
        curves.append([line.split(",")[:4] for line in (folder / "loss.csv").read_text().splitlines()[1:]])
    plain, fast = (torch.tensor([[float(value) for value in row] for row in curve]) for curve in curves)
    assert torch.allclose(plain, fast, rtol=1e-4), (plain, fast)


def test_sigmoid_gelu_is_the_gelu_of_the_network():
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64, requires_grad=True)
    ours, theirs = SigmoidGELU()(x), DiT(ModelConfig(depth=1)).blocks[0].mlp.act(x)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(out.sum(), x)[0] for out in (ours, theirs)), rtol=1e-10, atol=1e-10)


PAGES = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from speed import keep_freed_memory
if {kept}:
    keep_freed_memory()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    new_pages()
print(new_pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept():
    new_pages = [int(subprocess.run([sys.executable, "-c", PAGES.format(root=str(ROOT), kept=kept)], check=True,
                                    capture_output=True, text=True).stdout) for kept in (False, True)]
    assert new_pages[1] < 100 < 10_000 < new_pages[0], new_pages


def test_where_there_is_no_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda name: object())
    speed.keep_freed_memory()
    monkeypatch.setattr(speed.sys, "platform", "darwin")
    speed.keep_freed_memory()


def test_first_line():
    assert speed.first_line(RuntimeError("\n one\ntwo")) == "one"
    assert speed.first_line(RuntimeError()) == "RuntimeError"
    assert train.compiled is compiled
