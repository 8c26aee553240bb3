"""The loop as its user calls it: what it writes, how it stops and continues, what it refuses."""

import csv
import math
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, content, run_script

import train
from config import PAPER, ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from runtime.checkpoint import checksum, load_checkpoint, load_model, save_checkpoint
from runtime.run import STATE

FILES = {"model.pth", "model.resume.pth", "loss.csv", "loss.png", "samples.png"}


def rows(folder):
    with open(folder / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def run_state(folder):
    """What must not depend on how often a run was stopped: its state and curve, without time."""
    state = load_checkpoint(folder / "model.resume.pth", STATE)
    for name in ("seconds", "recipe", "sha256"):
        del state[name]
    for row in state["curve"]:
        del row["seconds"]
    weights = load_model(folder / "model.pth")[0].state_dict()
    return checksum([state, weights]), [{**row, "seconds": None} for row in rows(folder)]


def watch_loss(monkeypatch, before):
    """Call before(step, x_0, y, t, eps) at the loss of step 1, 2, ..., and multiply that by it."""
    loss, step = GaussianDiffusion.loss, 0

    def watched(self, model, *args):
        nonlocal step
        if not model.training:
            return loss(self, model, *args)
        step += 1
        factor = before(step, *args[:4])
        return loss(self, model, *args) * (1 if factor is None else factor)

    monkeypatch.setattr(GaussianDiffusion, "loss", watched)


def signals_at(monkeypatch, step, *numbers):
    def send(now, *batch):
        for number in numbers if now == step else ():
            os.kill(os.getpid(), number)

    watch_loss(monkeypatch, send)


# The parts of the loop

def test_learning_rate():
    constant, cosine = ([train.learning_rate(step, TrainConfig(lr=2.0, lr_schedule=kind), 100)
                         for step in (0, 25, 50, 99)] for kind in ("constant", "cosine"))
    assert constant == [2, 2, 2, 2]
    assert cosine == pytest.approx([2, 1 + 0.5**0.5, 1, 0], abs=0.001)


def test_ema_with_its_ramp():
    """Of parameters, not of buffers."""
    model, ema = DiT(ModelConfig(depth=1)), DiT(ModelConfig(depth=1))
    table = ema.pos_embed.clone()
    for step, d in ((1, 2 / 11), (10_000, 0.9)):
        with torch.no_grad():
            model.x_embedder.proj.bias.fill_(1)
            model.pos_embed.fill_(7)
            ema.x_embedder.proj.bias.fill_(0)
        train.update_ema(ema, model, train.ema_decay(step, TrainConfig(ema_decay=0.9)))
        assert ema.x_embedder.proj.bias[0].item() == pytest.approx(1 - d)
    assert torch.equal(ema.pos_embed, table)


def test_optimizers_hold_every_parameter_once():
    for kind, count in (("adamw", 1), ("muon", 2)):
        model = DiT(ModelConfig())
        optimizers = train.make_optimizers(model, TrainConfig(optimizer=kind))
        held = [id(p) for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
        assert len(optimizers) == count and sorted(held) == sorted(map(id, model.parameters()))
        assert optimizers[0].param_groups[0]["weight_decay"] == 0
    in_muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
    assert {name for name, p in model.blocks[0].named_parameters() if id(p) in in_muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
        "adaLN_modulation.1.weight"}


def test_held_out_loss_is_comparable():
    """It depends on no random state; each image counts once."""
    digits = load_mnist(False, ROOT / "mnist", limit=260)
    model, diffusion = DiT(ModelConfig(depth=1)).eval(), GaussianDiffusion()
    first, second = (
        train.held_out_loss(model, diffusion, train.held_out(diffusion, digits), "l1")
        for _ in range(2))
    assert first == second == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)  # E|eps|


# What a run draws and writes

def test_a_run_as_its_user_starts_it(tmp_path):
    done = run_script("train.py", *TINY, "--epochs", 1, "--seed", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path).keys() == FILES
    model, info = load_model(tmp_path / "model.pth")
    assert info["step"] == 3 and info["recipe"]["seed"] == 3 and model.config.hidden_size == 16
    [row] = rows(tmp_path)
    assert list(row) == ["epoch", "step", "train_loss", "test_loss", "seconds"]
    assert 0.1 < float(row["train_loss"]) < 0.9 and 0.7 < float(row["test_loss"]) < 0.9
    line = r"epoch 1, step 3, train_loss 0\.\d+, test_loss 0\.\d+, seconds \S+\n"
    assert re.fullmatch(line, done.stderr)  # and no bar, which is for terminals
    for picture in ("loss.png", "samples.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_noise_of_a_seed_is_the_same_for_every_network(tmp_path, train_tiny, monkeypatch):
    """Images, labels, t and eps do not depend on how many initial values a network draws."""
    drawn = []
    for number, options in enumerate(((), ("--block", "in-context", "--depth", 2), ("--seed", 1))):
        with monkeypatch.context() as patch:
            batches = []
            watch_loss(patch, lambda step, *batch, all=batches: all.append(checksum(batch)))
            assert train_tiny(tmp_path / str(number), *options)[0] == 0
        drawn.append(batches)
    *same, other = drawn
    assert len(set(same[0])) == 3 and all(batches == same[0] for batches in same)
    assert not set(other) & set(same[0])


def test_training_loss_is_the_mean_of_the_epoch(tmp_path, train_tiny, monkeypatch):
    watch_loss(monkeypatch, lambda step, *args: step)
    assert train_tiny(tmp_path, "--lr", 1e-9, "--min-snr", 0)[0] == 0  # each loss is about 0.8
    assert float(rows(tmp_path)[0]["train_loss"]) == pytest.approx(0.8 * (1 + 2 + 3) / 3, rel=0.02)


def test_another_run_is_kept_and_can_continue(tmp_path, train_tiny):
    """Under the first names of which none is taken, as a run of its own."""
    (tmp_path / "model.old-1.loss.csv").write_text("precious")
    assert train_tiny(tmp_path, "--seed", 1)[0] == 0
    first = content(tmp_path)
    status, out, _ = train_tiny(tmp_path)
    assert status == 0 and "model.old-2.pth" in out
    second = content(tmp_path)
    for name in FILES:
        assert second[f"model.old-2.{name.removeprefix('model.')}"][0] == first[name][0]
    old = ("--checkpoint", tmp_path / "model.old-2.pth")
    assert train_tiny(tmp_path, *old, "--seed", 1, "--epochs", 2, "--resume")[0] == 0
    after = content(tmp_path)
    assert load_model(old[1])[1]["step"] == 6
    assert all(after[name] == second[name] for name in (*FILES, "model.old-1.loss.csv"))


# Stopping and continuing

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_saving(tmp_path, train_tiny, monkeypatch, number):
    """Also when it comes twice, as torchrun and timeout send it."""
    before = signal.getsignal(number)
    signals_at(monkeypatch, 2, number, number)
    status, out, _ = train_tiny(tmp_path)
    assert status == 128 + number and "stopped at step 2 of 3" in out
    assert load_model(tmp_path / "model.pth")[1]["step"] == 2
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("step", "options"), [  # 3 steps per epoch: also its first and last one
    (1, ("--compile",)), (3, ("--block", "in-context", "--loss", "mse")),
    (8, ("--optimizer", "adamw", "--learn-sigma")), (9, ("--seed", 2**32 - 1))])
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, train_tiny, monkeypatch, step,
                                                      options):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--epochs", 3, *options)
    assert train_tiny(whole, *options)[0] == 0
    with monkeypatch.context() as patch:
        signals_at(patch, step, signal.SIGTERM)
        assert train_tiny(stopped, *options)[0] == 128 + signal.SIGTERM
    torch.manual_seed(12345)
    status, _, err = train_tiny(stopped, *options, "--resume")
    assert status == 0, err
    assert run_state(whole) == run_state(stopped) and len(rows(whole)) == 3
    assert (whole / "samples.png").read_bytes() == (stopped / "samples.png").read_bytes()


@pytest.mark.parametrize("change", [lambda value: value * math.nan, lambda value: value[:, 1:]])
def test_weights_that_do_not_fit_are_refused_before_a_file_changes(tiny_checkpoint, tmp_path,
                                                                   refused, change):
    state = load_checkpoint(tiny_checkpoint.with_name("model.resume.pth"), STATE)
    state["ema"]["pos_embed"] = change(state["ema"]["pos_embed"])
    del state["sha256"]
    save_checkpoint(tmp_path / "model.resume.pth", state)
    (tmp_path / "model.pth").write_text("precious")
    before = content(tmp_path)
    refused(train.main, 1, "model.resume.pth ", "--checkpoint", tmp_path / "model.pth", *TINY,
            "--epochs", 3, "--resume")
    assert content(tmp_path) == before


def test_training_in_a_thread_leaves_signals_alone(tmp_path, train_tiny):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train_tiny, tmp_path).result()[0] == 0


def test_another_recipe_is_refused_by_name(tiny_checkpoint, refused):
    before = content(tiny_checkpoint.parent)
    refused(train.main, 1, "seed was 0 and is 9, block was 'adaLN-Zero' and is 'adaLN'", *TINY,
            "--checkpoint", tiny_checkpoint, "--seed", 9, "--block", "adaLN", "--resume")
    assert content(tiny_checkpoint.parent) == before


# What goes wrong

def test_a_loss_that_is_not_finite_is_not_saved(tmp_path, train_tiny, monkeypatch):
    """Nor are other weights lost."""
    (tmp_path / "model.pth").write_text("precious")
    watch_loss(monkeypatch, lambda now, *args: math.nan if now == 7 else 1)
    status, _, err = train_tiny(tmp_path, "--epochs", 3)
    assert status == 1 and "model.pth is as last saved" in err.splitlines()[-1]
    assert (tmp_path / "model.pth").read_text() == "precious"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, train_tiny, monkeypatch):
    """The loss of the last step is good, and its update is not."""
    update = torch.optim.AdamW.step

    def spoil_the_third(self):
        update(self)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 3:
            self.param_groups[0]["params"][-1].data[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil_the_third)
    status, _, err = train_tiny(tmp_path)
    assert status == 1 and "the loss or a weight is nan at step 3" in err.splitlines()[-1]
    assert not content(tmp_path)


def test_out_of_memory_is_one_sentence_and_a_mistake_in_the_code_is_not_hidden(
        tmp_path, train_tiny, monkeypatch):
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(train, "load_mnist", mock.Mock(side_effect=error))
        status, _, err = train_tiny(tmp_path)
        assert status == 1 and "train.py: error: out of memory" in err
    monkeypatch.setattr(train, "load_mnist", mock.Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_tiny(tmp_path)


def test_nothing_to_resume_and_no_data(tmp_path, refused):
    options = ("--checkpoint", tmp_path / "model.pth", *TINY)
    refused(train.main, 1, "there is nothing to resume", *options, "--resume")
    refused(train.main, 1, "train-images-idx3-ubyte.gz", *options,
            "--data-dir", tmp_path)
    assert not content(tmp_path)


def test_a_named_model_is_trained_and_samples(tmp_path, train_tiny):
    """The name sets the defaults, and the width and depth of the tests override them."""
    status, _, err = train_tiny(tmp_path, "--model", "DiT-S/8")
    assert status == 0, err
    model, _ = load_model(tmp_path / "model.pth")
    assert model.config == replace(PAPER["DiT-S/8"], in_channels=1, num_classes=10, hidden_size=16,
                                   depth=1, num_heads=2)
    assert generate(model, [3], sampler="ddim", steps=2).shape == (1, 1, 32, 32)
