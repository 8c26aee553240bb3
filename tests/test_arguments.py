"""Options and places that cannot be used: exit 2 and one sentence, and nothing is written."""

import os

import pytest

import evaluate
import inference
import train


@pytest.mark.parametrize(("script", "options"), [
    *((train, options) for options in (
        "--epochs 0", "--batch-size 301 --limit 300", "--lr nan", "--patch-size 5", "--block x",
        "--model XL/3", "--device cuda:99", "--steps 3", "--checkpoint folder",
        "--checkpoint nowhere/model.pth")),
    *((inference, options) for options in (
        "--steps 1001", "--eta 0.5", "--guidance nan", "--seed -1", "--digits 10",
        "--columns 0", "--sampler x", "--output a.txt", "--gif a.png", "--output folder.png",
        "--output nowhere/a.png")),
    *((evaluate, options) for options in ("--n 99", "--json a.txt", "--json nowhere/a.json"))],
    ids=str)
def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch, refused, script, options):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    os.mkdir("folder.png")
    refused(script.main, 2, "", *options.split())
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", tmp_path / "folder.png"]
