"""The loop as its user calls it: what it writes, how it stops, how it goes on, and what it says when it cannot."""

import csv
import math
import os
import re
import signal
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, content, run_script

import train
from config import PAPER, ModelConfig, T, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate, load_model
from runtime.checkpoint import checksum, load_checkpoint, save_checkpoint


def rows(folder):
    with open(folder / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_ema(a, b):
    a, b = (load_model(path)[0].state_dict() for path in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


# The parts of the loop

def test_learning_rate():
    constant = TrainConfig(lr=0.5)
    assert [train.learning_rate(step, 100, constant) for step in (0, 50, 99)] == [0.5, 0.5, 0.5]
    warm = TrainConfig(lr=1.0, warmup_steps=4)
    assert [train.learning_rate(step, 100, warm) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    both = TrainConfig(lr=1.0, warmup_steps=4, lr_schedule="cosine")
    assert train.learning_rate(1, 4, both) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)) / 2)
    cosine = TrainConfig(lr=1.0, lr_schedule="cosine")
    assert train.learning_rate(0, 100, cosine) == 1
    assert train.learning_rate(50, 100, cosine) == pytest.approx(0.5)
    assert train.learning_rate(99, 100, cosine) < 0.001


def test_ema_with_its_ramp():
    model, ema = DiT(ModelConfig(depth=1)), DiT(ModelConfig(depth=1))
    bias = {network: network.x_embedder.proj.bias for network in (model, ema)}
    table = ema.pos_embed.clone()
    with torch.no_grad():
        bias[model].fill_(1.0)
        model.pos_embed.fill_(7.0)
    train.update_ema(list(ema.parameters()), list(model.parameters()), step=1, decay=0.9)
    assert bias[ema][0].item() == pytest.approx(1 - 2 / 11)
    bias[ema].data.fill_(0)
    train.update_ema(list(ema.parameters()), list(model.parameters()), step=10_000, decay=0.9)
    assert bias[ema][0].item() == pytest.approx(0.1)
    assert torch.equal(ema.pos_embed, table)  # parameters, not buffers


def test_optimizers_hold_every_parameter_once():
    for kind, count in (("adamw", 1), ("muon", 2)):
        model = DiT(ModelConfig())
        optimizers = train.make_optimizers(model, TrainConfig(optimizer=kind))
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert len(optimizers) == count and sorted(map(id, held)) == sorted(map(id, model.parameters()))
        assert all(group["weight_decay"] == 0 for optimizer in optimizers for group in optimizer.param_groups)
    in_muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
    assert {name for name, p in model.blocks[0].named_parameters() if id(p) in in_muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight"}


def test_held_out_loss_is_comparable():
    """The same at every call, untouched by and not touching the random state of training; each image counts once."""
    digits = load_mnist(False, ROOT / "mnist", limit=260)
    model, diffusion = DiT(ModelConfig(depth=1)).eval(), GaussianDiffusion(T)
    state = torch.get_rng_state()
    first = train.held_out_loss(model, diffusion, digits, "l1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert train.held_out_loss(model, diffusion, digits, "l1") == first
    assert first == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)  # E|eps|, for a fresh network predicts 0


# What a run writes

def test_three_steps_as_a_user_runs_them(tmp_path):
    done = run_script("train.py", *TINY, "--epochs", 1, "--seed", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "model.resume.pth", "loss.csv", "loss.png"}
    model, info = load_model(tmp_path / "model.pth")
    assert info["step"] == 3 and info["recipe"]["seed"] == 3 and info["recipe"]["limit"] == 300
    assert model.config.hidden_size == 16
    [row] = rows(tmp_path)
    assert list(row) == ["epoch", "step", "train_loss", "test_loss", "seconds"]
    assert (row["epoch"], row["step"]) == ("1", "3")
    assert 0.7 < float(row["train_loss"]) < 0.9 and 0.7 < float(row["test_loss"]) < 0.9
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    bar = done.stderr.split("\r")[-1]  # epoch, images, time left, images a second, mean loss of the epoch
    assert re.search(rf"epoch 1/1: 100%.* 300/300 \[.*<.*img/s, train_loss={float(row['train_loss']):.4f}, test_loss=0", bar)

    drawn = run_script("inference.py", "--steps", 5, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "inference.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(tmp_path, train_tiny):
    status, _, err = train_tiny(tmp_path, "--epochs", 12, "--lr", 0.01, "--ema-decay", 0.9, "--optimizer", "muon")
    assert status == 0, err
    losses = [float(row["test_loss"]) for row in rows(tmp_path)]
    assert len(losses) == 12 and losses[-1] < 0.6 < losses[0]


def test_checkpoints_come_every_so_many_steps_and_at_the_end_but_not_at_step_0(tmp_path, train_tiny, monkeypatch):
    saved = []
    keep = train.RunFiles.save_run
    monkeypatch.setattr(train.RunFiles, "save_run",
                        lambda files, state, ema, step: (saved.append(step), keep(files, state, ema, step)))
    assert train_tiny(tmp_path, "--epochs", 3, "--checkpoint-every", 4)[0] == 0
    assert saved == [4, 8, 9]


def test_training_loss_is_the_mean_of_the_epoch(tmp_path, train_tiny, monkeypatch):
    losses = []
    loss = GaussianDiffusion.loss

    def note(self, model, *args, **kwargs):
        value = loss(self, model, *args, **kwargs)
        if model.training:
            losses.append(value.item())
        return value

    monkeypatch.setattr(GaussianDiffusion, "loss", note)
    assert train_tiny(tmp_path, "--lr", 0.1)[0] == 0
    assert len(losses) == 3
    assert float(rows(tmp_path)[0]["train_loss"]) == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_the_same_seed_gives_the_same_weights(tmp_path, train_tiny):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        assert train_tiny(tmp_path / name, "--seed", seed)[0] == 0
    assert same_ema(tmp_path / "a" / "model.pth", tmp_path / "b" / "model.pth")
    assert not same_ema(tmp_path / "a" / "model.pth", tmp_path / "c" / "model.pth")


def test_what_another_run_made_is_set_aside(tmp_path, train_tiny):
    for name in ("model.pth", "loss.csv", "model.old-1.pth"):
        (tmp_path / name).write_text(f"precious {name}")
    status, out, err = train_tiny(tmp_path)
    assert status == 0, err
    assert (tmp_path / "model.old-1.pth").read_text() == "precious model.old-1.pth"
    assert (tmp_path / "model.old-2.pth").read_text() == "precious model.pth"
    assert (tmp_path / "loss.old-1.csv").read_text() == "precious loss.csv"
    assert "model.pth is another run's: kept as" in out and "model.old-2.pth" in out
    assert load_model(tmp_path / "model.pth")[1]["step"] == 3


# Stopping and going on

def stop_at(monkeypatch, step, number=signal.SIGINT):
    """The signal comes while the loss of that step is computed."""
    calls = []
    loss = GaussianDiffusion.loss

    def count(self, model, *args, **kwargs):
        if model.training:
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)
        return loss(self, model, *args, **kwargs)

    monkeypatch.setattr(GaussianDiffusion, "loss", count)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_saving(tmp_path, train_tiny, monkeypatch, number):
    before = signal.getsignal(number)
    stop_at(monkeypatch, 2, number)
    status, out, _ = train_tiny(tmp_path)
    assert status == 128 + number
    assert "stopped at step 2 of 3; the same command with --resume goes on" in out
    assert load_model(tmp_path / "model.pth")[1]["step"] == 2
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("step", "optimizer", "guidance"), [  # 3 an epoch: also at its first and last step, and at the end
    (1, "muon", 1), (3, "adamw", 1), (4, "muon", 1.5), (8, "adamw", 2), (9, "muon", 1)])
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, train_tiny, monkeypatch, step, optimizer, guidance):
    options = ("--epochs", 3, "--optimizer", optimizer, "--lr", 0.01, "--warmup-steps", 5, "--lr-schedule", "cosine",
               "--learn-guidance", guidance)
    for name in ("first", "whole", "stopped"):
        (tmp_path / name).mkdir()
    if guidance != 1:  # as the weights that ship were trained
        assert train_tiny(tmp_path / "first")[0] == 0
        options = (*options, "--start-from", tmp_path / "first" / "model.pth")
    assert train_tiny(tmp_path / "whole", *options)[0] == 0
    number = signal.SIGTERM if step % 2 == 0 else signal.SIGINT
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        assert train_tiny(tmp_path / "stopped", *options)[0] == 128 + number
    torch.manual_seed(12345)
    status, _, err = train_tiny(tmp_path / "stopped", *options, "--resume")
    assert status == 0, err
    states = [torch.load(tmp_path / name / "model.resume.pth", weights_only=True) for name in ("whole", "stopped")]
    for state in states:
        for entry in ("seconds", "recipe", "sha256", "curve"):  # wall time, and the path of the checkpoint
            del state[entry]
    assert checksum(states[0]) == checksum(states[1])
    assert same_ema(tmp_path / "whole" / "model.pth", tmp_path / "stopped" / "model.pth")
    curves = [[{**row, "seconds": None} for row in rows(tmp_path / name)] for name in ("whole", "stopped")]
    assert curves[0] == curves[1] and len(curves[0]) == 3


def test_a_curve_of_another_run_is_kept_at_resume_too(tmp_path, train_tiny):
    assert train_tiny(tmp_path, "--epochs", 2)[0] == 0
    (tmp_path / "loss.csv").write_text("epoch,step\n1,another run's\n")
    assert train_tiny(tmp_path, "--epochs", 3, "--resume")[0] == 0
    assert (tmp_path / "loss.old-1.csv").read_text() == "epoch,step\n1,another run's\n"
    assert len(rows(tmp_path)) == 3
    assert train_tiny(tmp_path, "--epochs", 4, "--resume")[0] == 0
    assert not (tmp_path / "loss.old-2.csv").exists()


def test_more_epochs_may_follow(tmp_path, train_tiny):
    for name in ("whole", "longer"):
        (tmp_path / name).mkdir()
    assert train_tiny(tmp_path / "whole", "--epochs", 2)[0] == 0
    assert train_tiny(tmp_path / "longer")[0] == 0
    assert train_tiny(tmp_path / "longer", "--epochs", 2, "--resume")[0] == 0
    assert same_ema(tmp_path / "whole" / "model.pth", tmp_path / "longer" / "model.pth")


@pytest.mark.parametrize(("options", "words"), [
    (("--lr", 0.5, "--seed", 9), "lr was 0.001 and is 0.5, seed was 0 and is 9"),
    (("--depth", 2), "depth was 1 and is 2"),
])
def test_another_recipe_is_refused_by_name(tmp_path, train_tiny, refused, options, words):
    assert train_tiny(tmp_path)[0] == 0
    before = content(tmp_path)
    refused(train.main, 1, words, "--checkpoint", tmp_path / "model.pth", *TINY, "--epochs", 2, *options, "--resume")
    assert content(tmp_path) == before


def test_a_state_from_before_an_option_existed_can_go_on(tmp_path, train_tiny):
    """The option was at its default then, whatever that does."""
    assert train_tiny(tmp_path)[0] == 0
    state = load_checkpoint(tmp_path / "model.resume.pth", {})
    for name in ("min_snr", "dataset"):
        del state["recipe"][name]
    save_checkpoint(tmp_path / "model.resume.pth", {name: value for name, value in state.items() if name != "sha256"})
    assert train_tiny(tmp_path, "--epochs", 2, "--min-snr", 1, "--resume")[0] == 1
    assert train_tiny(tmp_path, "--epochs", 2, "--resume")[0] == 0


def test_fewer_epochs_than_done_are_refused(tmp_path, train_tiny, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert train_tiny(tmp_path, "--epochs", 3)[0] == 130
    status, _, err = train_tiny(tmp_path, "--epochs", 1, "--resume")
    assert status == 1 and "model.resume.pth is at step 5, and 1 epochs end at step 3" in err.splitlines()[-1]


def test_resume_without_a_state_says_so(tmp_path, refused):
    refused(train.main, 1, "there is nothing to resume", "--checkpoint", tmp_path / "model.pth", *TINY, "--resume")


def test_a_stopped_run_is_named_when_a_new_one_starts(tmp_path, train_tiny):
    assert train_tiny(tmp_path)[0] == 0
    state = (tmp_path / "model.resume.pth").read_bytes()
    status, out, _ = train_tiny(tmp_path)
    assert status == 0 and "model.resume.pth is of a run that can go on with --resume; this is a new one" in out
    assert (tmp_path / "model.resume.old-1.pth").read_bytes() == state


# Learned guidance, and weights to begin with

def test_learned_guidance_makes_the_average_the_teacher(tmp_path, train_tiny, monkeypatch):
    teachers = []
    target = GaussianDiffusion.guided_target

    def note(self, model, x_0, y, t, eps, guidance, null_class):
        teachers.append(model)
        assert (guidance, null_class) == (1.5, 10) and not model.training
        return target(self, model, x_0, y, t, eps, guidance, null_class)

    monkeypatch.setattr(GaussianDiffusion, "guided_target", note)
    assert train_tiny(tmp_path)[0] == 0 and not teachers
    status, _, err = train_tiny(tmp_path, "--learn-guidance", 1.5)
    assert status == 0, err
    assert len(teachers) == 3 and not any(p.requires_grad for p in teachers[0].parameters())
    assert load_model(tmp_path / "model.pth")[1]["recipe"]["learn_guidance"] == 1.5


def test_a_run_can_start_from_given_weights(tmp_path, train_tiny):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    given, found = tmp_path / "first" / "model.pth", tmp_path / "second" / "model.pth"
    assert train_tiny(given.parent, "--lr", 0.01, "--ema-decay", 0.5)[0] == 0
    options = ("--start-from", given, "--lr", 1e-9)
    assert train_tiny(found.parent, *options)[0] == 0
    before, after = (load_model(path)[0].state_dict() for path in (given, found))
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    assert torch.load(found.with_name("model.resume.pth"), weights_only=True)["earlier_steps"] == 3
    given.unlink()  # its weights are in the state by now
    status, _, err = train_tiny(found.parent, *options, "--epochs", 2, "--resume")
    assert status == 0, err


def test_weights_that_cannot_begin_a_run_are_refused(tmp_path, train_tiny, refused):
    (tmp_path / "first").mkdir()
    assert train_tiny(tmp_path / "first")[0] == 0
    for given, words in ((tmp_path / "first" / "model.pth", "depth is 1 there and 2 here"), ("none.pth", "no checkpoint")):
        refused(train.main, 1, words, "--checkpoint", tmp_path / "model.pth", *TINY, "--depth", 2, "--start-from", given)
    assert not (tmp_path / "model.pth").exists()


# What goes wrong

def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, train_tiny):
    assert train_tiny(tmp_path)[0] == 0
    before = content(tmp_path)
    status, _, err = train_tiny(tmp_path, "--epochs", 9, "--lr", 1e30)
    assert status == 1
    assert re.search(r"train\.py: error: the loss or a weight is (nan|inf) at step \d+ \(learning rate up to 1e\+30\); "
                     r".*model\.pth is as it was saved before", err.splitlines()[-1])
    assert "Traceback" not in err
    assert content(tmp_path)["model.pth"] == before["model.pth"]


def test_a_run_that_fails_later_leaves_another_runs_weights(tmp_path, train_tiny, monkeypatch):
    """The curve of the first epoch is written, and model.pth not yet."""
    (tmp_path / "model.pth").write_text("precious")
    loss, calls = GaussianDiffusion.loss, []

    def turn_nan(self, model, *args):
        calls.append(1)
        return loss(self, model, *args) * (torch.nan if model.training and len(calls) > 6 else 1)

    monkeypatch.setattr(GaussianDiffusion, "loss", turn_nan)
    status, _, err = train_tiny(tmp_path, "--epochs", 3)
    assert status == 1 and "model.pth is as it was saved before" in err.splitlines()[-1]
    assert (tmp_path / "model.pth").read_text() == "precious" and len(rows(tmp_path)) >= 1


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
    assert not (tmp_path / "model.pth").exists()


def test_ctrl_c_before_the_first_step(tmp_path, train_tiny, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_mnist", interrupted)
    assert train_tiny(tmp_path)[0] == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "words"), [
    ({"image_size": 24}, "at least 28"), ({"image_size": 33, "patch_size": 3}, "must be even"),
    ({"in_channels": 3}, "1 channel"), ({"num_classes": 5}, "10 classes"),
])
def test_networks_that_mnist_does_not_train_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(model=ModelConfig(**change))


@pytest.mark.parametrize(("options", "words"), [
    (("--epochs", "0"), "epochs must lie in [1, 1000000], not 0"),
    (("--batch-size", "-5"), "batch_size must lie in [1, 60000], not -5"),
    (("--lr", "nan"), "lr must be positive and finite"),
    (("--lr", "0"), "lr must be positive and finite"),
    (("--lr", "fast"), "invalid float value: 'fast'"),
    (("--loss", "huber"), "invalid choice: 'huber'"),
    (("--ema-decay", "1"), "ema_decay must lie in [0, 1)"),
    (("--learn-guidance", "0.5"), "learn_guidance must lie in [1, 100], not 0.5"),
    (("--learn-guidance", "2", "--class-dropout-prob", "0"), "learn_guidance needs a class_dropout_prob above 0"),
    (("--learn-guidance", "2", "--learn-sigma"), "learn_guidance needs a class_dropout_prob above 0, and no learn_sigma"),
    (("--seed", "-1"), "seed must lie in [0, 9223372036854775807], not -1"),
    (("--patch-size", "5"), "patch_size 5 does not divide image_size 28"),
    (("--hidden-size", "30"), "num_heads 4 does not divide hidden_size 30"),
    (("--device", "abacus"), "device 'abacus' cannot be used here"),
    (("--device", "meta"), "device 'meta' cannot be used here"),
    (("--learning-rate", "1"), "unrecognized arguments"),
    (("stray",), "unrecognized arguments: stray"),
])
def test_bad_arguments(tmp_path, monkeypatch, refused, options, words):
    monkeypatch.chdir(tmp_path)
    refused(train.main, 2, words, *options)
    assert not list(tmp_path.iterdir())


def test_bad_places(tmp_path, refused):
    refused(train.main, 2, "there is no folder", "--checkpoint", tmp_path / "nowhere" / "model.pth")
    refused(train.main, 2, "is a folder", "--checkpoint", tmp_path)
    refused(train.main, 2, "is a folder", "--checkpoint", "")
    refused(train.main, 2, "is where the loss curve goes", "--checkpoint", tmp_path / "loss.csv")
    refused(train.main, 2, "batch_size 301 is more than the 300 images", *TINY, "--batch-size", 301)
    refused(train.main, 1, "train-images-idx3-ubyte.gz is missing", "--checkpoint", tmp_path / "model.pth",
            "--data-dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_help_shows_every_field_of_the_recipe_with_its_default(call):
    status, out, _ = call(train.main, "--help")
    assert status == 0
    options = {match[1]: " ".join(match[0].split())
               for match in re.finditer(r"--([a-z-]+)[ ,].*?\(default:\s.*?\)", out, flags=re.DOTALL)}
    fixed = {"model", "in_channels", "num_classes"}  # MNIST's
    for config_class in (TrainConfig, ModelConfig):
        for field in fields(config_class):
            if field.name not in fixed:
                assert f"(default: {field.default})" in options[field.name.replace("_", "-")]


def test_the_defaults_are_the_recipe():
    cfg = TrainConfig()
    assert (cfg.epochs, cfg.batch_size, cfg.loss) == (500, 300, "l1")
    assert (cfg.checkpoint, cfg.checkpoint_every) == ("model.pth", 1000)
    model = cfg.model
    assert (model.image_size, model.patch_size, model.hidden_size, model.depth, model.num_heads) == (28, 4, 64, 3, 4)
    assert (model.num_classes, T) == (10, 1000)


def test_the_papers_models_by_name(tmp_path, call):
    with mock.patch.object(train, "train") as started:
        assert call(train.main, "--model", "DiT-S/4", "--checkpoint", tmp_path / "model.pth", "--device", "cpu")[0] == 0
        model = started.call_args.args[0].model
        assert model == replace(PAPER["DiT-S/4"], in_channels=1, num_classes=10)
        assert call(train.main, "--depth", 2, "--model", "DiT-XL/8", "--no-learn-sigma", "--checkpoint",
                    tmp_path / "model.pth", "--device", "cpu")[0] == 0
        model = started.call_args.args[0].model
        assert model == replace(PAPER["DiT-XL/8"], in_channels=1, num_classes=10, depth=2, learn_sigma=False)


def test_a_named_model_is_trained_and_draws(tmp_path, train_tiny):
    """Its shape but for the width and depth of the tests: 32 x 32 pixels, patches of 8, learned variance."""
    status, _, err = train_tiny(tmp_path, "--model", "DiT-S/8")
    assert status == 0, err
    model, _ = load_model(tmp_path / "model.pth")
    assert (model.config.image_size, model.config.patch_size, model.config.learn_sigma) == (32, 8, True)
    assert generate(model, torch.tensor([3]), sampler="ddim", steps=2).shape == (1, 1, 32, 32)
