"""The loop as its user calls it: what it writes, how it stops and continues, and what it says when it cannot."""

import csv
import math
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, content, run_script

import train
from config import BLOCKS, FAMILY, PAPER, ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from runtime import run
from runtime.checkpoint import checksum, load_checkpoint, load_model, save_checkpoint
from runtime.run import STATE, STOP_SIGNALS

FILES = {"model.pth", "model.resume.pth", "loss.csv", "loss.png", "samples.png"}


def rows(folder):
    with open(folder / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def run_state(folder):
    """All that must not depend on how often a run was stopped: its state without wall time and place, and its curve."""
    state = load_checkpoint(folder / "model.resume.pth", STATE)
    for row in state["curve"]:
        del row["seconds"]
    curve = [{**row, "seconds": None} for row in rows(folder)]
    return checksum({name: state[name] for name in STATE if name not in ("seconds", "recipe")}), curve


def watch_loss(monkeypatch, before):
    """Call before(step, x_0, y, t, eps) when the loss of step 1, 2, ... is computed; what it returns multiplies the loss."""
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
    constant, cosine = (TrainConfig(lr=2.0, lr_schedule=schedule) for schedule in ("constant", "cosine"))
    assert [train.learning_rate(step, constant, 100) for step in (0, 50, 99)] == [2, 2, 2]
    assert [train.learning_rate(step, cosine, 100) for step in (0, 25, 50)] == pytest.approx([2, 1 + 0.5**0.5, 1])
    assert 0 < train.learning_rate(99, cosine, 100) < 0.001


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
        held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert len(optimizers) == count and sorted(map(id, held)) == sorted(map(id, model.parameters()))
        assert all(group["weight_decay"] == 0 for optimizer in optimizers for group in optimizer.param_groups)
    in_muon = {id(p) for p in optimizers[1].param_groups[0]["params"]}
    assert {name for name, p in model.blocks[0].named_parameters() if id(p) in in_muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight"}


def test_held_out_loss_is_comparable():
    """The same at every call, untouched by and not touching the random state of training; each image counts once."""
    digits = load_mnist(False, ROOT / "mnist", limit=260)
    model, diffusion = DiT(ModelConfig(depth=1)).eval(), GaussianDiffusion()
    state = torch.get_rng_state()
    first = train.held_out_loss(model, diffusion, digits, "l1")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert train.held_out_loss(model, diffusion, digits, "l1") == first
    assert first == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)  # E|eps|, as a new network predicts 0


# What a run draws and writes

def test_a_run_as_its_user_starts_it(tmp_path):
    done = run_script("train.py", *TINY, "--epochs", 1, "--seed", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path).keys() == FILES
    model, info = load_model(tmp_path / "model.pth")
    assert info["step"] == 3 and info["recipe"]["seed"] == 3 and model.config.hidden_size == 16
    [row] = rows(tmp_path)
    assert list(row) == ["epoch", "step", "train_loss", "test_loss", "seconds"] and (row["epoch"], row["step"]) == ("1", "3")
    assert 0.1 < float(row["train_loss"]) < 0.9 and 0.7 < float(row["test_loss"]) < 0.9
    assert re.fullmatch(r"epoch 1/1: \d+ s, train_loss=0\.\d{4}, test_loss=0\.\d{4}\n", done.stderr)  # no bar in a log file
    sampled = run_script("inference.py", "--steps", 5, cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    for picture in ("loss.png", "samples.png", "inference.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_it_learns(tmp_path, train_tiny):
    assert train_tiny(tmp_path, "--epochs", 12, "--lr", 0.01, "--ema-decay", 0.9, "--optimizer", "muon")[0] == 0
    losses = [float(row["test_loss"]) for row in rows(tmp_path)]
    assert len(losses) == 12 and losses[-1] < 0.6 < losses[0]


def test_the_noise_of_a_seed_is_the_same_for_every_network(tmp_path, train_tiny, monkeypatch):
    """Images, labels, dropped labels, t and eps do not depend on how many initial values a network draws."""
    networks = [("--block", block) for block in BLOCKS] + [("--hidden-size", 32, "--depth", 2), ("--seed", 1)]
    drawn = []
    for number, options in enumerate(networks):
        with monkeypatch.context() as patch:
            batches = []
            watch_loss(patch, lambda step, *batch, batches=batches: batches.append(checksum(batch)))
            assert train_tiny(tmp_path / str(number), *options)[0] == 0
        drawn.append(batches)
    *same, other = drawn
    assert len(set(same[0])) == 3 and all(batches == same[0] for batches in same)
    assert not set(other) & set(same[0])


def test_samples_change_no_random_number(tmp_path, train_tiny, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    assert train_tiny(a, "--epochs", 2)[0] == 0
    monkeypatch.setattr(train, "samples_due", lambda *args: False)
    torch.manual_seed(99)
    assert train_tiny(b, "--epochs", 2)[0] == 0
    states = [load_checkpoint(folder / "model.resume.pth", STATE) for folder in (a, b)]
    for entry in ("weights", "ema", "optimizers", "noise", "order"):
        assert checksum(states[0][entry]) == checksum(states[1][entry])
    assert content(b).keys() == FILES - {"samples.png"}


def test_checkpoints_come_every_so_many_steps_and_at_the_end_but_not_at_step_0(tmp_path, train_tiny, monkeypatch):
    saved, save = [], run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", lambda path, content: (saved.append(content["step"]), save(path, content)))
    assert train_tiny(tmp_path, "--epochs", 3, "--checkpoint-every", 4)[0] == 0
    assert saved == [4, 4, 8, 8, 9, 9]  # model.resume.pth and model.pth


def test_training_loss_is_the_mean_of_the_epoch(tmp_path, train_tiny, monkeypatch):
    watch_loss(monkeypatch, lambda step, *args: step)
    assert train_tiny(tmp_path, "--lr", 1e-9, "--min-snr", 0)[0] == 0  # where each step's loss is about 0.8
    assert float(rows(tmp_path)[0]["train_loss"]) == pytest.approx(0.8 * (1 + 2 + 3) / 3, rel=0.02)


def test_another_run_is_kept_and_can_continue(tmp_path, train_tiny):
    """Under the first names of which none is taken, as a run of its own."""
    (tmp_path / "model.old-1.loss.csv").write_text("precious")
    assert train_tiny(tmp_path, "--seed", 1)[0] == 0
    first = content(tmp_path)
    old = ("--checkpoint", tmp_path / "model.old-2.pth")
    status, out, _ = train_tiny(tmp_path)
    assert status == 0 and f"--resume --checkpoint {old[1]} continues it" in out
    second = content(tmp_path)
    for name in FILES:
        kept = name.replace("model", "model.old-2") if name.startswith("model") else f"model.old-2.{name}"
        assert second[kept][0] == first[name][0]
    assert train_tiny(tmp_path, *old, "--seed", 1, "--epochs", 2, "--resume")[0] == 0
    after = content(tmp_path)
    assert load_model(old[1])[1]["step"] == 6 and all(after[name] == second[name] for name in FILES)
    assert (tmp_path / "model.old-1.loss.csv").read_text() == "precious"


@pytest.mark.parametrize(("launch", "steps"), [("first", 0), ("second", 3)])
def test_what_torchrun_restarts_continues_its_own_run_only(tmp_path, train_tiny, monkeypatch, launch, steps):
    """Its first processes may have died before they set another run's state aside."""
    environment = {"TORCHELASTIC_RUN_ID": "first", "TORCHELASTIC_RESTART_COUNT": "0"}
    with mock.patch.dict(os.environ, environment):
        assert train_tiny(tmp_path)[0] == 0
    done = []
    watch_loss(monkeypatch, lambda step, *batch: done.append(step))
    with mock.patch.dict(os.environ, environment | {"TORCHELASTIC_RUN_ID": launch, "TORCHELASTIC_RESTART_COUNT": "1"}):
        assert train_tiny(tmp_path)[0] == 0
    assert len(done) == steps and (tmp_path / "model.old-1.resume.pth").exists() == (launch == "second")


# Stopping and continuing

@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_stops_after_saving(tmp_path, train_tiny, monkeypatch, number):
    """Also when it comes twice, as torchrun and timeout send it."""
    before = signal.getsignal(number)
    signals_at(monkeypatch, 2, number, number)
    status, out, _ = train_tiny(tmp_path)
    assert status == 128 + number and "stopped at step 2 of 3" in out
    assert load_model(tmp_path / "model.pth")[1]["step"] == 2
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_acts_at_once(tmp_path, train_tiny, monkeypatch):
    def interrupt_twice(step, *batch):
        for seconds in (2.1, 0) if step == 2 else ():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(seconds)

    watch_loss(monkeypatch, interrupt_twice)
    assert train_tiny(tmp_path)[0] == 130 and not content(tmp_path)


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, train_tiny, monkeypatch):
    """nohup ignores SIGHUP, a shell's `train.py &` SIGINT."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        signals_at(monkeypatch, 2, *before)
        assert train_tiny(tmp_path)[0] == 0
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_training_in_a_thread(tmp_path, train_tiny):
    """Where Python handles no signal; they stay the caller's business."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train_tiny, tmp_path).result()[0] == 0
    assert load_model(tmp_path / "model.pth")[1]["step"] == 3
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize(("step", "options"), [  # 3 steps per epoch: also its first and last one, and the end
    (1, ()), (3, ("--block", "in-context")), (4, ("--optimizer", "adamw")), (8, ("--loss", "mse", "--min-snr", 0)),
    (9, ("--learn-sigma",))])
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, train_tiny, monkeypatch, step, options):
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
    models = [load_model(folder / "model.pth")[0].state_dict() for folder in (whole, stopped)]
    assert checksum(models[0]) == checksum(models[1])
    assert (whole / "samples.png").read_bytes() == (stopped / "samples.png").read_bytes()


def test_more_epochs_may_follow(tmp_path, train_tiny):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    constant = ("--lr-schedule", "constant")  # another schedule would have been stretched over both epochs
    assert train_tiny(whole, *constant, "--epochs", 2)[0] == 0
    assert train_tiny(longer, *constant)[0] == 0
    status, out, _ = train_tiny(longer, *constant, "--epochs", 2, "--resume")
    assert status == 0 and run_state(whole) == run_state(longer) and "cosine" not in out


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    options = ("--checkpoint", folder / "model.pth", *TINY, "--epochs", 2, "--lr-schedule", "constant")
    assert train.main([str(option) for option in options]) == 0
    return folder


def change_state(folder, **changes):
    state = load_checkpoint(folder / "model.resume.pth", STATE)
    del state["sha256"]
    save_checkpoint(folder / "model.resume.pth", state | changes)


def test_another_number_of_threads_or_epochs_is_reported(tmp_path, train_tiny):
    """Threads change the last bits, as sums are taken in another order; epochs stretch the cosine."""
    assert train_tiny(tmp_path)[0] == 0
    _, out, _ = train_tiny(tmp_path, "--resume")
    assert "with 1 threads" not in out and "cosine" not in out
    change_state(tmp_path, threads=7)
    _, out, _ = train_tiny(tmp_path, "--epochs", 2, "--resume")
    assert "with 1 threads instead of 7" in out and "the cosine now spans 2 epochs instead of 1" in out


def test_a_state_from_another_kind_of_device_continues(tmp_path, train_tiny):
    """The random state of a GPU has another size; t and eps are then drawn afresh."""
    assert train_tiny(tmp_path)[0] == 0
    change_state(tmp_path, noise=torch.zeros(16, dtype=torch.uint8))
    status, _, err = train_tiny(tmp_path, "--epochs", 2, "--resume")
    assert status == 0 and len(rows(tmp_path)) == 2, err


def test_a_state_from_before_an_option_existed_continues(tmp_path, train_tiny):
    """The option was at its default then, whatever that does."""
    assert train_tiny(tmp_path)[0] == 0
    recipe = load_checkpoint(tmp_path / "model.resume.pth", STATE)["recipe"]
    del recipe["min_snr"], recipe["model"]["block"]
    change_state(tmp_path, recipe=recipe)
    assert train_tiny(tmp_path, "--epochs", 2, "--min-snr", 7, "--resume")[0] == 1
    assert train_tiny(tmp_path, "--epochs", 2, "--resume")[0] == 0


@pytest.mark.parametrize(("options", "words"), [
    (("--lr", 0.5, "--seed", 9), f"lr was {TrainConfig().lr} and is 0.5, seed was 0 and is 9"),
    (("--depth", 2), "depth was 1 and is 2"), (("--block", "adaLN"), "block was 'adaLN-Zero' and is 'adaLN'")])
def test_another_recipe_is_refused_by_name(tmp_path, train_tiny, refused, options, words):
    assert train_tiny(tmp_path)[0] == 0
    before = content(tmp_path)
    refused(train.main, 1, words, "--checkpoint", tmp_path / "model.pth", *TINY, "--epochs", 2, *options, "--resume")
    assert content(tmp_path) == before


def adamw(state):
    """Its state of the first parameter, (16, 1, 4, 4)."""
    return state["optimizers"][0]["state"][0]


def muon_of_torch(state):
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    state["optimizers"][1] = torch.optim.Muon([matrix]).state_dict()


@pytest.mark.parametrize("change", [
    lambda state: state.update(step=0), lambda state: state.update(step=-5), lambda state: state.update(step=2),
    lambda state: state.update(step=14), lambda state: state.update(step=9, curve=state["curve"] * 3),
    lambda state: state["curve"].append({}), lambda state: state["curve"][0].update(step=2),
    lambda state: state["curve"][0].update(test_loss="x"), lambda state: state["curve"][0].update(seconds=math.nan),
    lambda state: state.update(weights={}), lambda state: state["weights"]["pos_embed"].fill_(math.inf),
    lambda state: state["ema"]["pos_embed"].fill_(math.nan), lambda state: state["ema"].update(more=torch.zeros(1)),
    lambda state: adamw(state).update(exp_avg=torch.zeros(1)), lambda state: adamw(state).update(exp_avg=torch.zeros(0)),
    lambda state: adamw(state).update(exp_avg=torch.zeros(1).expand(16, 1, 4, 4)),
    lambda state: adamw(state)["exp_avg_sq"].fill_(math.nan), lambda state: adamw(state).pop("exp_avg_sq"),
    lambda state: adamw(state).update(exp_avg=5), lambda state: adamw(state).update(step=torch.tensor(-1.0)),
    lambda state: state["optimizers"][1]["state"].pop(0), muon_of_torch,
    lambda state: state["optimizers"][0]["param_groups"][0].pop("betas"),
    lambda state: state["optimizers"][0]["param_groups"][0].update(betas=None, odd=1),
    lambda state: state["optimizers"][0]["param_groups"][0]["params"].pop(),
    lambda state: state["optimizers"][0].pop("param_groups"), lambda state: state["optimizers"].pop(),
    lambda state: state["optimizers"].reverse(), lambda state: state.update(optimizers=[5, 5]),
    lambda state: state.update(noise=state["noise"][:-8]), lambda state: state.update(noise=torch.zeros(16)),
    lambda state: state.update(noise=state["noise"] * 0), lambda state: state.update(order=torch.zeros(3)),
    lambda state: state.update(loss_sum=torch.zeros(2)), lambda state: state["loss_sum"].fill_(math.nan),
    lambda state: state["samples"].append(5), lambda state: state["samples"][0].update(images=torch.zeros(10, 1, 28, 28)),
    lambda state: state.update(seconds=math.inf), lambda state: state.update(schedule=[1000, 0.0001, 0.02, 0.1]),
    lambda state: state.update(recipe={}), lambda state: state["recipe"].update(model=5)])
def test_a_state_that_does_not_fit_is_refused_before_a_file_changes(tmp_path, two_epochs, refused, change):
    folder = shutil.copytree(two_epochs, tmp_path / "copy")
    state = load_checkpoint(folder / "model.resume.pth", STATE)
    del state["sha256"]
    change(state)
    save_checkpoint(folder / "model.resume.pth", state)
    before = content(folder)
    refused(train.main, 1, "model.resume.pth", "--checkpoint", folder / "model.pth", *TINY, "--epochs", 3, "--lr-schedule",
            "constant", "--resume")
    assert content(folder) == before


# What goes wrong

@pytest.mark.parametrize("step", [1, 7])
def test_a_loss_that_is_not_finite_is_not_saved(tmp_path, train_tiny, monkeypatch, step):
    """Nor are other weights lost: the curve of the first epochs may be written by then, and model.pth not yet."""
    (tmp_path / "model.pth").write_text("precious")
    watch_loss(monkeypatch, lambda now, *args: math.nan if now == step else 1)
    status, _, err = train_tiny(tmp_path, "--epochs", 3)
    assert status == 1 and "model.pth is left as last saved" in err.splitlines()[-1] and "Traceback" not in err
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


@pytest.mark.parametrize(("error", "status"), [
    (KeyboardInterrupt(), 130), (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1), (MemoryError(), 1),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1)])
def test_an_end_before_the_first_step(tmp_path, train_tiny, monkeypatch, error, status):
    monkeypatch.setattr(train, "load_mnist", mock.Mock(side_effect=error))
    ended, _, err = train_tiny(tmp_path)
    assert ended == status and ("train.py: error: out of memory" in err) == (status == 1)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_code_is_not_hidden(tmp_path, train_tiny, monkeypatch):
    monkeypatch.setattr(train, "load_mnist", mock.Mock(side_effect=RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_tiny(tmp_path)


def test_nothing_to_resume_and_no_data(tmp_path, refused):
    refused(train.main, 1, "there is nothing to resume", "--checkpoint", tmp_path / "model.pth", *TINY, "--resume")
    refused(train.main, 1, "train-images-idx3-ubyte.gz is missing", "--checkpoint", tmp_path / "model.pth",
            "--data-dir", tmp_path)
    assert not content(tmp_path)


def test_without_options_it_is_the_recipe(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(train, "train") as started:
        assert call(train.main, "--device", "cpu")[0] == 0
    assert started.call_args.args[0] == TrainConfig(device="cpu")


@pytest.mark.parametrize("name", ["DiT-S/4", "XL/7"])
def test_models_by_name(tmp_path, call, name):
    """The name sets the defaults; other options override them."""
    options = ("--checkpoint", tmp_path / "model.pth", "--device", "cpu", "--model", name)
    named = replace((PAPER | FAMILY)[name], in_channels=1, num_classes=10)
    with mock.patch.object(train, "train") as started:
        assert call(train.main, *options)[0] == 0
        assert started.call_args.args[0].model == named
        assert call(train.main, "--depth", 2, "--block", "adaLN", *options)[0] == 0
        assert started.call_args.args[0].model == replace(named, depth=2, block="adaLN")


def test_a_named_model_is_trained_and_samples(tmp_path, train_tiny):
    """Its shape except for the width and depth of the tests: 32 x 32 pixels, patches of 8, learned variance."""
    status, _, err = train_tiny(tmp_path, "--model", "DiT-S/8")
    assert status == 0, err
    model, _ = load_model(tmp_path / "model.pth")
    assert (model.config.image_size, model.config.patch_size, model.config.learn_sigma) == (32, 8, True)
    assert generate(model, torch.tensor([3]), sampler="ddim", steps=2).shape == (1, 1, 32, 32)
