"""Options and places that cannot be used: exit 2 and one sentence, and nothing is written."""

import os

import pytest

import evaluate
import inference
import train


@pytest.mark.parametrize(("script", "options"), [
    *((train, options) for options in (
        "--epochs 0", "--epochs x", "--batch-size 301 --limit 300", "--lr nan", "--seed -1",
        "--min-snr inf", "--ema-decay 1", "--patch-size 5", "--hidden-size 10", "--depth 0",
        "--model XL/3", "--block x", "--device cuda:99", "--device x", "--steps 3",
        "--checkpoint folder", "--checkpoint nowhere/model.pth", "--checkpoint /dev/stdout",
        "--checkpoint /dev/new.pth", "--checkpoint /proc/self/fd/1")),
    *((inference, options) for options in (
        "--steps 0", "--steps 1001", "--eta 0.5", "--eta 2 --sampler ddim", "--guidance nan",
        "--guidance -1", "--seed -1", "--digits 10", "--per-digit 0", "--columns 1002",
        "--sampler x", "--output a.txt", "--gif a.png", "--output nowhere/a.png",
        "--output folder.png", "--output a.png --checkpoint a.png")),
    *((evaluate, options) for options in (
        "--n 99", "--bpd 10001", "--json folder", "--json nowhere/a.json", "--json /dev/stdout"))],
    ids=str)
def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch, refused, script, options):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.mkdir("folder.png")
    refused(script.main, 2, "", *options.split())
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", tmp_path / "folder.png"]
