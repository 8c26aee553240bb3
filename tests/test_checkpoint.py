"""Files are whole or absent, whatever fails; and what is read is checked."""

import os
import random
from dataclasses import asdict

import pytest
import torch
from conftest import content

from diffusion import GaussianDiffusion
from runtime.checkpoint import CheckpointError, load_model, save_checkpoint

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


def refuse(path, words):
    """With one sentence, and without a change to the folder."""
    before = content(path.parent)
    with pytest.raises(CheckpointError, match=words) as error:
        load_model(path)
    assert "\n" not in str(error.value) and content(path.parent) == before


def test_a_model_comes_back_as_it_was(saved, open_network):
    model, info = load_model(saved)
    assert model.config == open_network.config and not model.training
    assert info["step"] == 7 and info["recipe"] == {"lr": 0.1}
    state, expected = model.state_dict(), open_network.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: None, r"there is no checkpoint .*other\.pth; `python train\.py .*` makes one"),
    (os.mkdir, "cannot be used: .*directory"),
    (lambda path: path.write_text("not a checkpoint"), "other than tensors and plain values"),
    (lambda path: path.write_bytes(b""), "cannot be used"),
    (lambda path: torch.save({"model": torch.zeros(3)}, path), "is of another project"),
    (lambda path: save_checkpoint(path, {"recipe": {}}), "another kind .*without 'model_config'"),
], ids=["none", "folder", "text", "empty", "foreign", "other"])
def test_other_kinds_of_file(tmp_path, make, words):
    make(tmp_path / "other.pth")
    refuse(tmp_path / "other.pth", words)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("mark",))


def test_a_hostile_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"format": 1, "ema": Hostile()}, path)
    refuse(path, "none of it was run")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the test would notice: run, it leaves a mark


def test_another_schedule_is_refused(saved):
    rewrite(saved, schedule=[500, 0.0001, 0.02, 0.006])
    refuse(saved, r"was \[500, 0\.0001, 0\.02, 0\.006\] and is \[1000, 0\.0001, ")


@pytest.mark.parametrize(("config", "ema", "words"), [
    ({"depth": 3}, {}, r"does not fit this code: .*Missing.*blocks\.2"),
    ({"mlp_ratio": 2.5}, {}, "does not fit this code: .*size mismatch"),
    ({"registers": 4}, {}, "does not fit this code: .*registers"),
    ({"patch_size": 5}, {}, "patch_size 5 does not divide image_size 12"),
    ({}, {BIAS: torch.full((24,), torch.nan)}, "not finite")], ids=["", "", "", "", "nan"])
def test_weights_that_do_not_fit(saved, config, ema, words):
    before = torch.load(saved, weights_only=True)["model_config"]
    rewrite(saved, model_config=before | config, ema=ema)
    refuse(saved, words)


def test_the_checksum_finds_a_changed_value(saved):
    entries = torch.load(saved, weights_only=True)
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
