"""runtime/speed.py: nothing it does may change a result."""

import os
from unittest import mock

import pytest
import torch
from conftest import TINY, run_script

import evaluate
from diffusion import noise
from inference import generate
from runtime import speed
from runtime.checkpoint import load_model
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


def fake_gpu(monkeypatch, captured):
    """`recorded` as on a GPU, except that `captured` stands in for CUDA's own part of it."""
    monkeypatch.setattr(speed, "records", lambda device: True)
    monkeypatch.setattr(speed, "captured", captured)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())


def rerun(function, inputs, stream, generator):
    """As a graph does: what the function reads now, into the tensor of the first time."""
    kept = []

    def replay():
        out = function(*inputs)
        kept.append(kept[0].copy_(out) if kept else out)
        return kept[0]

    return replay


def test_a_recorded_function_gets_every_call_s_inputs(monkeypatch):
    calls = []
    fake_gpu(monkeypatch, lambda *arguments: calls.append("captured") or rerun(*arguments))
    call = speed.recorded(lambda index, rate: (calls.append(rate), index.float() * rate)[1],
                          torch.device("cpu"))
    outs = [call(torch.tensor([n, n + 1]), 0.5 * n) for n in range(8)]
    assert [out.tolist() for out in outs] == [[0.5 * n * n, 0.5 * n * (n + 1)] for n in range(8)]
    assert calls.count("captured") == 1 and calls.index("captured") == speed.PLAIN_CALLS
    rates = [rate for rate in calls if rate != "captured"]
    assert len({id(rate) for rate in rates}) == 1 and rates[0].shape == ()


def test_a_failing_capture_costs_one_line(monkeypatch, capfd):
    def fails(function, inputs, stream, generator):
        function(*inputs)
        raise RuntimeError("the stream is not what it was") from None

    undone = []
    fake_gpu(monkeypatch, fails)
    call = speed.recorded(lambda x: x + 1, torch.device("cpu"), None, lambda: undone.append(1))
    assert [call(torch.tensor(n)).item() for n in range(8)] == list(range(1, 9))
    out, err = capfd.readouterr()
    assert (out + err).count("\n") == len(undone) == 1 and "stream is not what it was" in out + err


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_recorded_run_ends_where_a_plain_one_does(tmp_path, train_tiny, monkeypatch, optimizer):
    """And a run that is stopped and resumed, bit for bit where a recorded one ends."""
    def ends(name, *options, resume=False):
        status, _, err = train_tiny(tmp_path / name, "--optimizer", optimizer, *options)
        assert status == 0, err
        weights = load_model(tmp_path / name / "model.pth")[0].state_dict()
        return torch.cat([values.flatten() for values in weights.values()])

    plain = ends("plain", "--epochs", 4, "--lr-schedule", "constant")
    fake_gpu(monkeypatch, rerun)
    fast = ends("fast", "--epochs", 4, "--lr-schedule", "constant")
    assert (plain - fast).abs().max() < 1e-4 and not torch.equal(plain, plain * 0)
    ends("parts", "--epochs", 2, "--lr-schedule", "constant")
    parts = ends("parts", "--epochs", 4, "--lr-schedule", "constant", "--resume")
    assert torch.equal(parts, fast)


@pytest.mark.parametrize("sampler", [{"sampler": "ddpm", "steps": 9},
                                     {"sampler": "ddim", "steps": 9, "eta": 0.5}])
def test_recorded_samples_are_the_plain_ones(open_network, monkeypatch, sampler):
    def samples():
        seen = []
        x_0 = generate(open_network, [0, 1, 2, 3], seed=[5, 6], **sampler,
                       on_step=lambda t, x_t: seen.append(x_t))
        return torch.stack([*seen, x_0])

    plain = samples()
    apart = [generate(open_network, y, seed=seed, **sampler) for y, seed in (([0, 1], 5), ([2, 3], 6))]
    assert torch.allclose(plain[-1], torch.cat(apart), atol=1e-5)
    fake_gpu(monkeypatch, rerun)
    assert torch.equal(samples(), plain)


def test_the_same_digits_whatever_the_batch(open_network, monkeypatch):
    monkeypatch.setattr(evaluate, "generate", lambda model, y, seed: (
        noise((len(y), 1, 28, 28), [torch.Generator().manual_seed(one) for one in seed])))
    few = evaluate.sample_images(open_network, 1000, 3)
    monkeypatch.setattr(evaluate, "records", lambda device: True)
    monkeypatch.setattr(evaluate, "AT_ONCE", 3)
    many = evaluate.sample_images(open_network, 1000, 3)
    assert all(map(torch.equal, few, many))
