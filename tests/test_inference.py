"""The picture is what was sampled, every option does what it says, and what cannot be done is said in a sentence."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, content
from matplotlib.image import imread
from PIL import Image

import inference
from config import MNIST_IMAGES, ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from runtime.checkpoint import load_model, save_checkpoint
from runtime.pictures import GAP, MAX_SIDE, ZOOM, denser_at_the_end, fits, loss_curve, save_animation, save_picture, show
from train import held_out, held_out_loss

SIDE = ZOOM * (28 + GAP)


@pytest.fixture
def sample(call, tiny_checkpoint, tmp_path):
    """sample(*options): five steps with the tiny network; returns the images of the picture, (rows, columns, 28, 28)."""

    def run(*options):
        status, _, err = call(inference.main, "--checkpoint", tiny_checkpoint, "--output", tmp_path / "inference.png",
                              "--device", "cpu", "--steps", 5, *options)
        assert status == 0, err
        return cells(imread(tmp_path / "inference.png")[..., 0])

    return run


def cells(pixels):
    """The images of a picture, (rows, columns, 28, 28) in [-1, 1], from pixels in [0, 1]; margins are left and on top."""
    top, left = pixels.shape[0] % SIDE, pixels.shape[1] % SIDE
    pixels = pixels[top:, left:].reshape(pixels.shape[0] // SIDE, SIDE, -1, SIDE).swapaxes(1, 2)
    return pixels[:, :, :28 * ZOOM:ZOOM, :28 * ZOOM:ZOOM] * 2 - 1


def network(path, **settings):
    """A checkpoint of an untrained network."""
    model = DiT(ModelConfig(hidden_size=16, depth=1, **settings))
    save_checkpoint(path, {"model_config": asdict(model.config), "ema": model.state_dict(), "step": 1, "recipe": {}})
    return path


# The picture

def test_the_last_column_is_the_final_sample_and_the_first_is_the_noise(sample, tiny_checkpoint):
    shown = sample("--seed", 4)
    final = generate(load_model(tiny_checkpoint)[0], range(10), steps=5, seed=4)
    noise = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(4))
    assert shown.shape[:2] == (10, 6)
    np.testing.assert_allclose(shown[:, -1], final[:, 0].clamp(-1, 1), atol=0.02)  # 256 greys
    np.testing.assert_allclose(shown[:, 0], noise[:, 0].clamp(-1, 1), atol=0.02)


def test_one_column_is_a_sheet_of_final_samples(sample, tiny_checkpoint):
    shown = sample("--columns", 1, "--per-digit", 20)
    final = generate(load_model(tiny_checkpoint)[0], [d for d in range(10) for _ in range(20)], steps=5)
    np.testing.assert_allclose(shown, final.reshape(10, 20, 28, 28).clamp(-1, 1), atol=0.02)


@pytest.mark.parametrize(("steps", "count"), [(1000, 11), (1000, 2), (1000, 1), (50, 31), (20, 11), (5, 6), (1, 11)])
def test_columns_from_noise_to_sample_are_denser_at_the_end(steps, count):
    times = denser_at_the_end(list(range(steps, -1, -1)), count)
    assert len(times) == min(count, steps + 1) and times[-1] == 0 and (times[0] == steps or count == 1)
    gaps = -np.diff(times)
    assert (gaps > 0).all() and (np.diff(gaps) <= 1).all()  # 1: of rounding
    if (steps, count) == (1000, 11):
        assert sum(time < 500 for time in times) > 6


def test_times_and_digits_are_written_next_to_the_images(monkeypatch, sample):
    figures = []
    monkeypatch.setattr(inference, "show", lambda *arguments: figures.append(show(*arguments)) or figures[0])
    sample("--digits", 7, 0, "--per-digit", 2)
    [axes] = figures[0].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"t={t}" for t in (1000, 800, 600, 400, 200, 0)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["7", "7", "0", "0"]


@pytest.mark.parametrize("options", [("--per-digit", 17), ("--digits", 3, "--per-digit", 13), ("--columns", 1), ()], ids=str)
def test_the_last_frame_shows_the_final_samples(sample, tmp_path, options):
    """For any number of images: every frame has the size of the canvas, and every image is in its place."""
    shown = sample("--gif", tmp_path / "digits.gif", *options)
    gif = Image.open(tmp_path / "digits.gif")
    assert gif.n_frames == 6
    gif.seek(5)
    last = cells(np.asarray(gif.convert("L")) / 255)
    np.testing.assert_allclose(last.reshape(-1, 28, 28), shown[:, -1], atol=0.16)  # 8 greys


@pytest.mark.parametrize("settings", [
    "image.origin: lower", "text.usetex: True", "axes.grid: True\nfont.size: 30\nfigure.facecolor: red\nimage.cmap: jet",
    "savefig.bbox: tight\nsavefig.pad_inches: 3\nsavefig.dpi: 50", "axes.facecolor: red\nfigure.dpi: 50"])
def test_pictures_do_not_depend_on_the_users_matplotlib(tmp_path, settings):
    curve = [{"epoch": epoch, "train_loss": 1 / epoch, "test_loss": 2 / epoch} for epoch in (1, 2)]
    images = torch.rand(3, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    (tmp_path / "matplotlibrc").write_text(settings)
    for make in (lambda: show(images, ["t=0", "t=1"], ["0", "1", "2"]), lambda: loss_curve(curve, "L1 loss", "")):
        save_picture(tmp_path / "first.png", make)
        with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
            save_picture(tmp_path / "second.png", make)
        assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


# Too large

@pytest.mark.parametrize("options", [("--gif", "a.gif"), ("--output", "a.jpg"), ("--output", "a.png"), ("--output", "a.png",
                                     "--columns", 1001, "--per-digit", 50), ("--per-digit", 10_000)], ids=str)
def test_what_is_too_large_is_refused_before_sampling(tmp_path, monkeypatch, refused, options):
    weights = network(tmp_path / "model.pth", image_size=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "generate", None)
    refused(inference.main, 2, "the picture is too large", "--checkpoint", weights, "--per-digit", 500, *options)
    assert os.listdir() == ["model.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif"])
@pytest.mark.parametrize("tall", [True, False])
def test_the_largest_that_is_accepted_can_be_written(tmp_path, monkeypatch, name, tall):
    count = MAX_SIDE // SIDE
    images = torch.zeros(count, 1, 28, 28)
    rows = list(images.split(1 if tall else count))
    assert fits(count, 1, 28) and not fits(count + 1, 1, 28)
    if name == "a.gif":
        save_animation(tmp_path / name, [rows, rows], ["", ""])
    else:
        save_picture(tmp_path / name, lambda: show(rows, ["t=0"], ["0"]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert max(Image.open(tmp_path / name).size) >= count * SIDE


# The options

def test_the_same_seed_gives_the_same_picture_and_every_option_another(sample):
    first = sample()
    assert np.array_equal(sample(), first)
    for options in (("--guidance", 3), ("--guidance", 1), ("--sampler", "ddim"), ("--sampler", "ddim", "--eta", 0.5),
                    ("--steps", 4), ("--seed", 1)):
        assert not np.array_equal(sample(*options)[:, -1], first[:, -1]), options


def test_labels_of_every_whole_number_type(open_network):
    first = generate(open_network, torch.tensor([0, 5, 2]), steps=2, guidance=1)
    for labels in ([0, 5, 2], (0, 5, 2), np.array([0, 5, 2], dtype=np.uint16), torch.tensor([0, 5, 2], dtype=torch.int32),
                   torch.tensor([0, 5, 2], dtype=torch.uint8)):
        assert torch.equal(generate(open_network, labels, steps=2, guidance=1), first)
    for labels in ([6], [-1], [], [1.0], [True], ["1"], "1", 1, None, [None], [[1]], [[1], [1, 2]], [2**70], {"a": 1},
                   torch.tensor([1.5]), torch.tensor([True]), torch.tensor([[1]]), np.array(["1"])):
        with pytest.raises(ValueError, match="labels must be integers in"):
            generate(open_network, labels)


@pytest.mark.parametrize(("settings", "words"), [
    ({"sampler": "euler"}, "sampler must be"), ({"eta": 0.5}, "eta needs the sampler ddim"),
    ({"sampler": "ddim", "eta": 1.5}, "eta must lie"), ({"steps": 0}, "steps must lie"), ({"steps": 1001}, "steps must lie"),
    ({"guidance": -1}, "guidance must lie"), ({"guidance": float("nan")}, "guidance must lie"),
    ({"seed": -1}, "seed must lie"), ({"seed": 2**32}, "seed must lie")])
def test_settings_out_of_range(open_network, settings, words):
    with pytest.raises(ValueError, match=words):
        generate(open_network, [1], **settings)


def test_all_bits_of_a_seed_count(open_network):
    images = [generate(open_network, [1], steps=1, seed=seed) for seed in (0, 1, 2**31, 2**32 - 1)]
    assert len({image.numpy().tobytes() for image in images}) == 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_the_same_digits_in_every_dtype(dtype, tolerance):
    """Their noise is the same, generated in float32."""
    model = load_model(ROOT / "model.pth")[0]
    first = generate(model, [3, 7], sampler="ddim", steps=10)
    other = generate(model.to(dtype), [3, 7], sampler="ddim", steps=10)
    assert other.dtype == dtype and (other.float() - first).abs().mean() < tolerance


@pytest.mark.parametrize("scale", [1e30, 1e38])
def test_a_sample_that_is_not_finite_is_not_shown(tmp_path, call, scale):
    """The weights are finite, and the network overflows."""
    model = DiT(ModelConfig(hidden_size=16, depth=1))
    for parameter in model.parameters():
        parameter.data.fill_(scale)
    save_checkpoint(tmp_path / "m.pth", {"model_config": asdict(model.config), "ema": model.state_dict(), "step": 1,
                                         "recipe": {}})
    before = content(tmp_path)
    status, _, err = call(inference.main, "--checkpoint", tmp_path / "m.pth", "--steps", 3, "--device", "cpu",
                          "--output", tmp_path / "a.png", "--gif", tmp_path / "a.gif")
    assert status == 1 and "error: the network's output is not finite" in err.splitlines()[-1] and "Traceback" not in err
    assert content(tmp_path) == before


def test_guidance_needs_a_null_class():
    model = DiT(ModelConfig(hidden_size=16, depth=1, class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="trained without a null class"):
        generate(model, [1], steps=1)
    assert generate(model, [1], steps=1, guidance=1).shape == (1, 1, 28, 28)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("state", [partial(default_dtype, torch.float64), partial(default_dtype, torch.float16),
                                   partial(torch.device, "meta"), torch.inference_mode, torch.enable_grad])
def test_torchs_global_state_does_not_matter(tiny_checkpoint, state):
    first = generate(load_model(tiny_checkpoint)[0], range(3), steps=2)
    with state():
        assert torch.equal(generate(load_model(tiny_checkpoint)[0], range(3), steps=2), first)


def test_under_autocast_it_is_the_same_to_its_precision(tiny_checkpoint):
    model = load_model(tiny_checkpoint)[0]
    with torch.autocast("cpu"):
        rounded = generate(model, range(3), steps=2)
    assert rounded.dtype == torch.float32 and torch.allclose(rounded, generate(model, range(3), steps=2), atol=0.05)


@pytest.mark.parametrize("settings", [{"in_channels": 3}, {"image_size": 35, "patch_size": 5}, {"class_dropout_prob": 0.0}],
                         ids=str)
def test_networks_that_cannot_sample_mnist(tmp_path, refused, settings):
    weights = network(tmp_path / "other.pth", **settings)
    refused(inference.main, 1, "other.pth", "--checkpoint", weights, "--output", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


# Files, names and streams

def test_an_output_is_no_input_and_no_other_output(tmp_path, monkeypatch, refused, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_checkpoint, "w.png")
    os.mkdir("folder")
    os.symlink("w.png", "soft.png")
    os.symlink("later.gif", "dangling.gif")
    os.symlink("later.gif", "dangling.png")
    before = content(tmp_path)
    for output in ("w.png", "folder/../w.png", "soft.png", tmp_path / "w.png"):
        refused(inference.main, 2, "same file", "--checkpoint", "w.png", "--output", output)
    for gif in ("later.gif", "folder/../later.gif", "dangling.gif"):
        refused(inference.main, 2, "same file", "--checkpoint", "w.png", "--output", "dangling.png", "--gif", gif)
    assert content(tmp_path) == before


def test_without_model_pth_here_the_one_next_to_the_script_is_taken(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(inference.main, "--steps", 1, "--digits", 1)
    assert status == 0 and str(ROOT / "model.pth") in out and os.listdir() == ["inference.png"]


@pytest.mark.parametrize("streams", ["| true", ">/dev/full 2>&1", ">&- 2>&- <&-"])
def test_a_broken_stream_costs_no_picture(tmp_path, tiny_checkpoint, streams):
    command = f"{sys.executable} {ROOT}/inference.py --checkpoint {tiny_checkpoint} --steps 2 --gif a.gif {streams}"
    assert subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=tmp_path, capture_output=True).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "inference.png"]


# The included weights

def test_the_included_weights_are_what_train_py_makes():
    """With no option at all, to the last of its epochs; and they are well trained."""
    model, info = load_model(ROOT / "model.pth")
    recipe = info["recipe"]  # without the options that came later, which were at their defaults
    assert TrainConfig(**recipe | {"model": ModelConfig(**recipe["model"])}) == TrainConfig()
    assert info["step"] == TrainConfig().epochs * (MNIST_IMAGES // TrainConfig().batch_size)
    diffusion = GaussianDiffusion()
    some = held_out(diffusion, load_mnist(False, ROOT / "mnist", limit=1000))
    assert held_out_loss(model, diffusion, some, "l1") < 0.05
