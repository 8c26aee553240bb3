"""The picture is what was sampled, every option counts, and what cannot be done is said."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.image import imread
from PIL import Image

import inference
from config import MNIST_IMAGES, ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from runtime.checkpoint import load_model, save_checkpoint
from runtime.pictures import GAP, ZOOM
from train import held_out, held_out_loss

SIDE = ZOOM * (28 + GAP)


@pytest.fixture
def sample(call, tiny_checkpoint, tmp_path):
    """sample(*options): the images of the picture after five steps, (rows, columns, 28, 28)."""

    def run(*options):
        picture = tmp_path / "inference.png"
        status, _, err = call(inference.main, "--checkpoint", tiny_checkpoint, "--output", picture,
                              "--device", "cpu", "--steps", 5, *options)
        assert status == 0, err
        return cells(imread(picture)[..., 0])

    return run


def cells(pixels):
    """Images in [-1, 1] from pixels in [0, 1], which have margins on the left and on top."""
    pixels = pixels[pixels.shape[0] % SIDE:, pixels.shape[1] % SIDE:]
    pixels = pixels.reshape(pixels.shape[0] // SIDE, SIDE, -1, SIDE).swapaxes(1, 2)
    return pixels[:, :, :28 * ZOOM:ZOOM, :28 * ZOOM:ZOOM] * 2 - 1


# The picture

def test_the_last_column_is_the_final_sample_and_the_first_is_the_noise(sample, tiny_checkpoint):
    shown = sample("--seed", 4)
    final = generate(load_model(tiny_checkpoint)[0], range(10), steps=5, seed=4)
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    assert shown.shape[:2] == (10, 6)
    np.testing.assert_allclose(shown[:, -1], final[:, 0].clamp(-1, 1), atol=0.02)  # 256 greys
    np.testing.assert_allclose(shown[:, 0], noise[:, 0].clamp(-1, 1), atol=0.02)


def test_one_column_is_a_sheet_of_final_samples(sample, tiny_checkpoint):
    shown = sample("--columns", 1, "--per-digit", 3)
    y = [digit for digit in range(10) for _ in range(3)]
    final = generate(load_model(tiny_checkpoint)[0], y, steps=5)
    np.testing.assert_allclose(shown, final.reshape(10, 3, 28, 28).clamp(-1, 1), atol=0.02)


@pytest.mark.parametrize("options", [("--digits", 3, "--per-digit", 13), ("--columns", 2)], ids=str)
def test_the_last_frame_shows_the_final_samples(sample, tmp_path, options):
    shown = sample("--gif", tmp_path / "digits.gif", *options)
    gif = Image.open(tmp_path / "digits.gif")
    assert gif.n_frames == 6
    gif.seek(5)
    last = cells(np.asarray(gif.convert("L")) / 255).reshape(-1, 28, 28)
    np.testing.assert_allclose(last, shown[:, -1], atol=0.16)  # 8 greys


# The options

def test_the_same_seed_gives_the_same_picture_and_every_option_another(sample):
    first = sample()
    assert np.array_equal(sample(), first)
    for options in (("--guidance", 1), ("--sampler", "ddim"), ("--sampler", "ddim", "--eta", 0.5),
                    ("--steps", 4), ("--seed", 1)):
        assert not np.array_equal(sample(*options)[:, -1], first[:, -1]), options


def test_labels_of_every_whole_number_type(open_network):
    first = generate(open_network, torch.tensor([0, 5, 2]), steps=2, guidance=1)
    for labels in ([0, 5, 2], np.array([0, 5, 2], dtype=np.uint16),
                   torch.tensor([0, 5, 2], dtype=torch.uint8)):
        assert torch.equal(generate(open_network, labels, steps=2, guidance=1), first)
    for labels in ([6], [-1], [1.5], 1, [[1]]):
        with pytest.raises(ValueError, match="labels must be integers in"):
            generate(open_network, labels)


@pytest.mark.parametrize("settings", [
    {"sampler": "euler"}, {"eta": 0.5}, {"sampler": "ddim", "eta": 1.5}, {"steps": 0},
    {"steps": 1001}, {"guidance": float("nan")}, {"seed": 2**32}], ids=str)
def test_settings_out_of_range(open_network, settings):
    with pytest.raises(ValueError, match=f"{list(settings)[-1]} (must|needs)"):
        generate(open_network, [1], **settings)


def test_a_sample_that_is_not_finite_is_not_shown(tmp_path, call):
    model, weights = DiT(ModelConfig(hidden_size=16, depth=1)), tmp_path / "model.pth"
    for parameter in model.parameters():
        parameter.data.fill_(1e30)  # finite, but the network overflows
    save_checkpoint(weights, {"model_config": asdict(model.config), "ema": model.state_dict(),
                              "step": 1, "recipe": {}, "schedule": GaussianDiffusion().schedule})
    status, _, err = call(inference.main, "--checkpoint", weights, "--steps", 3, "--device", "cpu",
                          "--output", tmp_path / "a.png")
    assert status == 1 and "error: the network's output is not finite" in err.splitlines()[-1]
    assert not (tmp_path / "a.png").exists()


# The included weights

def test_the_included_weights_are_what_train_py_makes():
    """With no option but --checkpoint, to the last of its epochs; and they are well trained."""
    model, info = load_model(ROOT / "model.pth")
    of_network = ModelConfig(**info["recipe"]["model"])
    recipe = info["recipe"] | {"model": of_network, "checkpoint": "model.pth"}
    assert TrainConfig(**recipe) == TrainConfig()
    assert info["step"] == TrainConfig().epochs * (MNIST_IMAGES // TrainConfig().batch_size)
    diffusion = GaussianDiffusion()
    some = held_out(diffusion, load_mnist(False, ROOT / "mnist", limit=1000))
    assert held_out_loss(model, diffusion, some, "l1") < 0.05
