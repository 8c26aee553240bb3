"""Every option of every script at its edges: it is accepted, or refused with exit 2 and one sentence, nothing written."""

import contextlib
import io
import math
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import inference
import train
from config import ModelConfig, TrainConfig

INTS = st.one_of(st.integers(-3, 12), st.sampled_from([28, 60_000, 60_001, 2**31, 2**63 - 1, 2**63, 10**30]), st.integers())
FLOATS = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, 1e-300, 1e300, math.nan, math.inf]))
WORDS = st.sampled_from(["", " ", "x", "0x10", "1e3", "1_000", "nan", "-inf", "١", "--", "-1", "9" * 5000, "ddim", "XL/2",
                         "cuda:99", "cpu:1", "meta:0", "vulkan", "cpu,cuda", " cpu"])
ANYTHING = st.one_of(INTS.map(str), FLOATS.map(str), WORDS)
SAMPLING = ["sampler", "steps", "eta", "guidance", "seed", "device"]
OPTIONS = {  # script: what it calls, and its options that take a value
    train: ("train", ["model", *(f.name.replace("_", "-") for config in (TrainConfig, ModelConfig) for f in fields(config)
                                 if "help" in f.metadata and f.name not in ("checkpoint", "data_dir"))]),
    inference: ("sample_pictures", [*SAMPLING, "digits", "per-digit", "columns"]),
    evaluate: ("measure", [*SAMPLING, "n", "bpd"]),
}
SCRIPTS = pytest.mark.parametrize("script", OPTIONS, ids=lambda script: script.__name__)


def started_with(script, *arguments: str):
    """What the script's work is called with, or None if the arguments are refused. Any exception fails the test."""
    err = io.StringIO()
    with mock.patch.object(script, OPTIONS[script][0]) as started, contextlib.redirect_stderr(err), \
            contextlib.redirect_stdout(io.StringIO()):
        try:
            status = script.main(list(arguments))
        except SystemExit as stop:
            status = stop.code
    if started.called:
        assert status == 0
        return started.call_args.args
    usage, _, sentence = err.getvalue().rpartition("error: ")
    assert status == 2 and usage and sentence.strip() and "\n" not in sentence.strip(), (arguments, status, err.getvalue())
    return None


@SCRIPTS
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_values(script, data):
    """What starts has every value in its range."""
    options = data.draw(st.lists(st.tuples(st.sampled_from(OPTIONS[script][1]), ANYTHING), min_size=1, max_size=3))
    called = started_with(script, "--device=cpu", *(f"--{name}={value}" for name, value in options))
    assert not called or "--" not in dict(options).values()
    if called and script is train:
        cfg = called[0]
        assert 1 <= cfg.batch_size <= (cfg.limit or 60_000) and 1 <= cfg.epochs and math.isfinite(cfg.lr) and cfg.lr > 0
        assert cfg.model.image_size >= 28 and cfg.model.image_size % cfg.model.patch_size == 0
        assert cfg.model.hidden_size % cfg.model.num_heads == 0
        assert 0 <= cfg.model.class_dropout_prob <= 1 and 0 <= cfg.ema_decay < 1
    elif called:
        args = called[-1]
        assert 1 <= args.steps <= 1000 and 0 <= args.eta <= 1 and 0 <= args.guidance <= 100 and 0 <= args.seed < 2**63
        if script is evaluate:
            assert 100 <= args.n <= 20_000 and 0 <= args.bpd <= 10_000
        else:
            assert all(0 <= digit < 10 for digit in args.digits) and args.per_digit >= 1 and args.columns >= 1


PLACES = ["", ".", "..", "/", "nowhere/file", "folder", "folder/", "file/below", "n" * 300, "a" * 250 + ".png", "loss.csv",
          "loss.png", "model.pth.", "-", "--", "~", "a b.pth", "ü.pth", ".pth", "file.png/", "nowhere/../file.gif", "a.txt"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("script", "option"), [(train, "checkpoint"), (inference, "output"), (inference, "gif"),
                                                (evaluate, "json"), (inference, "checkpoint")])
def test_places(tmp_path, monkeypatch, script, option, place):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    started_with(script, "--device=cpu", f"--{option}={place}")
    assert sorted(tmp_path.rglob("*")) == before
