"""What a GPU computes, plainly and recorded, compared with each other and with the CPU."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_network

import dit_block
import train
from config import ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from inference import generate
from runtime.checkpoint import load_model

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
RECIPE = {"batch_size": 300, "limit": 6000, "compile": False, "device": "cuda:0",
          "data_dir": str(ROOT / "mnist")}


@pytest.fixture
def record(monkeypatch):
    """record(whether): sets the switch."""
    monkeypatch.setattr(train, "load_mnist", load_mnist)  # which others cache on the CPU
    return lambda on: monkeypatch.setenv("DIT_RECORD", str(int(on)))


@pytest.fixture
def steps(tmp_path, record, monkeypatch):
    """steps(recorded, **recipe): losses of 20 steps, and the weights, EMA and noise then."""

    def run(on, **recipe):
        record(on)
        losses, states, ended = [], [], train.Run.end_step

        def end_step(self, loss):
            losses.append(loss.clone())
            ended(self, loss)
            states.append(self.state()) if self.step == self.total_steps else None

        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "end_step", end_step)
            checkpoint = str(tmp_path / f"{time.time()}.pth")
            train.train(TrainConfig(**RECIPE | recipe, epochs=1, checkpoint=checkpoint))
        return torch.stack(losses).cpu(), states[0]

    return run


def assert_same(found, expected, tolerance=2e-2):
    """Muon makes rounding errors of small singular values as large as an update."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0)  # the losses
    for name in ("weights", "ema"):
        for key, value in expected[1][name].items():
            error = (found[1][name][key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error <= tolerance, (name, key, error.item())
    assert torch.equal(found[1]["noise"], expected[1]["noise"])  # the generator went as far


@pytest.mark.parametrize(("recipe", "tolerance"), [
    ({}, 2e-2), ({"loss": "mse", "min_snr": 0.0}, 2e-2), ({"compile": True}, 2e-2),
    ({"optimizer": "adamw", "lr": 1e-4}, 1e-3), ({"model": ModelConfig(block="in-context")}, 2e-2),
    ({"model": ModelConfig(learn_sigma=True, predicts="v")}, 2e-2)], ids=str)
def test_recorded_steps_are_the_plain_ones(steps, recipe, tolerance, capfd):
    found = steps(True, **recipe)
    assert "slower" not in "".join(capfd.readouterr())
    assert len(set(found[0].tolist())) == 20  # another t and eps in every replay
    assert_same(found, steps(False, **recipe), tolerance)


def test_an_edited_block_is_what_is_recorded(steps, monkeypatch, capfd):
    original, before = dit_block.DiTBlock.forward, steps(True)
    monkeypatch.setattr(dit_block.DiTBlock, "forward", lambda *args: original(*args).tanh())
    found = steps(True)
    assert "slower" not in "".join(capfd.readouterr())
    assert_same(found, steps(False))
    assert not torch.allclose(found[0], before[0], rtol=1e-3)


def test_what_no_graph_can_hold_runs_plainly(steps, record, monkeypatch, capfd):
    """A training step and sampling; each recording says so once."""
    model, original = random_network(ModelConfig(), 0.05).cuda(), dit_block.DiTBlock.forward

    def unrecordable(self, x, c):
        assert not torch.cuda.is_current_stream_capturing(), "not here"
        return original(self, x, c)

    plain, digits = steps(False), generate(model, range(10), steps=9)
    monkeypatch.setattr(dit_block.DiTBlock, "forward", unrecordable)
    capfd.readouterr()
    assert_same(steps(True), plain)
    assert "".join(capfd.readouterr()).count("slower: not here") == 2  # and for samples.png
    assert (generate(model, range(10), steps=9) - digits).abs().max() < 1e-4
    assert "".join(capfd.readouterr()).count("slower: not here") == 1


@pytest.mark.parametrize("on", [False, True])
def test_stop_and_resume_give_the_same_bits(tmp_path, record, on):
    record(on)
    ends = []
    for name, parts in (("whole", [4]), ("parts", [2, 4])):
        for epochs in parts:
            recipe = RECIPE | {"checkpoint": str(tmp_path / f"{name}.pth"), "limit": 1500}
            cfg = TrainConfig(**recipe, epochs=epochs, lr_schedule="constant")
            ema = train.train(cfg, resume=epochs != parts[0])
        ends.append(torch.cat([value.flatten() for value in ema.parameters()]))
    assert torch.equal(*ends)


def run(checkpoint, *options, start=("train.py",)):
    """train.py as a process that records."""
    command = [sys.executable, *start, "--checkpoint", checkpoint, "--data-dir", "mnist", "--limit",
               3000, "--batch-size", 100, "--device", "cuda:0", "--no-compile", *options]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT,
                            env=os.environ | {"DIT_RECORD": "1"})


def test_kill_9_costs_no_bits(tmp_path):
    options, killed = ("--epochs", 40, "--checkpoint-every", 50), tmp_path / "killed.pth"
    assert run(tmp_path / "whole.pth", *options).wait(120) == 0
    process = run(killed, *options)
    while process.poll() is None and not killed.with_stem("killed.resume").exists():
        time.sleep(0.01)
    process.kill()
    assert run(killed, *options, "--resume").wait(120) == 0
    ends = [load_model(tmp_path / f"{name}.pth")[0].parameters() for name in ("whole", "killed")]
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_two_processes_on_one_gpu(tmp_path):
    """By Gloo, and plainly: they end where one process does."""
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py")
    for name, start in (("one", ("train.py",)), ("two", two)):
        assert run(tmp_path / f"{name}.pth", "--epochs", 1, start=start).wait(150) == 0
    losses = [float((tmp_path / f"{name}.loss.csv").read_text().split(",")[-2])
              for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("on", [False, True])
def test_the_test_loss_is_that_of_a_cpu(record, on):
    record(on)
    found = []
    for device in ("cpu", "cuda:0"):
        model, diffusion = random_network(ModelConfig(), 0.05), GaussianDiffusion(device=device)
        batches = train.held_out(diffusion, load_mnist(False, ROOT / "mnist", device, 600))
        found.append(train.held_out_loss(model.to(device), diffusion, batches, "l1"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("settings", [
    {"sampler": "ddpm"}, {"sampler": "ddim", "guidance": 1.0}, {"sampler": "ddim", "eta": 1.0}],
    ids=str)
def test_samples_are_those_of_a_cpu(record, capfd, settings, on):
    record(on)
    model, seen = random_network(ModelConfig(), 0.05), []
    settings = {"labels": range(10), "seed": [1, 2], "steps": 25} | settings
    expected = generate(model, **settings)
    found = generate(model.cuda(), **settings, on_step=lambda t, x_t: seen.append(x_t))
    assert "slower" not in "".join(capfd.readouterr())
    assert (found.cpu() - expected).abs().max() < 1e-3
    assert len({x_t.sum().item() for x_t in seen}) == 26  # none was overwritten by a later step
