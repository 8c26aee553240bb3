"""What a GPU computes, plainly and recorded, compared with each other and with the CPU."""

import csv
import os
import signal
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
from runtime import speed
from runtime.checkpoint import load_checkpoint

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
GPU = torch.device("cuda:0")
SMALL = ("--data-dir", ROOT / "mnist", "--limit", 3000, "--batch-size", 100, "--device", "cuda:0",
         "--lr-schedule", "constant", "--no-compile")


@pytest.fixture
def record(monkeypatch):
    """record(whether): sets the switch."""
    monkeypatch.setattr(train, "load_mnist", load_mnist)  # which others cache on the CPU
    return lambda on: monkeypatch.setenv("DIT_RECORD", str(int(on)))


@pytest.fixture
def steps(tmp_path, record, monkeypatch):
    """steps(recorded, count, **recipe): losses of each step, and the weights, EMA and noise."""
    def run(on, count=20, **recipe):
        record(on)
        seen, ended = [], train.Run.end_step

        def end_step(self, loss):
            seen.append(loss.clone())
            ended(self, loss)
            seen[0:0] = [] if self.step < self.total_steps else [self.state()]

        monkeypatch.setattr(train.Run, "end_step", end_step)
        recipe = {"compile": False, "batch_size": 300, "limit": 300 * count} | recipe
        train.train(TrainConfig(epochs=1, device="cuda:0", data_dir=str(ROOT / "mnist"),
                                checkpoint=str(tmp_path / f"{time.time()}.pth"), **recipe))
        monkeypatch.setattr(train.Run, "end_step", ended)
        state, *losses = seen
        return torch.stack(losses).cpu(), state

    return run


def assert_same(found, expected, tolerance):
    for name in ("weights", "ema"):
        for key, value in expected[name].items():
            error = (found[name][key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error <= tolerance, (name, key, error.item())
    assert torch.equal(found["noise"], expected["noise"])  # the generator went as far


@pytest.mark.parametrize("recipe", [
    {}, {"loss": "mse"}, {"optimizer": "adamw"}, {"compile": True}, {"min_snr": 0.0},
    {"model": ModelConfig(block="cross-attention")}, {"model": ModelConfig(block="in-context")},
    {"model": ModelConfig(learn_sigma=True)}, {"model": ModelConfig(predicts="v")}], ids=str)
def test_recorded_steps_are_the_plain_ones(steps, recipe, capfd):
    losses, state = steps(False, **recipe)
    recorded_losses, recorded_state = steps(True, **recipe)
    out, err = capfd.readouterr()
    assert "slower" not in out + err
    assert len(set(recorded_losses.tolist())) == 20  # another t and eps in every replay
    # Muon makes rounding errors of small singular values as large as an update.
    assert torch.allclose(recorded_losses, losses, rtol=1e-3), (recorded_losses - losses).abs().max()
    assert_same(recorded_state, state, 2e-2)


def test_the_first_recorded_step_is_the_plain_one_to_rounding(steps):
    """Of AdamW, whose rounding errors stay small: what a fourth step, the first replay, changes."""
    plain, fast = (steps(on, speed.PLAIN_CALLS + 1, optimizer="adamw", lr=1e-4) for on in (0, 1))
    assert torch.allclose(plain[0], fast[0], rtol=1e-6)
    assert_same(fast[1], plain[1], 1e-4)


def test_an_edited_block_is_what_is_recorded(steps, monkeypatch, capfd):
    original, (before, _) = dit_block.DiTBlock.forward, steps(True)
    monkeypatch.setattr(dit_block.DiTBlock, "forward", lambda self, x, c: original(self, x, c).tanh())
    (plain, plain_state), (fast, fast_state) = steps(False), steps(True)
    assert "slower" not in "".join(capfd.readouterr())
    assert torch.allclose(fast, plain, rtol=1e-3) and not torch.allclose(fast, before, rtol=1e-3)
    assert_same(fast_state, plain_state, 2e-2)


@pytest.mark.parametrize("failure", ["it reads a value", "out of memory"])
def test_a_step_that_no_graph_can_hold_runs_plainly(steps, monkeypatch, capfd, failure):
    original, (plain, plain_state) = dit_block.DiTBlock.forward, steps(False)

    def edited(self, x, c):
        if torch.cuda.is_current_stream_capturing():
            if failure == "out of memory":
                torch.empty(2**50, device=x.device)
            x.sum().item()
        return original(self, x, c)

    monkeypatch.setattr(dit_block.DiTBlock, "forward", edited)
    capfd.readouterr()
    found, state = steps(True)
    assert "".join(capfd.readouterr()).count("slower") == 1
    assert torch.allclose(found, plain, rtol=1e-3)
    assert_same(state, plain_state, 2e-2)


def run(folder, *options, on=True, wait=True):
    """train.py as a process."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, ROOT / "train.py", "--checkpoint", folder / "model.pth", *SMALL, *options]
    process = subprocess.Popen([str(part) for part in command], text=True, stderr=subprocess.PIPE,
                               env=os.environ | {"DIT_RECORD": str(int(on))})
    if wait:
        err = process.communicate(timeout=120)[1]
        assert process.returncode == 0 and "slower" not in err, err
    return process


def state(folder):
    return load_checkpoint(folder / "model.resume.pth", {})


def flat(folder):
    found = state(folder)
    return torch.cat([x.flatten() for name in ("weights", "ema") for x in found[name].values()])


@pytest.mark.parametrize("on", [False, True])
def test_stop_and_resume_give_the_same_bits(tmp_path, on):
    run(tmp_path / "whole", "--epochs", 4, on=on)
    run(tmp_path / "parts", "--epochs", 2, on=on)
    run(tmp_path / "parts", "--epochs", 4, "--resume", on=on)
    assert torch.equal(flat(tmp_path / "parts"), flat(tmp_path / "whole"))


def test_a_kill_and_a_stop_signal_cost_no_bits(tmp_path):
    options = ("--epochs", 40, "--checkpoint-every", 50)
    run(tmp_path / "whole", *options)
    for number in (signal.SIGKILL, signal.SIGTERM):
        folder = tmp_path / str(number)
        process = run(folder, *options, wait=False)
        deadline = time.monotonic() + 60
        while not (folder / "model.resume.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert 0 < state(folder)["step"] <= 1200
        run(folder, *options, "--resume")
        assert torch.equal(flat(folder), flat(tmp_path / "whole"))


def test_two_processes_on_one_gpu(tmp_path):
    """By Gloo, and plainly: they end where one process does."""
    run(tmp_path / "one", "--epochs", 1, on=False)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "train.py",
               "--checkpoint", tmp_path / "two.pth", *SMALL, "--epochs", 1]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=150, env=os.environ | {"DIT_RECORD": "1"})
    assert done.returncode == 0, done.stderr
    curves = [list(csv.DictReader(path.open()))[-1]["test_loss"]
              for path in (tmp_path / "one" / "loss.csv", tmp_path / "two.loss.csv")]
    assert float(curves[0]) == pytest.approx(float(curves[1]), rel=1e-3)


@pytest.mark.parametrize("on", [False, True])
def test_the_test_loss_is_that_of_a_cpu(record, on):
    record(on)
    found = []
    for device in ("cpu", GPU):
        model, diffusion = random_network(ModelConfig(), 0.05).to(device), GaussianDiffusion(device=device)
        batches = train.held_out(diffusion, load_mnist(False, ROOT / "mnist", device, 600))
        found.append(train.held_out_loss(model, diffusion, batches, "l1"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("settings", [
    {"sampler": "ddpm", "steps": 25}, {"sampler": "ddim", "steps": 25}, {"steps": 25, "guidance": 1.0},
    {"sampler": "ddim", "steps": 25, "eta": 1.0}], ids=str)
def test_samples_are_those_of_a_cpu(record, capfd, settings, on):
    record(on)
    model, seen = random_network(ModelConfig(), 0.05), []
    expected = generate(model, range(10), seed=[1, 2], **settings)
    found = generate(model.to(GPU), range(10), seed=[1, 2], **settings,
                     on_step=lambda t, x_t: seen.append(x_t))
    assert "slower" not in "".join(capfd.readouterr())
    assert (found.cpu() - expected).abs().max() < 1e-3
    assert len({x_t.sum().item() for x_t in seen}) == 26  # none was overwritten by a later step


def test_sampling_that_no_graph_can_hold_runs_plainly(record, capfd, monkeypatch):
    model = random_network(ModelConfig(), 0.05).to(GPU)
    record(False)
    expected, original = generate(model, range(10), steps=9), dit_block.DiTBlock.forward

    def edited(self, x, c):
        assert not torch.cuda.is_current_stream_capturing(), "not here"
        return original(self, x, c)

    monkeypatch.setattr(dit_block.DiTBlock, "forward", edited)
    record(True)
    assert (generate(model, range(10), steps=9) - expected).abs().max() < 1e-4
    assert "".join(capfd.readouterr()).count("slower: not here") == 1
