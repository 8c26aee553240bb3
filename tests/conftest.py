"""What the tests share: a network whose gates are open, calls of scripts, a folder's content."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from config import ModelConfig
from dit import DiT

ROOT = Path(__file__).parent.parent

# One thread for tiny networks, whatever else the machine does; scripts that tests start inherit it.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
train.load_mnist = functools.cache(train.load_mnist)  # which takes longer than three steps


@pytest.fixture
def small_config() -> ModelConfig:
    """A small network, none of whose sizes is the MNIST model's."""
    return ModelConfig(image_size=12, patch_size=3, in_channels=2, hidden_size=24, depth=2,
                       num_heads=3, mlp_ratio=2.0, num_classes=5)


def random_network(config: ModelConfig, std: float = 0.2) -> DiT:
    """A network in which every parameter is random, so that gates and the final layer count."""
    torch.manual_seed(0)
    model = DiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture
def open_network(small_config) -> DiT:
    return random_network(small_config)


@pytest.fixture
def call(capfd):
    """call(main, *arguments) -> (exit status, standard output, standard error)."""

    def call_main(main, *arguments):
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err

    return call_main


@pytest.fixture
def refused(call):
    """refused(main, status, words, *arguments): it exits with one sentence with these words."""

    def check(main, status, words, *arguments):
        ended, _, err = call(main, *arguments)
        sentence = err.strip().splitlines()[-1] if err.strip() else ""
        assert (ended, words in sentence) == (status, True), (ended, err)
        assert "Traceback" not in err and ": error: " in sentence
        if status == 1:
            assert err.count("error:") == 1 and len(err.strip().splitlines()) == 1, err

    return check


TINY = ("--data-dir", ROOT / "mnist", "--limit", 300, "--batch-size", 100, "--hidden-size", 16,
        "--depth", 1, "--num-heads", 2, "--device", "cpu", "--no-compile")


@pytest.fixture
def train_tiny(call):
    """train_tiny(folder, *options): a run of one epoch, three steps, by default."""

    def run(folder, *options):
        folder.mkdir(exist_ok=True)
        place = ("--checkpoint", folder / "model.pth")
        return call(train.main, *place, *TINY, "--epochs", 1, *options)

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A model.pth after three steps on the first 300 images."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ("--checkpoint", folder / "model.pth", *TINY, "--epochs", 1)
    assert train.main([str(argument) for argument in arguments]) == 0
    return folder / "model.pth"


def content(folder: Path) -> dict:
    """The files of a folder, except locks: name -> bytes and time of change."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()
            if path.is_file() and path.suffix != ".lock"}


def run_script(name: str, *arguments, cwd: Path, **settings) -> subprocess.CompletedProcess:
    """A script as a user calls it, in another process and folder."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **settings)
