"""What README says can be run is run, and what it names is there."""

import importlib
import re
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from conftest import ROOT

import inference
import train
from checkpoint import load_model

README = (ROOT / "README.md").read_text()


def test_links_and_pictures_are_there_and_small():
    places = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(places) > 12
    for place in places:
        assert (ROOT / place).exists(), place
    for picture in (ROOT / "assets").iterdir():
        assert picture.stat().st_size < 300_000, picture
        assert f"assets/{picture.name}" in README


def test_every_module_is_in_the_table():
    for module in ROOT.glob("*.py"):
        assert f"[`{module.name}`]({module.name})" in README


def test_every_symbol_of_the_map_exists():
    table = README.split("### With the papers in hand")[1].split("\n## ")[0]
    names = [name for line in table.splitlines() if line.startswith("|") for name in re.findall(r"`([^`]+)`", line)]
    assert len(names) > 30
    for name in names:
        module, *path = name.removeprefix("tests.").split(".")
        found = importlib.import_module(module)
        for part in path:
            found = getattr(found, part)


def test_the_shipped_weights_were_made_by_the_command_given():
    """The run was stopped and resumed with fewer epochs: both of its commands are in README."""
    [command] = re.findall(r"^    torchrun .* train\.py (--epochs .*)$", README, flags=re.MULTILINE)
    [epochs] = re.findall(r"the same line with `(--epochs \d+) --resume`", README)
    with mock.patch.object(train, "train") as started:
        assert train.main([*command.split(), *epochs.split()]) == 0
    recipe = asdict(started.call_args.args[0])
    _, info = load_model(ROOT / "model.pth")
    for name in info["recipe"].keys() - {"checkpoint", "checkpoint_every"}:
        assert info["recipe"][name] == recipe[name], name
    assert info["step"] == recipe["epochs"] * (60_000 // recipe["batch_size"])


@pytest.mark.parametrize("command", re.findall(r"`?python inference\.py ?([^`\n]*)", README))
def test_every_drawing_command_is_accepted(command, monkeypatch, tmp_path):
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pth").symlink_to(ROOT / "model.pth")
    arguments = command.split("#")[0].split()
    with mock.patch.object(inference, "draw") as started:
        assert inference.main(arguments) == 0
    assert started.called


def test_the_options_of_drawing_are_all_explained(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert len(options) == 11
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", README, flags=re.MULTILINE))


def test_the_python_example_runs(monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(example, names)
    assert names["images"].shape == (2, 1, 28, 28) and names["images"].abs().max() <= 1
    assert torch.is_tensor(names["images"])
