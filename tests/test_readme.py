"""What README says can be run is run, and what it names is there."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, TINY

import inference
import train
from evaluate import Recogniser
from runtime.checkpoint import load_model, save_checkpoint

README = (ROOT / "README.md").read_text()
COMMANDS = sorted({command for line in re.findall(r"^    (\S.*)$", re.sub(r"\\\n +", "", README), flags=re.MULTILINE)
                   for command in line.split(" && ")})
SHORTER = {  # options that make a command short; the last one counts
    "train.py": [*map(str, TINY), "--epochs", "1", "--start-from="],  # so small a network has no use for those weights
    "inference.py": ["--steps", "2"],
    "evaluate.py": ["--n", "100", "--steps", "2", "--bpd", "1"],
    "benchmarks.training": ["--hidden-size", "16", "--depth", "1", "--batch-size", "8", "--rounds", "1"],
    "benchmarks.sampling": ["--hidden-size", "16", "--depth", "1", "--rounds", "1"],
    "assets.dits": [],
}
ELSEWHERE = {  # commands that no option makes short, and the tests that run them in part
    "benchmarks.quality": "tests/test_benchmarks.py::test_quality_pictures",
    "--scaling": "tests/test_benchmarks.py::test_scaling_picture",
    "--nnodes": "tests/test_distributed.py::test_two_machines_and_the_death_of_one_of_their_processes",
    "pip install": ".ci/run::pip install",
    "python -m pytest": ".ci/run::python -m pytest",
}


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
    [command] = re.findall(r"^    torchrun .* train\.py (--start-from model.pth .*)$", README, flags=re.MULTILINE)
    with mock.patch.object(train, "train") as started:
        assert train.main(command.split()) == 0
    recipe = asdict(started.call_args.args[0])
    _, info = load_model(ROOT / "model.pth")
    for name in info["recipe"].keys() - {"checkpoint", "checkpoint_every"}:
        assert info["recipe"][name] == recipe[name], name
    assert info["step"] == recipe["epochs"] * (60_000 // recipe["batch_size"])


@pytest.mark.parametrize(("words", "curve"), [("--epochs", "loss.csv"), ("--start-from", "loss-guidance.csv")])
def test_the_curves_are_those_of_the_commands_given(words, curve):
    [command] = re.findall(rf"^    torchrun .* train\.py ({words} .*)$", README, flags=re.MULTILINE)
    with mock.patch.object(train, "train") as started:
        assert train.main(command.split()) == 0
    recipe = started.call_args.args[0]
    epoch, step, *_ = (ROOT / "assets" / curve).read_text().splitlines()[-1].split(",")
    assert (int(epoch), int(step)) == (recipe.epochs, recipe.epochs * (60_000 // recipe.batch_size))


@pytest.fixture(scope="module")
def copy_of_the_project(tmp_path_factory):
    """Without its git; the judge is an untrained one."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "model.pth"):
        shutil.copy(path, folder)
    for name in ("assets", "benchmarks", "runtime"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "mnist").mkdir()
    (folder / "mnist" / "MNIST").symlink_to(ROOT / "mnist" / "MNIST")
    save_checkpoint(folder / "mnist" / "recogniser.mnist.pth", {"recogniser": Recogniser().state_dict()})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(words in c for words in ELSEWHERE)])
def test_every_command_runs(command, copy_of_the_project):
    [script] = [word for word in command.split() if word.endswith(".py")]
    shorter = " ".join([command, *SHORTER[script]])
    ended = subprocess.run(shorter, shell=True, cwd=copy_of_the_project, capture_output=True, text=True, timeout=300,
                           env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("words", ELSEWHERE)
def test_the_other_commands_are_run_elsewhere(words):
    assert any(words in command for command in COMMANDS), "no longer in README"
    file, test = ELSEWHERE[words].split("::")
    assert test in (ROOT / file).read_text()


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


def test_the_python_example_runs(monkeypatch, tmp_path):
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "model.pth").symlink_to(ROOT / "model.pth")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["images"].shape == (2, 1, 28, 28) and names["images"].abs().max() <= 1
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
