"""Options and places that cannot be used: exit 2 and one sentence, and nothing is written."""

import os

import pytest

import evaluate
import inference
import train


@pytest.mark.parametrize(("script", "options", "words"), [
    (train, "--epochs 0", "epochs must lie in [1, "),
    (train, "--batch-size 301 --limit 300", "batch_size 301 exceeds limit 300"),
    (train, "--lr nan", "lr must lie in "),
    (train, "--patch-size 5", "patch_size 5 does not divide image_size 28"),
    (train, "--block x", "--block"),
    (train, "--model XL/3", "--model"),
    (train, "--device cuda:99", "device 'cuda:99' cannot be used"),
    (train, "--checkpoint folder", "folder is a directory"),
    (train, "--checkpoint nowhere/model.pth", "nowhere is no directory to write to"),
    (inference, "--eta 0.5", "eta needs the sampler ddim"),
    (inference, "--guidance nan", "guidance must lie in [0, 100]"),
    (inference, "--seed -1", "seed must lie in [0, "),
    (inference, "--digits 10", "--digits"),
    (inference, "--columns 0", "--columns"),
    (inference, "--sampler x", "--sampler"),
    (inference, "--output a.txt", "a.txt must end in .png"),
    (inference, "--gif a.png", "a.png must end in .gif"),
    (inference, "--output folder.png", "folder.png is a directory"),
    (inference, "--output nowhere/a.png", "nowhere is no directory to write to"),
    (evaluate, "--n 99", "n must lie in [100, 20000]"),
    (evaluate, "--json a.txt", "a.txt must end in .json"),
    (evaluate, "--json nowhere/a.json", "nowhere is no directory to write to")])
def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch, refused, script, options, words):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.mkdir("folder.png")
    refused(script.main, 2, words, *options.split())
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", tmp_path / "folder.png"]
