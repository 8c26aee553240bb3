"""Every option of every script at its edges: it is accepted, or refused with exit 2 and one sentence, nothing written."""

import contextlib
import io
import math
import os
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import inference
import train
from config import ModelConfig, TrainConfig

INTS = st.one_of(st.integers(-3, 12), st.sampled_from([28, 60_000, 60_001, 2**31, 2**63 - 1, 2**63, 10**30]), st.integers())
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, 1e-300, 1e300, math.nan, math.inf]))
WORDS = st.sampled_from(["", " ", "x", "0x10", "1e3", "1_000", "nan", "-inf", "١", "--", "-1", "9" * 5000, "ddim", "muon"])
ANYTHING = st.one_of(INTS.map(str), FLOATS.map(str), WORDS)


def outcome(main, arguments: list[str]) -> tuple[int, str]:
    """The exit status and standard error of a call; an exception other than an exit fails the test."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
    return status, err.getvalue()


def assert_accepted_or_refused(main, arguments, started: mock.Mock):
    started.reset_mock()
    status, err = outcome(main, arguments)
    if started.called:
        assert status == 0
    else:
        assert status == 2, (arguments, status, err)
        usage, _, sentence = err.rpartition("error: ")
        assert usage and sentence.strip() and "\n" not in sentence.strip(), err


TRAIN_OPTIONS = ["--" + field.name.replace("_", "-") for config_class in (TrainConfig, ModelConfig)
                 for field in fields(config_class) if "help" in field.metadata]
TRAIN_VALUES = [name for name in TRAIN_OPTIONS if name not in ("--checkpoint", "--data-dir", "--device")]
INFERENCE_VALUES = ["--digits", "--per-digit", "--sampler", "--steps", "--eta", "--guidance", "--seed"]


@settings(max_examples=300, deadline=None)
@given(options=st.lists(st.tuples(st.sampled_from(TRAIN_VALUES), ANYTHING), min_size=1, max_size=3))
def test_train(options):
    """What starts is a recipe whose every value is in its range."""
    with mock.patch.object(train, "train") as started:
        assert_accepted_or_refused(train.main, ["--device", "cpu", *(f"{name}={value}" for name, value in options)], started)
        if started.called:
            cfg = started.call_args.args[0]
            assert 1 <= cfg.batch_size <= 60_000 and 1 <= cfg.epochs and math.isfinite(cfg.lr) and cfg.lr > 0
            assert 28 % cfg.model.patch_size == 0 and cfg.model.hidden_size % cfg.model.num_heads == 0
            assert 0 <= cfg.model.class_dropout_prob <= 1 and 0 <= cfg.ema_decay < 1


@settings(max_examples=300, deadline=None)
@given(options=st.lists(st.tuples(st.sampled_from(INFERENCE_VALUES), ANYTHING), min_size=1, max_size=3))
def test_inference(tiny_checkpoint, options):
    arguments = [word for name, value in options for word in ([name, value] if name == "--digits" else [f"{name}={value}"])]
    arguments += ["--device", "cpu", "--checkpoint", str(tiny_checkpoint)]
    with mock.patch.object(inference, "draw") as started:
        assert_accepted_or_refused(inference.main, arguments, started)
        if started.called:
            args = started.call_args.args[2]
            assert all(0 <= digit < 10 for digit in args.digits) and 1 <= args.per_digit <= 500
            assert 1 <= args.steps <= 1000 and 0 <= args.eta <= 1
            assert args.guidance is None or 0 <= args.guidance <= 100


EVALUATE_VALUES = ["--n", "--sampler", "--steps", "--eta", "--guidance", "--seed"]


@settings(max_examples=100, deadline=None)
@given(options=st.lists(st.tuples(st.sampled_from(EVALUATE_VALUES), ANYTHING), min_size=1, max_size=3))
def test_evaluate(options):
    arguments = ["--device", "cpu", *(f"{name}={value}" for name, value in options)]
    with mock.patch.object(evaluate, "measure") as started:
        assert_accepted_or_refused(evaluate.main, arguments, started)
        if started.called:
            args = started.call_args.args[0]
            assert 100 <= args.n <= 20_000 and 1 <= args.steps <= 1000 and 0 <= args.eta <= 1


DEVICES = st.one_of(st.sampled_from(["", "cuda:99", "cpu:1", "meta:0", "tpu", "vulkan", "cpu,cuda", "CPU", " cpu", "None"]),
                    st.text(min_size=1, max_size=8).filter(lambda text: not text.startswith("-") and "\0" not in text))


@settings(max_examples=60, deadline=None)
@given(device=DEVICES)
def test_devices(tiny_checkpoint, device):
    for script, function, more in ((train, "train", []), (evaluate, "measure", []),
                                   (inference, "draw", ["--checkpoint", str(tiny_checkpoint)])):
        with mock.patch.object(script, function) as started:
            assert_accepted_or_refused(script.main, [f"--device={device}", *more], started)


PLACES = ["", ".", "..", "/", "nowhere/file", "folder", "folder/", "file/below", "n" * 300, "a" * 250 + ".png", "loss.csv",
          "loss.png", "model.pth.", "-", "~", "*", "a b.pth", "ü.pth", ".pth", "file.png/", "nowhere/../file.gif"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("script", "function", "option"), [
    (train, "train", "--checkpoint"), (inference, "draw", "--output"), (inference, "draw", "--gif"),
    (evaluate, "measure", "--json"), (evaluate, "measure", "--save-images"), (evaluate, "measure", "--neighbours")])
def test_places(tmp_path, monkeypatch, tiny_checkpoint, script, function, option, place):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    weights = ["--checkpoint", str(tiny_checkpoint)] if script is inference else []
    with mock.patch.object(script, function) as started:
        assert_accepted_or_refused(script.main, ["--device", "cpu", *weights, f"{option}={place}"], started)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_no_checkpoint(tmp_path):
    for script in (inference, evaluate):
        status, err = outcome(script.main, ["--checkpoint", str(tmp_path)])
        assert status == 2 and "is a folder, where a file is meant" in err


def test_the_picture_does_not_replace_the_weights(tmp_path, tiny_checkpoint):
    weights = tmp_path / "weights.png"
    weights.write_bytes(tiny_checkpoint.read_bytes())
    status, err = outcome(inference.main, ["--checkpoint", str(weights), "--output", str(weights)])
    assert status == 2 and "is the checkpoint" in err
    assert weights.read_bytes() == tiny_checkpoint.read_bytes()


def test_the_scripts_are_all_here():
    scripts = {path.stem for path in ROOT.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == {"train", "inference", "evaluate"}


@pytest.mark.parametrize("script", ["train.py", "inference.py", "evaluate.py"])
def test_help_does_not_wait_for_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    ended = run_script(script, "--help", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 0 and "usage:" in ended.stdout, ended
