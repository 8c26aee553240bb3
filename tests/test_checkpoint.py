"""Files are whole or absent, whatever fails; and no file, however damaged or hostile, is trusted."""

import errno
import os
import random
import time
import zipfile
from dataclasses import asdict

import pytest
import torch
from conftest import content

from diffusion import GaussianDiffusion
from runtime import checkpoint
from runtime.checkpoint import CheckpointError, load_model, save_checkpoint
from runtime.files import check_writable, lock, remove_leftovers

BIAS = "x_embedder.proj.bias"


def weights_of(model, step, recipe):
    return {"model_config": asdict(model.config), "ema": model.state_dict(), "step": step, "recipe": recipe,
            "schedule": GaussianDiffusion().schedule}


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
    before = torch.get_rng_state()
    model, info = load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config == open_network.config and not model.training
    assert info["step"] == 7 and info["recipe"] == {"lr": 0.1}
    assert all(torch.equal(value, open_network.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_file_from_before_the_block_designs_is_adaln_zero(saved, open_network):
    older = asdict(open_network.config)
    del older["block"]
    rewrite(saved, model_config=older)
    assert load_model(saved)[0].config.block == "adaLN-Zero"


def test_what_a_link_points_to_is_replaced(saved, open_network):
    (saved.parent / "links").mkdir()
    link = saved.parent / "links" / "best.pth"
    link.symlink_to("../model.pth")
    check_writable(link)
    save_checkpoint(link, weights_of(open_network, 8, {}))
    assert link.is_symlink() and load_model(saved)[1]["step"] == 8
    assert [path.name for path in link.parent.iterdir()] == ["best.pth"]
    assert sorted(path.name for path in saved.parent.iterdir()) == ["links", "model.pth"]


# Whatever fails while writing, the last good file stays

def failing(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(("function", "error"), [
    ("pathlib.Path.write_bytes", OSError(errno.ENOSPC, "no space")), ("os.fsync", OSError(errno.EIO, "I/O error")),
    ("os.replace", OSError(errno.EACCES, "Permission denied")), ("os.open", OSError(errno.EMFILE, "Too many open files")),
    ("os.fsync", KeyboardInterrupt())])
def test_a_failure_while_writing_leaves_the_last_good_file(saved, open_network, monkeypatch, function, error):
    before = content(saved.parent)
    monkeypatch.setattr(function, failing(error))
    with pytest.raises((OSError, KeyboardInterrupt), match=r"^$|model\.pth could not be written .*; it is unchanged"):
        save_checkpoint(saved, weights_of(open_network, 8, {}))
    assert content(saved.parent) == before


def test_what_cannot_be_written_is_reported_before_work_starts(tmp_path):
    for path, words in ((tmp_path, "is a directory or a device"), ("/dev/null", "is a directory or a device"),
                        (tmp_path / "nowhere" / "model.pth", "there is no directory"),
                        ("/dev/stdout", "device"), ("/dev/model.pth", "/dev is for devices"),
                        ("/proc/self/fd/1", "device"), (tmp_path / ("a" * 245 + ".png"), "File name too long")):
        with pytest.raises(OSError, match=words):
            check_writable(path)
    check_writable(tmp_path / "model.pth")
    assert not any(tmp_path.iterdir())


def test_what_killed_writes_left_is_removed(tmp_path):
    """Of these files alone, and no link's target."""
    files = tmp_path / "model.pth", tmp_path / "loss.csv"
    left = [tmp_path / name for name in (".model.0123abcd.tmp.pth", ".loss.ffffffff.tmp.csv")]
    others = [tmp_path / name for name in ("precious", ".model.fine.0123abcd.tmp.pth", ".model.tmp.pth", ".model.lock",
                                           ".model.01234567.tmp.pt", ".model.0123abcg.tmp.pth")]
    for path in left + others:
        path.touch()
    (tmp_path / ".model.00000000.tmp.pth").symlink_to("precious")
    (tmp_path / ".model.00000001.tmp.pth").mkdir()
    remove_leftovers(files)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / ".model.00000001.tmp.pth"])


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: path.symlink_to("precious"), "it is a link"), (lambda path: path.symlink_to("none"), "it is a link"),
    (lambda path: path.hardlink_to(path.with_name("precious")), "a link"), (os.mkdir, "Is a directory"),
    (os.mkfifo, "a device")])
def test_a_lock_that_is_no_file_is_named_and_left_alone(tmp_path, make, words):
    (tmp_path / "precious").write_text("precious")
    make(tmp_path / ".model.lock")
    with pytest.raises(OSError, match=rf"\.model\.lock, the lock of .*model\.pth, cannot be .*: .*{words}"):
        lock(tmp_path / "model.pth")
    assert (tmp_path / "precious").read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_a_lock_of_another_user(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", failing(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(OSError, match=r"\.model\.lock, the lock of .*, cannot be opened: Permission denied"):
        lock(tmp_path / "model.pth")


# What is read is not trusted

def refuse(path, words):
    """Within 8 s, with one sentence, and without a change to the folder."""
    before, began = content(path.parent), time.process_time()
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(path)
    assert "\n" not in str(error.value) and content(path.parent) == before
    assert time.process_time() - began < 8


def test_a_missing_file(tmp_path, monkeypatch):
    """git is named only where it helps."""
    refuse(tmp_path / "none.pth", r"there is no checkpoint .*none\.pth; `python train\.py --checkpoint .*` makes one$")
    monkeypatch.setattr(checkpoint, "PROJECT", tmp_path)
    (tmp_path / ".git").mkdir()
    refuse(tmp_path / "model.pth", f"and `git checkout -- model.pth` in {tmp_path} restores the included one")


@pytest.mark.parametrize(("make", "words"), [
    (os.mkdir, "is a directory, not a file"), (os.mkfifo, "is a pipe or a device, not a file"),
    (lambda path: path.write_text("not a checkpoint"), "is damaged or not a checkpoint .*not a zip file"),
    (lambda path: path.write_bytes(b""), "is damaged or not a checkpoint"),
    (lambda path: torch.save([1, 2], path), "is not a checkpoint of this project"),
    (lambda path: torch.save(torch.zeros(3), path), "is not a checkpoint of this project"),
    (lambda path: torch.save({"format": 1, "ema": torch.eye(3).to_sparse()}, path), "is damaged or not a checkpoint"),
    (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "is damaged or not a checkpoint"),
], ids=["directory", "pipe", "text", "empty", "list", "tensor", "sparse", "old torch"])
def test_other_kinds_of_file(tmp_path, make, words):
    make(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "other.pth")


def test_too_little_memory(saved, monkeypatch):
    monkeypatch.setattr(torch, "load", failing(MemoryError()))
    refuse(saved, "model.pth needs more memory than there is")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_a_hostile_pickle_is_not_run(tmp_path):
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"format": 1, "ema": Hostile(mark)}, path)
    refuse(path, "is damaged or not a checkpoint .*none of it was run")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the test would notice: run, it leaves a mark


def test_archives_that_would_expand(saved, monkeypatch):
    with zipfile.ZipFile(saved) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    refuse(saved, "its entries are compressed")


def test_text_from_a_file_is_safe_on_a_terminal(saved):
    names = "\x1b[2J\u202e\n"
    rewrite(saved, ema={names: torch.zeros(1)})
    refuse(saved, r"does not fit its network: \\x1b\[2J\\u202e\\n missing")
    rewrite(saved, model_config={names: 1})
    refuse(saved, r"does not build: .*\\x1b\[2J")


@pytest.mark.parametrize(("schedule", "words"), [
    ([500, 0.0001, 0.02, 0.00644], r"T = 500, beta from 0\.0001 to 0\.02, last alpha_bar 0\.00644\) than .*T = 1000"),
    ([1000, 0.0001, 0.02, 0.1], "last alpha_bar 0.1"), ([1000, 0.0001], "another schedule"), ("x", "another schedule"),
    (None, "another schedule")])
def test_another_schedule_is_refused(saved, schedule, words):
    rewrite(saved, schedule=schedule)
    refuse(saved, words)


def test_a_file_without_a_schedule_has_the_first_one(saved, monkeypatch):
    entries = torch.load(saved, weights_only=True)
    del entries["schedule"], entries["sha256"]
    save_checkpoint(saved, entries)
    other = GaussianDiffusion()
    assert load_model(saved, diffusion=other)[1]["step"] == 7
    other.beta = other.beta[:500]
    with pytest.raises(CheckpointError, match=r"\(T = 1000, .*\(T = 500"):
        load_model(saved, diffusion=other)


def test_another_format_is_reported(saved, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        rewrite(saved)
    refuse(saved, r"is of another version of this project \(format 2, not 1\)")


@pytest.mark.parametrize("name", checkpoint.WEIGHTS)
def test_entries_that_are_missing(tmp_path, name):
    save_checkpoint(tmp_path / "part.pth", {key: kind() for key, kind in checkpoint.WEIGHTS.items() if key != name})
    refuse(tmp_path / "part.pth", f"it holds no '{name}'")


@pytest.mark.parametrize(("config", "ema", "words"), [
    ({"depth": 3}, {}, "does not fit its network: blocks.2"),
    ({"mlp_ratio": 2.5}, {}, "does not fit its network: .* is not"),
    ({"block": "in-context"}, {}, "does not fit its network: .* missing, or not expected"),
    ({"hidden_size": 2**14, "num_heads": 1}, {}, "is not .* torch.float32"), ({"num_classes": 2**14}, {}, "is not .16385"),
    ({"image_size": 2**14, "patch_size": 1}, {}, "is not .1, 268435456"),
    ({"patch_size": 5}, {}, "does not build: patch_size 5 does not divide image_size 12"),
    ({"depth": "3"}, {}, "does not build"), ({"registers": 4}, {}, "does not build: .*registers"),
    ({}, {BIAS: torch.full((24,), torch.nan)}, "that are not finite"),
    ({}, {BIAS: torch.zeros(24, dtype=torch.float64)}, "is not .24,. torch.float32"),
    ({}, {BIAS: torch.zeros(25)}, "is not .24,."), ({}, {BIAS: [0.0] * 24}, "is not .24,."),
], ids=lambda value: "" if isinstance(value, str) else None)
def test_weights_that_do_not_fit(saved, config, ema, words):
    rewrite(saved, model_config=torch.load(saved, weights_only=True)["model_config"] | config, ema=ema)
    refuse(saved, words)


def test_the_file_is_a_plain_dict_and_its_checksum_finds_a_changed_value(saved):
    entries = torch.load(saved, weights_only=True)
    assert set(entries) == {"format", "model_config", "ema", "step", "recipe", "schedule", "sha256"}
    entries["ema"][BIAS][0] += 1e-6
    torch.save(entries, saved)
    refuse(saved, "does not match its checksum")


def test_truncations_and_flipped_bytes(saved):
    """Each gives the one sentence, or loads the very weights that were saved."""
    whole, good, rng, refused = saved.read_bytes(), load_model(saved)[0].state_dict(), random.Random(0), 0
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
