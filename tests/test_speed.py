"""runtime/speed.py: nothing it does may change a result."""

from unittest import mock

import pytest
import torch
from test_train import rows

from inference import generate
from runtime import speed
from runtime.checkpoint import load_model
from runtime.speed import compiled


def test_what_cannot_be_compiled_is_the_plain_network(open_network, monkeypatch, capfd):
    """And a line says so, random numbers and gradients are as before."""
    def broken(*batch):
        raise RuntimeError("no g++ here\nmore words")

    monkeypatch.setattr(speed, "fused", lambda model: model)  # as on a GPU
    monkeypatch.setattr(torch, "compile", lambda model, **settings: broken)
    before = torch.get_rng_state()
    network = compiled(open_network.train(), 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert network is open_network and all(p.grad is None for p in network.parameters())
    assert "slower: no g++ here\n" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_training_compiled_ends_where_plain_training_does(tmp_path, train_tiny):
    for options in ((), ("--block", "cross-attention")):  # in C++, and by torch.compile
        plain, fast = tmp_path / f"plain{len(options)}", tmp_path / f"fast{len(options)}"
        assert train_tiny(plain, "--epochs", 2, *options)[0] == 0
        assert train_tiny(fast, "--epochs", 2, *options, "--compile")[0] == 0
        curves = [torch.tensor([[float(row["train_loss"]), float(row["test_loss"])]
                                for row in rows(folder)]) for folder in (plain, fast)]
        assert torch.allclose(*curves, rtol=1e-4), curves


def fake_gpu(monkeypatch, captured):
    """`recorded` as on a GPU, except that `captured` stands in for CUDA's own part of it."""
    monkeypatch.setattr(speed, "records", lambda device: True)
    monkeypatch.setattr(speed, "captured", captured)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())


def rerun(function, inputs, stream, generator):
    """As a graph and its result: what the function gives for the present inputs."""
    fake = mock.Mock()
    fake.replay = lambda: setattr(fake, "out", function(*inputs))
    fake.clone = lambda: fake.out.clone()
    return fake, fake


def test_a_failing_capture_costs_one_line(monkeypatch, capfd):
    def fails(function, inputs, stream, generator):
        function(*inputs)
        raise torch.cuda.OutOfMemoryError("no memory is left") from None

    undone = []
    fake_gpu(monkeypatch, fails)
    call = speed.recorded(lambda x: x + 1, torch.device("cpu"), None, lambda: undone.append(1))
    assert [call(torch.tensor(n)).item() for n in range(8)] == list(range(1, 9))
    out, err = capfd.readouterr()
    assert (out + err).count("\n") == len(undone) == 1 and "no memory is left" in out + err


def test_a_recorded_run_ends_where_a_plain_one_does(tmp_path, train_tiny, monkeypatch):
    """And a run that is stopped and resumed, bit for bit where a recorded one ends."""
    def ends(name, *options):
        status, _, err = train_tiny(tmp_path / name, "--lr-schedule", "constant", *options)
        assert status == 0, err
        weights = load_model(tmp_path / name / "model.pth")[0].state_dict()
        return torch.cat([values.flatten() for values in weights.values()])

    plain = ends("plain", "--epochs", 4)
    fake_gpu(monkeypatch, rerun)
    fast = ends("fast", "--epochs", 4)
    assert (plain - fast).abs().max() < 1e-4
    ends("parts", "--epochs", 2)
    parts = ends("parts", "--epochs", 4, "--resume")
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
    apart = [generate(open_network, y, seed=seed, **sampler)
             for y, seed in (([0, 1], 5), ([2, 3], 6))]
    assert torch.allclose(plain[-1], torch.cat(apart), atol=1e-5)
    fake_gpu(monkeypatch, rerun)
    assert torch.equal(samples(), plain)
