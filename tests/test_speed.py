"""speed.py: nothing it does may change a result."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY, run_script
from torch import nn

import train
from config import ModelConfig, TrainConfig
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from runtime import speed
from runtime.fused import fused, is_fused
from runtime.speed import Row, compiled, pieces, tabulated


def gradients(network, model, x, t, y):
    model.zero_grad()
    out = network(x, t, y)
    (out**2).sum().backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(6, 2, 12, 12), torch.tensor([0, 3, 50, 400, 998, 999]), torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.fixture
def unfused(monkeypatch):
    """As on a GPU, or in bfloat16: torch.compile alone."""
    monkeypatch.setattr(speed, "fused", lambda model: model)


def test_on_a_cpu_the_compiled_network_is_fused(open_network, batch):
    assert is_fused(compiled(open_network, *batch))


@pytest.mark.slow
def test_compiled_network_and_its_gradients_are_the_same(open_network, batch, unfused):
    plain = gradients(open_network, open_network, *batch)
    network = compiled(open_network, *batch)
    assert network is not open_network, "no compiler here?"
    fast = gradients(network, open_network, *batch)
    for name, value in plain.items():
        assert torch.allclose(value, fast[name], rtol=1e-4, atol=1e-4 * value.abs().max().item()), name


def test_compiling_leaves_the_random_stream_and_the_gradients_alone(open_network, batch, unfused, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)
    before = torch.get_rng_state()
    network = compiled(open_network, *batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in network.parameters())


def test_without_a_compiler_the_plain_network_goes_on(open_network, batch, unfused, monkeypatch, capfd):
    def broken(model, **settings):
        def call(*batch):
            raise RuntimeError("no g++ here\nmore words")
        return call

    monkeypatch.setattr(torch, "compile", broken)
    network = compiled(open_network, *batch)
    assert network is open_network
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


@pytest.mark.slow
def test_training_compiled_ends_where_plain_training_does(tmp_path, train_tiny):
    curves = []
    for option in ("--no-compile", "--compile"):
        folder = tmp_path / option
        folder.mkdir()
        assert train_tiny(folder, option, "--epochs", 2)[0] == 0
        curves.append([line.split(",")[:4] for line in (folder / "loss.csv").read_text().splitlines()[1:]])
    plain, fast = (torch.tensor([[float(value) for value in row] for row in curve]) for curve in curves)
    assert torch.allclose(plain, fast, rtol=1e-4), (plain, fast)


PAGES = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from runtime.speed import keep_freed_memory
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


def test_tabulated_network_is_the_network(open_network):
    times, labels = torch.tensor([7, 0, 999, 40]), torch.tensor([3, 1, 3])
    fast = tabulated(open_network, times, labels)
    x_t = torch.randn(5, 2, 12, 12)
    y = torch.tensor([3, 1, open_network.y_embedder.null_class, 3, 1])
    with torch.no_grad():
        for t in times:
            expected = open_network(x_t, t.expand(5), y)
            assert torch.allclose(fast(x_t, t.expand(5), y), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert is_fused(fast) and not any(isinstance(module, Row) for module in open_network.modules())


def test_tables_that_would_be_large_are_not_made(open_network, monkeypatch):
    monkeypatch.setattr(speed, "LARGE_TABLES", 100)
    fast = tabulated(open_network, torch.arange(1000), torch.arange(3))
    assert not any(isinstance(module, Row) for module in fast.modules())
    x_t, t, y = torch.randn(2, 2, 12, 12), torch.tensor([4, 999]), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.allclose(fast(x_t, t, y), open_network(x_t, t, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("guidance", "compile"), [(0, False), (1, False), (3, False),
                                                   pytest.param(3, True, marks=pytest.mark.slow)])
def test_sampling_is_the_same_with_and_without_the_tricks(guidance, compile, monkeypatch):
    torch.manual_seed(0)
    model = DiT(ModelConfig(hidden_size=16, depth=1, num_heads=2)).eval()
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    nn.init.normal_(model.blocks[0].adaLN_modulation[1].weight, std=0.5)
    draw = partial(generate, model, torch.tensor([3, 1, 4]), steps=10, guidance=guidance, seed=1)
    fast = draw(compile=compile)
    monkeypatch.setattr("inference.tabulated", lambda model, times, labels: model)
    plain = draw()
    assert torch.allclose(fast, plain, atol=1e-4)
    assert plain.std() > 0.1


@pytest.mark.parametrize(("N", "sizes"), [(300, [100] * 3), (256, [64] * 4), (64, [64]), (7, [7]), (101, [101]),
                                            (202, [202])])
def test_pieces_are_equal_parts_of_the_batch(N, sizes):
    first, second = torch.arange(N), torch.arange(2 * N).reshape(N, 2)
    parts = pieces(nn.Identity(), first, second)
    assert [len(part[0]) for part in parts] == sizes
    assert torch.equal(torch.cat([part[0] for part in parts]), first)
    assert torch.equal(torch.cat([part[1] for part in parts]), second)


def test_pieces_for_fused_blocks_are_larger(open_network):
    network = fused(open_network)
    for N, sizes in ((300, [300]), (500, [500]), (1000, [500] * 2)):
        assert [len(part[0]) for part in pieces(network, torch.arange(N))] == sizes


@pytest.mark.parametrize("min_snr", [0.0, 1.0])
def test_gradients_of_the_pieces_are_those_of_the_batch(min_snr, monkeypatch):
    torch.manual_seed(0)
    model, diffusion = DiT(ModelConfig(hidden_size=16, depth=1, num_heads=2)), GaussianDiffusion(1000)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    cfg = TrainConfig(min_snr=min_snr, loss="mse")
    x_0, y = torch.rand(200, 1, 28, 28) * 2 - 1, torch.arange(200) % 11
    batch = [x_0, y, *diffusion.draw_t_and_eps(x_0)]
    found = []
    for largest in (100, 1000):
        monkeypatch.setattr(speed, "LARGEST_PIECE", largest)
        model.zero_grad()
        loss = train.add_gradients(model, model, diffusion, batch, cfg)
        found.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert found[0][0].item() == pytest.approx(diffusion.loss(model, *batch, "mse", min_snr).item(), rel=1e-5)
    for of_pieces, of_batch in zip(*found, strict=True):
        assert torch.allclose(of_pieces, of_batch, rtol=1e-4, atol=1e-6 * of_batch.abs().max().item() + 1e-9)
