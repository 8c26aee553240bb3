"""Files are whole or absent, whatever fails; and what is read is checked."""

import errno
import os
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import content

from diffusion import GaussianDiffusion
from runtime import checkpoint
from runtime.checkpoint import FIRST_SCHEDULE, CheckpointError, load_model, save_checkpoint
from runtime.files import check_files, lock, remove_leftovers

BIAS = "x_embedder.proj.bias"


def weights_of(model, step):
    return {"model_config": asdict(model.config), "ema": model.state_dict(), "step": step,
            "recipe": {"lr": 0.1}, "schedule": GaussianDiffusion().schedule}


@pytest.fixture
def saved(tmp_path, open_network):
    path = tmp_path / "model.pth"
    save_checkpoint(path, weights_of(open_network, 7))
    return path


def rewrite(path, **changes):
    """The same checkpoint with other entries and a checksum that is right."""
    entries = torch.load(path, weights_only=True)
    del entries["sha256"]
    entries["ema"] |= changes.pop("ema", {})
    save_checkpoint(path, entries | changes)


# What is written is what is read

def test_a_model_comes_back_as_it_was(saved, open_network):
    before = torch.get_rng_state()
    model, info = load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config == open_network.config and not model.training
    assert info["step"] == 7 and info["recipe"] == {"lr": 0.1}
    state, expected = model.state_dict(), open_network.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_file_from_before_block_designs_and_schedules(saved, open_network):
    older = weights_of(open_network, 7)
    del older["model_config"]["block"], older["schedule"]
    save_checkpoint(saved, older)
    assert load_model(saved)[0].config.block == "adaLN-Zero"
    rewrite(saved, schedule=FIRST_SCHEDULE)
    assert load_model(saved)[1]["step"] == 7


def test_what_a_link_points_to_is_replaced(saved, open_network):
    (saved.parent / "links").mkdir()
    link = saved.parent / "links" / "best.pth"
    link.symlink_to("../model.pth")
    check_files([link])
    save_checkpoint(link, weights_of(open_network, 8))
    assert link.is_symlink() and load_model(saved)[1]["step"] == 8
    assert [path.name for path in link.parent.iterdir()] == ["best.pth"]
    assert sorted(path.name for path in saved.parent.iterdir()) == ["links", "model.pth"]


# Whatever fails while writing, the last good file stays

def failing(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(("function", "error"), [
    ("pathlib.Path.write_bytes", OSError(errno.ENOSPC, "no space")),
    ("os.fsync", OSError(errno.EIO, "I/O error")), ("os.fsync", KeyboardInterrupt()),
    ("os.replace", OSError(errno.EACCES, "Permission denied"))])
def test_a_failed_write_leaves_the_last_good_file(saved, open_network, monkeypatch, function,
                                                  error):
    before = content(saved.parent)
    monkeypatch.setattr(function, failing(error))
    words = r"^$|model\.pth could not be written .*; it is unchanged"
    with pytest.raises((OSError, KeyboardInterrupt), match=words):
        save_checkpoint(saved, weights_of(open_network, 8))
    assert content(saved.parent) == before


def test_what_cannot_be_written_is_reported_before_work_starts(tmp_path):
    for path, words in ((tmp_path, "is a directory or a device"), ("/dev/null", "or a device"),
                        ("/dev/stdout", "or a device"), ("/dev/model.pth", "or a device"),
                        ("/proc/self/fd/1", "or a device"), (tmp_path / ("a" * 250), "too long"),
                        (tmp_path / "nowhere" / "model.pth", "No such file or directory")):
        with pytest.raises(OSError, match=words):
            check_files([Path(path)])
    check_files([tmp_path / "model.pth"])
    assert not any(tmp_path.iterdir())


def test_what_killed_writes_left_is_removed(tmp_path):
    """Of these files alone, and no link's target."""
    names = (".model.0123abcd.tmp.pth", ".loss.ffffffff.tmp.csv", "precious", ".model.lock",
             ".model.fine.0123abcd.tmp.pth", ".model.tmp.pth", ".model.01234567.tmp.pt")
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / ".model.00000000.tmp.pth").symlink_to("precious")
    (tmp_path / ".model.00000001.tmp.pth").mkdir()
    remove_leftovers([tmp_path / "model.pth", tmp_path / "loss.csv"])
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:], ".model.00000001.tmp.pth"}


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("precious"), lambda path: path.symlink_to("none"), os.mkdir])
def test_a_lock_that_is_no_file_is_named_and_left_alone(tmp_path, make):
    (tmp_path / "precious").write_text("precious")
    make(tmp_path / ".model.lock")
    with pytest.raises(OSError, match=r"^\[Errno \d+\] .*: '.*/\.model\.lock'$"):
        lock(tmp_path / "model.pth")
    assert (tmp_path / "precious").read_text() == "precious" and len(os.listdir(tmp_path)) == 2


# What is read is checked

def refuse(path, words):
    """With one sentence, and without a change to the folder."""
    before = content(path.parent)
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(path)
    assert "\n" not in str(error.value) and content(path.parent) == before


def deflate(path):
    torch.save({"format": 1}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


@pytest.mark.filterwarnings("ignore:.*sparse")
@pytest.mark.parametrize(("make", "words"), [
    (lambda path: None, r"there is no checkpoint .*other\.pth; `python train\.py .*` makes one"),
    (os.mkdir, "is a directory, a pipe or a device"),
    (os.mkfifo, "is a directory, a pipe or a device"),
    (lambda path: path.write_text("not a checkpoint"), "not a zip file"),
    (lambda path: path.write_bytes(b""), "not a zip file"),
    (lambda path: zipfile.ZipFile(path, "w").writestr("x.npy", b""), "cannot be used: "),
    (lambda path: torch.save([1, 2], path), "is of another project"),
    (lambda path: torch.save({"model": torch.zeros(3)}, path), "is of another project"),
    (lambda path: torch.save({"format": 1, "x": torch.eye(3).to_sparse()}, path), "cannot be used"),
    (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not a zip file"),
    (deflate, "would expand"),
], ids=["none", "folder", "pipe", "text", "empty", "npz", "list", "dict", "sparse", "old", "zip"])
def test_other_kinds_of_file(tmp_path, make, words):
    make(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "other.pth")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_hostile_pickle_is_not_run(tmp_path):
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"format": 1, "ema": Hostile(mark)}, path)
    refuse(path, "none of it was run")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the test would notice: run, it leaves a mark


@pytest.mark.parametrize(("schedule", "words"), [
    ([500, 0.0001, 0.02, 0.006], r"was \[500, 0\.0001, 0\.02, 0\.006\] and is \[1000, 0\.0001, "),
    ([1000, 0.0001, 0.02, 0.1], "another schedule"), ("x", "another schedule")])
def test_another_schedule_is_refused(saved, schedule, words):
    rewrite(saved, schedule=schedule)
    refuse(saved, words)


def test_weights_are_for_the_process_that_they_were_trained_for(saved):
    other = GaussianDiffusion()
    assert load_model(saved, diffusion=other)[1]["step"] == 7
    other.beta = other.beta[:500]
    with pytest.raises(CheckpointError, match=r"was \[1000, .* and is \[500, "):
        load_model(saved, diffusion=other)


def test_another_format_is_reported(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    refuse(saved, r"is of another project, or of another version of this one")


@pytest.mark.parametrize("name", checkpoint.WEIGHTS)
def test_entries_that_are_missing(tmp_path, name):
    entries = {key: kind() for key, kind in checkpoint.WEIGHTS.items() if key != name}
    save_checkpoint(tmp_path / "part.pth", entries)
    refuse(tmp_path / "part.pth", f"without '{name}'")


@pytest.mark.parametrize(("config", "ema", "words"), [
    ({"depth": 3}, {}, "does not fit: .*blocks.2.* missing, or not expected"),
    ({"mlp_ratio": 2.5}, {}, "does not fit: .* is .*, not "),
    ({"block": "in-context"}, {}, "does not fit: .* missing, or not expected"),
    ({"hidden_size": 2**14, "num_heads": 1}, {}, "is .* torch.float32, not"),
    ({"image_size": 2**14, "patch_size": 1}, {}, "is .*, not .1, 268435456"),
    ({"patch_size": 5}, {}, "cannot build: patch_size 5 does not divide image_size 12"),
    ({"depth": "3"}, {}, "cannot build"), ({"registers": 4}, {}, "cannot build: .*registers"),
    ({}, {BIAS: torch.full((24,), torch.nan)}, "not finite"),
    ({}, {BIAS: torch.zeros(24, dtype=torch.float64)}, "is .24,. torch.float64, not .24,. torch.f"),
    ({}, {BIAS: torch.zeros(1).expand(24)}, BIAS), ({}, {BIAS: [0.0] * 24}, BIAS),
], ids=lambda value: "" if isinstance(value, str) else None)
def test_weights_that_do_not_fit(saved, config, ema, words):
    before = torch.load(saved, weights_only=True)["model_config"]
    rewrite(saved, model_config=before | config, ema=ema)
    refuse(saved, words)


def test_the_file_is_a_plain_dict_and_its_checksum_finds_a_changed_value(saved):
    entries = torch.load(saved, weights_only=True)
    assert set(entries) == {"format", "sha256", "schedule", *checkpoint.WEIGHTS}
    entries["ema"][BIAS][0] += 1e-6
    torch.save(entries, saved)
    refuse(saved, "as its checksum says")


def test_truncations_and_flipped_bytes(saved):
    """Each gives the one sentence, or loads the very weights that were saved."""
    whole, good = saved.read_bytes(), load_model(saved)[0].state_dict()
    rng, refused = random.Random(0), 0
    for trial in range(120):
        damaged = bytearray(whole[:rng.randrange(len(whole))] if trial % 4 == 0 else whole)
        for _ in range(rng.choice((1, 1, 8)) if trial % 4 else 0):
            # Every other one hits the zip's and the pickle's structure and not the mass of weights
            at = rng.randrange(len(whole)) if trial % 2 else rng.randrange(-8000, 8000)
            damaged[at] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        try:
            loaded = load_model(saved)[0].state_dict()
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(torch.equal(loaded[name], good[name]) for name in good)
    assert refused > 80
