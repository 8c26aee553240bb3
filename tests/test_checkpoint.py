"""Files are whole or absent, whatever fails; and no file, however damaged or hostile, is trusted."""

import errno
import os
import pickle
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, content

from config import PAPER, ModelConfig
from dit import DiT
from runtime import checkpoint
from runtime.checkpoint import (
    WEIGHTS,
    CheckpointError,
    check_writable,
    load_model,
    outline,
    save_checkpoint,
    write_atomically,
)


def weights_of(model, step, recipe):
    return {"model_config": asdict(model.config), "ema": model.state_dict(), "step": step, "recipe": recipe}


@pytest.fixture
def saved(tmp_path, open_network):
    path = tmp_path / "model.pth"
    save_checkpoint(path, weights_of(open_network, 7, {"lr": 0.1}))
    return path


def rewrite(path, **changes):
    """The same checkpoint with other entries and a checksum that is right."""
    entries = {k: v for k, v in torch.load(path, weights_only=True).items() if k not in ("sha256", "format")}
    entries["ema"] |= changes.pop("ema", {})
    save_checkpoint(path, entries | changes)


# What is written is what is read

def test_a_model_comes_back_as_it_was(saved, open_network):
    model, info = load_model(saved)
    assert model.config == open_network.config and not model.training
    assert info["step"] == 7 and info["recipe"] == {"lr": 0.1}
    for name, value in open_network.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_file_is_a_plain_dict_that_torch_loads_with_weights_only(saved):
    entries = torch.load(saved, weights_only=True)
    assert set(entries) == {"format", "model_config", "ema", "step", "recipe", "sha256"}
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in entries["ema"].values())


def test_nothing_but_the_file_is_left(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["model.pth"]


# Whatever fails while writing, the last good file stays

FAULTS = {"write": ("pathlib.Path.write_bytes", errno.ENOSPC), "fsync": ("os.fsync", errno.EIO),
          "replace": ("os.replace", errno.EACCES), "open": ("os.open", errno.EMFILE)}


def test_a_folder_that_cannot_be_synced_is_said_truly(saved, open_network, monkeypatch):
    """The file is new by then, and the sentence says so."""
    calls, fsync = [], os.fsync

    def fail_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(OSError, match=r"model\.pth is written, but a power cut could undo that \(Input/output error\)"):
        save_checkpoint(saved, weights_of(open_network, 8, {}))
    assert load_model(saved)[1]["step"] == 8


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_while_writing_leaves_the_last_good_file(saved, open_network, monkeypatch, fault):
    before = content(saved.parent)

    def fail(*args, **kwargs):
        raise OSError(FAULTS[fault][1], os.strerror(FAULTS[fault][1]))

    with monkeypatch.context() as patch:
        patch.setattr(FAULTS[fault][0], fail)
        with pytest.raises(OSError, match=r"model\.pth could not be written \(.*\); it is as it was before"):
            save_checkpoint(saved, weights_of(open_network, 8, {}))
    assert content(saved.parent) == before
    assert load_model(saved)[1]["step"] == 7


def test_half_a_write_leaves_the_last_good_file(saved):
    before = content(saved.parent)

    def write_half(path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(saved, write_half)
    assert content(saved.parent) == before


def test_what_cannot_be_written_is_said_before_work_starts(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        check_writable(tmp_path / "folder")
    with pytest.raises(OSError, match="there is no folder"):
        check_writable(tmp_path / "nowhere" / "model.pth")
    with pytest.raises(OSError, match="File name too long"):
        check_writable(tmp_path / ("a" * 245 + ".png"))
    with pytest.raises(OSError, match="is not a file that could be replaced"):
        check_writable("/dev/null")
    check_writable(tmp_path / "model.pth")
    assert not (tmp_path / "model.pth").exists()


# What is read is not trusted

def refuse(path, words):
    before = content(path.parent) if path.parent.is_dir() else None
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    if before is not None:
        assert content(path.parent) == before


def test_missing_file_and_folder(tmp_path):
    refuse(tmp_path / "none.pth", r"there is no checkpoint .*none\.pth; `python train\.py` makes a model")
    refuse(tmp_path, "cannot be read|is damaged")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))],
                         ids=["torch", "pickle"])
def test_a_hostile_pickle_is_not_run(tmp_path, dump):
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    dump({"format": 1, "ema": Hostile(mark)}, path)
    refuse(path, "is damaged or not a checkpoint: .* nothing of it was run")
    assert not mark.exists()
    torch.load(path, weights_only=False) if dump is torch.save else pickle.loads(path.read_bytes())
    assert mark.exists()  # the test would notice: run, it leaves a mark


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {"format": "1"}, torch.zeros(3)], ids=str)
def test_other_things_that_torch_saved(tmp_path, value):
    torch.save(value, tmp_path / "other.pth")
    refuse(tmp_path / "other.pth", "is not a checkpoint of this project")


ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), ENDLESS, b"\x00" * 10],
                         ids=["sparse", "meta", "endless", "bytes"])
def test_crafted_entries(tmp_path, value):
    torch.save({"format": 1, "sha256": "", "ema": value}, tmp_path / "crafted.pth")
    refuse(tmp_path / "crafted.pth", "is damaged")


def test_a_text_file(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    refuse(tmp_path / "text.pth", "is damaged or not a checkpoint")


def test_a_newer_and_an_older_format_say_so(saved, monkeypatch):
    for version, age in ((checkpoint.FORMAT + 1, "a newer"), (checkpoint.FORMAT - 1, "an older")):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", version)
            rewrite(saved)
        refuse(saved, f"was written by {age} version of this project")


def test_entries_that_are_missing(tmp_path):
    for name in WEIGHTS:
        save_checkpoint(tmp_path / "part.pth", {key: kind() for key, kind in WEIGHTS.items() if key != name})
        refuse(tmp_path / "part.pth", f"it holds no '{name}'")


@pytest.mark.parametrize(("config", "words"), [
    ({"depth": 3}, "does not fit its network: blocks.2"),
    ({"hidden_size": 48}, "does not fit its network: .* is not"),
    ({"patch_size": 5}, "a network that this code does not build: patch_size 5 does not divide image_size 12"),
    ({"depth": "3"}, "a network that this code does not build"),
    ({"registers": 4}, "a network that this code does not build: .*registers"),
])
def test_another_config(saved, config, words):
    rewrite(saved, model_config=torch.load(saved, weights_only=True)["model_config"] | config)
    refuse(saved, words)


@pytest.mark.parametrize(("value", "words"), [
    (torch.full((24,), torch.nan), "that are not finite"),
    (torch.zeros(24, dtype=torch.float64), "is not .24,. torch.float32"),
    (torch.zeros(25), "is not .24,."), ([0.0] * 24, "is not .24,."),
], ids=["nan", "dtype", "shape", "list"])
def test_other_weights(saved, value, words):
    rewrite(saved, ema={"x_embedder.proj.bias": value})
    refuse(saved, words)


def test_a_changed_value_is_found_by_the_checksum(saved):
    entries = torch.load(saved, weights_only=True)
    entries["ema"]["x_embedder.proj.bias"][0] += 1e-6
    torch.save(entries, saved)
    refuse(saved, "does not match its checksum")


def test_truncations_and_flipped_bytes(saved):
    """Each gives the one sentence, or loads the very weights that were saved."""
    whole = saved.read_bytes()
    good = load_model(saved)[0].state_dict()
    rng = random.Random(0)
    refused = 0
    for trial in range(400):
        if trial % 4 == 0:
            damaged = whole[:rng.randrange(len(whole))]
        else:
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 1, 8))):
                # Every other one hits the zip's and the pickle's structure and not the mass of weights
                at = rng.randrange(len(whole)) if trial % 2 else rng.choice((rng.randrange(8000), -rng.randrange(1, 8000)))
                damaged[at] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        try:
            loaded = load_model(saved)[0].state_dict()
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(torch.equal(loaded[name], good[name]) for name in good)
    assert refused > 300


def test_the_outline_has_the_names_shapes_and_types_of_the_network():
    for config in (ModelConfig(), PAPER["DiT-S/8"]):
        outlined, network = outline(config).state_dict(), DiT(config).state_dict()
        assert all(value.is_meta for value in outlined.values())
        assert [(name, value.shape, value.dtype) for name, value in outlined.items()] == [
            (name, value.shape, value.dtype) for name, value in network.items()]


def test_loading_does_not_import_the_compiler():
    """It takes a second of the eight that inference.py has."""
    code = "import sys; from runtime.checkpoint import load_model; load_model('model.pth'); print('sympy' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"
