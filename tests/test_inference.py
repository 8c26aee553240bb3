"""The picture is what was sampled, every option does what it says, and what cannot be drawn is said in a sentence."""

import os
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, content, run_script
from matplotlib.image import imread
from PIL import Image

import inference
from config import ModelConfig, T
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import GAP, ZOOM, Snapshots, generate, tile
from runtime.checkpoint import load_model, save_checkpoint
from train import held_out_loss

SIDE = ZOOM * (28 + GAP)
MARGIN = 22


@pytest.fixture
def draw(call, tiny_checkpoint, tmp_path):
    """draw(*options): five steps with the tiny network; returns what was printed."""

    def run(*options):
        status, out, err = call(inference.main, "--checkpoint", tiny_checkpoint, "--output", tmp_path / "inference.png",
                                "--device", "cpu", "--steps", 5, *options)
        assert status == 0, err
        return out

    return run


def cells(path, rows, columns):
    """The images of a picture, (rows, columns, 28, 28) in [-1, 1], read back from its pixels."""
    pixels = imread(path)[..., 0]
    assert pixels.shape == (MARGIN + rows * SIDE, MARGIN + columns * SIDE)
    pixels = pixels[MARGIN:, MARGIN:].reshape(rows, SIDE, columns, SIDE).transpose(0, 2, 1, 3)
    return pixels[:, :, :28 * ZOOM:ZOOM, :28 * ZOOM:ZOOM] * 2 - 1


# The picture

def test_the_last_column_is_the_final_sample_and_the_first_is_the_noise(draw, tiny_checkpoint, tmp_path):
    draw("--seed", 4)
    drawn = cells(tmp_path / "inference.png", rows=10, columns=6)
    model, _ = load_model(tiny_checkpoint)
    final = generate(model, torch.arange(10), steps=5, seed=4, guidance=inference.GUIDANCE)
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(drawn[:, -1], final[:, 0].clamp(-1, 1), atol=0.02)  # 256 greys
    np.testing.assert_allclose(drawn[:, 0], noise[:, 0].clamp(-1, 1), atol=0.02)


def test_times_and_labels_are_written_beside_the_images(monkeypatch, draw, tmp_path):
    shown = {}
    figure_of = inference.show_canvas
    monkeypatch.setattr(inference, "show_canvas", lambda *a, **k: shown.setdefault("figure", figure_of(*a, **k)))
    draw("--digits", 7, 0, "--per-digit", 2)
    axes = shown["figure"][1]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["t=1000", "800", "600", "400", "200", "0"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["7", "7", "0", "0"]


def test_rows_follow_the_labels(monkeypatch, draw, tmp_path):
    """With a sampler that paints the label, the rows show 3, 3, 8, 8."""
    def paint(model, labels, on_step, **settings):
        for t in range(6):
            on_step(t, (labels / 10).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28))

    monkeypatch.setattr(inference, "generate", paint)
    draw("--digits", 3, 8, "--per-digit", 2)
    drawn = cells(tmp_path / "inference.png", rows=4, columns=6)
    np.testing.assert_allclose(drawn.mean(axis=(1, 2, 3)), [0.3, 0.3, 0.8, 0.8], atol=0.02)


def test_eleven_columns_of_a_thousand_steps():
    snapshots = Snapshots(1001, inference.COLUMNS)
    for t in reversed(range(1001)):
        snapshots(t, torch.zeros(1))
    assert snapshots.times == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert len(snapshots.images) == 11  # and not 1001


@pytest.mark.parametrize(("total", "count"), [(2, 11), (51, 11), (1001, 41), (6, 6)])
def test_snapshots_hold_the_first_and_the_last(total, count):
    snapshots = Snapshots(total, count)
    for t in reversed(range(total)):
        snapshots(t, torch.zeros(1))
    assert len(snapshots.times) == min(total, count)
    assert snapshots.times[0] == total - 1 and snapshots.times[-1] == 0


def test_tile():
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 2, 2) / 10
    canvas = tile(images, columns=3)
    assert canvas.shape == (2 * 4, 3 * 4)
    assert canvas[::4, ::4].flatten().tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert canvas[2:4].unique().tolist() == [1.0]


def test_animation(draw, tmp_path):
    draw("--gif", tmp_path / "digits.gif")
    gif = Image.open(tmp_path / "digits.gif")
    gif.seek(gif.n_frames - 1)
    last = np.asarray(gif.convert("L"), dtype=float)[MARGIN:] / 127.5 - 1
    assert last.shape == (SIDE, 10 * SIDE)
    final = cells(tmp_path / "inference.png", rows=10, columns=6)[:, -1]
    for digit in range(10):
        shown = last[:28 * ZOOM:ZOOM, digit * SIDE:digit * SIDE + 28 * ZOOM:ZOOM]
        np.testing.assert_allclose(shown, final[digit], atol=0.16)  # 8 greys


# The options

def test_the_same_seed_draws_the_same_picture(draw, tmp_path):
    pictures = []
    for seed in (1, 1, 2):
        draw("--seed", seed)
        pictures.append((tmp_path / "inference.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize("options", [("--guidance", 3), ("--guidance", 1), ("--sampler", "ddim"),
                                     ("--sampler", "ddim", "--eta", 0.5), ("--steps", 7)], ids=str)
def test_every_option_changes_the_picture(draw, tmp_path, options):
    draw()
    plain = (tmp_path / "inference.png").read_bytes()
    draw(*options)
    assert (tmp_path / "inference.png").read_bytes() != plain


def test_it_says_what_it_did(draw, tiny_checkpoint, tmp_path):
    out = draw("--guidance", 2.5, "--sampler", "ddim", "--eta", 0.5)
    assert f"{tiny_checkpoint}: EMA weights after 3 training steps, on cpu" in out
    assert "ddim, 5 steps, eta 0.5, seed 0, guidance 2.5 in the convention eps(null) + s (eps(digit) - eps(null))" in out
    assert f"wrote {tmp_path / 'inference.png'}" in out


@pytest.mark.parametrize(("learned", "dropped", "expected"), [(1.0, 0.1, "1.5"), (1.4, 0.1, "1"), (1.0, 0.0, "1")])
def test_the_guidance_that_suits_the_weights_is_the_default(call, tiny_checkpoint, tmp_path, learned, dropped, expected):
    model, info = load_model(tiny_checkpoint)
    config = {**info["model_config"], "class_dropout_prob": dropped}
    save_checkpoint(tmp_path / "other.pth", {"ema": model.state_dict(), "step": 3, "model_config": config,
                                             "recipe": {**info["recipe"], "learn_guidance": learned, "start_from": "a.pth"}})
    status, out, err = call(inference.main, "--checkpoint", tmp_path / "other.pth", "--output", tmp_path / "inference.png",
                            "--device", "cpu", "--steps", 2)
    assert status == 0, err
    assert f"guidance {expected} in the convention" in out and "after 3 training steps from a.pth, on cpu" in out


def test_generate_refuses_what_it_does_not_know(tiny_checkpoint, open_network):
    model, _ = load_model(tiny_checkpoint)
    for settings, words in (({"sampler": "DDIM"}, "sampler must be one of ddpm, ddim, not 'DDIM'"),
                            ({"sampler": "ddim", "steps": 0}, "number of sampling steps"),
                            ({"sampler": "ddim", "eta": 5.0}, "eta must lie in"),
                            ({"eta": 0.5}, "eta goes with the sampler ddim"),
                            ({"labels": torch.tensor([3, 11])}, "labels must lie in")):
        with pytest.raises(ValueError, match=words):
            generate(model, **{"labels": torch.tensor([1]), **settings})


def test_the_network_is_rebuilt_from_the_checkpoint(tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint)
    assert (model.config.hidden_size, model.config.depth) == (16, 1)  # and not the defaults


# What cannot be drawn

@pytest.mark.parametrize(("options", "words"), [
    (("--digits", 10), "argument --digits: must lie in [0, 10), not 10"),
    (("--digits", -1), "argument --digits: must lie in [0, 10), not -1"),
    (("--digits", "x"), "invalid int value: 'x'"),
    (("--per-digit", 0), "must be at least 1, not 0"),
    (("--per-digit", 51), "a picture has at most 500 rows"),
    (("--steps", 1001), "argument --steps: must lie in [1, 1000], not 1001"),
    (("--steps", 0), "must be at least 1, not 0"),
    (("--sampler", "euler"), "invalid choice: 'euler'"),
    (("--eta", 0.5), "argument --eta: goes with --sampler ddim"),
    (("--sampler", "ddim", "--eta", "nan"), "argument --eta: must lie in [0, 1], not nan"),
    (("--guidance", -1), "argument --guidance: must lie in [0, 100], not -1"),
    (("--guidance", "inf"), "argument --guidance: must lie in [0, 100]"),
    (("--seed", -1), "argument --seed: must lie in [0, 2^63)"),
    (("--device", "abacus"), "argument --device: device 'abacus' cannot be used here"),
    (("--output", "digits.txt"), "argument --output: digits.txt must end in .png"),
    (("--output", "nowhere/digits.png"), "there is no folder nowhere"),
    (("--gif", "digits.png"), "argument --gif: digits.png must end in .gif"),
    (("--gi", "digits.gif"), "unrecognized arguments"),
])
def test_bad_arguments(tmp_path, monkeypatch, refused, tiny_checkpoint, options, words):
    monkeypatch.chdir(tmp_path)
    refused(inference.main, 2, words, "--checkpoint", tiny_checkpoint, *options)
    assert not list(tmp_path.iterdir())


def test_networks_that_do_not_draw_digits_are_refused(tmp_path, refused):
    model = DiT(ModelConfig(in_channels=3))
    save_checkpoint(tmp_path / "other.pth", {"model_config": asdict(model.config), "ema": model.state_dict(), "step": 1,
                                             "recipe": {}})
    refused(inference.main, 1, "is of a network for other images than MNIST's", "--checkpoint", tmp_path / "other.pth",
            "--output", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


@pytest.fixture(params=["missing", "truncated", "another config", "pickled object"])
def bad_checkpoint(request, tmp_path, tiny_checkpoint):
    path = tmp_path / "model.pth"
    match request.param:
        case "truncated":
            path.write_bytes(tiny_checkpoint.read_bytes()[:-2000])
        case "another config":
            entries = torch.load(tiny_checkpoint, weights_only=True)
            entries["model_config"]["depth"] = 2
            save_checkpoint(path, {k: v for k, v in entries.items() if k not in ("format", "sha256")})
        case "pickled object":
            torch.save({"format": 1, "ema": ROOT}, path)
    return path, {"missing": "there is no checkpoint", "truncated": "is damaged or not a checkpoint",
                  "another config": "does not fit its network", "pickled object": "nothing of it was run"}[request.param]


def test_bad_checkpoints(bad_checkpoint, refused):
    path, words = bad_checkpoint
    before = content(path.parent)
    refused(inference.main, 1, words, "--checkpoint", path, "--output", path.with_name("inference.png"))
    assert content(path.parent) == before


def test_a_bad_checkpoint_as_a_user_meets_it(tmp_path):
    done = run_script("inference.py", cwd=tmp_path)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("inference.py: error: there is no checkpoint model.pth; ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_written_in(tmp_path, monkeypatch, refused, tiny_checkpoint):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    access = os.access  # root may write everywhere, so that this test has to say no in its place
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    refused(inference.main, 2, "no permission in folder", "--checkpoint", tiny_checkpoint, "--output", folder / "a.png")


# The weights that ship

def test_the_shipped_weights_are_the_default_network_well_trained():
    model, info = load_model(ROOT / "model.pth")
    assert model.config == ModelConfig() and info["recipe"]["limit"] == 0
    test_images = load_mnist(False, ROOT / "mnist", limit=1000)
    assert held_out_loss(model, GaussianDiffusion(T), test_images, "mse") < 0.03
