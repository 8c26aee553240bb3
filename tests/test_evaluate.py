"""The metrics: their definitions, real against real images, and every kind of damage is detected."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import ROOT, content
from torch.nn import functional as F

import evaluate
from config import T
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion
from evaluate import (
    Classifier,
    augmented,
    coverage_metrics,
    distribution_metrics,
    fid,
    memorised,
    nll_bound,
    trained_classifier,
)
from runtime.checkpoint import CheckpointError, load_model, save_checkpoint


@pytest.fixture(scope="module")
def data():
    return load_mnist(True, ROOT / "mnist", limit=3000), load_mnist(False, ROOT / "mnist", limit=1000)


@pytest.fixture(scope="module")
def classifier(data, tmp_path_factory) -> Classifier:
    """Three epochs on a few of the images: enough to tell digits apart."""
    return trained_classifier(tmp_path_factory.mktemp("data") / "classifier.pth", data[0], epochs=3)


# The classifier

@pytest.mark.slow
def test_the_classifier_reads_digits_and_is_kept(classifier, data, tmp_path):
    file = tmp_path / "classifier.pth"
    save_checkpoint(file, {"classifier": classifier.state_dict()})
    images, labels = data[1][:]
    assert torch.equal(trained_classifier(file, data[0])(images), classifier(images))
    assert 0.9 < evaluate.accuracy(classifier, images, labels) < 1
    assert evaluate.accuracy(classifier, images, (labels + 1) % 10) < 0.05


def test_a_file_that_holds_no_classifier_is_refused(tmp_path, data):
    weights = Classifier().state_dict()
    for entries in ({"ema": {}}, {"classifier": {}}, {"classifier": {**weights, "head.bias": torch.zeros(9)}},
                    {"classifier": {**weights, "head.bias": torch.full((10,), torch.nan)}}):
        save_checkpoint(tmp_path / "classifier.pth", entries)
        with pytest.raises(CheckpointError, match="classifier"):
            trained_classifier(tmp_path / "classifier.pth", data[0])


def test_where_the_classifier_cannot_be_kept_it_is_not_trained(tmp_path, monkeypatch, data):
    monkeypatch.setattr(evaluate, "augmented", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OSError, match="--data-dir"):
        trained_classifier(tmp_path / "classifier.pth", data[0])


def test_augmented_images_stay_digits_on_black(data):
    images = data[0][:100][0]
    moved = augmented(images)
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    assert not torch.equal(moved, images) and (moved[:, :, 0, 0] == -1).all()
    assert moved.mean().item() == pytest.approx(images.mean().item(), abs=0.05)


# The metrics

def test_fid_of_gaussians_is_the_closed_form():
    """|m - m'|^2 + sum (s_i - s'_i)^2 for normal features with diagonal covariances."""
    scale, generator = torch.linspace(0.5, 2, 128), torch.Generator().manual_seed(0)
    a, b = (torch.randn(20_000, 128, generator=generator) for _ in range(2))
    assert fid(a, b * scale + 0.3) == pytest.approx(128 * 0.3**2 + ((1 - scale) ** 2).sum().item(), rel=0.05)


@pytest.mark.slow
def test_fid_grows_with_every_kind_of_damage(classifier, data):
    (real, labels), test = data[0][:1000], data[1][:][0]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))

    def blurred(images):
        return F.conv2d(F.pad(images, (1, 1, 1, 1), value=-1), torch.ones(1, 1, 3, 3) / 9)

    def distance(images):
        return distribution_metrics(classifier, test, images)["FID"]

    least = distance(real)
    assert abs(distance(test)) < 1e-3 < least
    for less, more in ((blurred(real), blurred(blurred(real))),
                       ((real + 0.3 * noise).clamp(-1, 1), (real + 0.8 * noise).clamp(-1, 1)),
                       (torch.roll(real, 3, dims=3), torch.roll(real, 6, dims=3)),
                       (real[labels != 3], real[labels > 4])):
        assert least * 1.2 < distance(less) < distance(more)


def test_coverage_metrics_of_the_same_distribution_of_a_poor_and_of_a_narrow_one():
    generator = torch.Generator().manual_seed(0)
    real, other = (torch.randn(1000, 8, generator=generator) for _ in range(2))
    same, far, narrow = (coverage_metrics(real, points) for points in (other, other + 10, other * 0.05))
    assert same["density"] == pytest.approx(1, abs=0.1) and min(same["precision"], same["recall"]) > 0.8
    # Coverage of the same distribution, Naeem et al. eq. 11: 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k))
    expected = 1 - math.prod((1000 - i) / (2000 - i) for i in range(1, 6))
    assert same["coverage"] == pytest.approx(expected, abs=0.03)
    assert max(far.values()) == 0
    assert narrow["precision"] > 0.95 and narrow["recall"] < 0.05 and narrow["coverage"] < 0.3


def test_repeated_training_images_are_memorised(data):
    training, test = data[0][:][0], data[1][:500][0]
    assert memorised((training[:500] + 0.02).clamp(-1, 1), training) > 0.99
    assert memorised(test, training) < 0.01


def test_nll_bound_is_the_sum_of_its_terms(data, tiny_checkpoint):
    """With other noise: the terms of all t, and the KL of x_T and N(0, I), of one image after the other."""
    model, diffusion = load_model(tiny_checkpoint)[0], GaussianDiffusion()
    some, t = Digits(data[1].images[:2], data[1].labels[:2]), torch.arange(T)
    total = 0.0
    for x_0, y in zip(*some[:], strict=True):
        x_0, y = x_0.expand(T, 1, 28, 28), y.expand(T)
        x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7)))
        q_T = torch.distributions.Normal(diffusion.alpha_bar[-1].sqrt() * x_0[0], (1 - diffusion.alpha_bar[-1]).sqrt())
        prior = torch.distributions.kl_divergence(q_T, torch.distributions.Normal(0, 1)).mean() / math.log(2)
        total += diffusion.vlb_term(model(x_t, t, y), x_0, x_t, t).sum().item() + prior.item()
    assert nll_bound(model, some) == pytest.approx(total / 2, rel=0.01)


# The script

@pytest.mark.slow
def test_a_run_without_data_here_takes_that_of_the_project(tmp_path, monkeypatch, call, classifier, data, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_mnist", lambda train, folder, *rest: load_mnist(train, folder, "cpu", 1000))
    monkeypatch.setattr(evaluate, "trained_classifier", lambda *arguments: classifier)
    status, out, err = call(evaluate.main, "--checkpoint", tiny_checkpoint, "--n", 150, "--sampler", "ddim", "--steps", 2,
                            "--device", "cpu", "--json", "results.json")
    assert status == 0 and str(ROOT / "mnist") in out, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("source") in out
    assert results["FID"]["generated"] > 3 * results["FID"]["real"]  # noise is no digit
    assert all(f"{figure['generated']:.4f}" in out and f"{figure['real']:.4f}" in out for figure in results.values())


def test_an_output_cannot_be_an_input(tmp_path, monkeypatch, refused, tiny_checkpoint):
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(ROOT / "mnist" / "MNIST" / "raw", raw)
    save_checkpoint(tmp_path / "data" / "classifier.pth", {"classifier": Classifier().state_dict()})
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_checkpoint, "model.pth")
    os.link("model.pth", "hard.json")
    os.symlink(raw / "t10k-labels-idx1-ubyte.gz", "soft.json")
    before = [content(folder) for folder in (tmp_path, tmp_path / "data", raw)]
    for output, status in (("data/../model.pth", 2), ("hard.json", 2), ("soft.json", 1), ("data/classifier.pth", 1),
                           (raw / "train-images-idx3-ubyte.gz", 1)):
        refused(evaluate.main, status, "same file", "--device", "cpu", "--data-dir", "data", "--json", output)
    assert [content(folder) for folder in (tmp_path, tmp_path / "data", raw)] == before
