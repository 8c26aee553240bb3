"""The metrics: their definitions, real against real images; every kind of damage is detected."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import ROOT, content
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import evaluate
from config import T
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion
from evaluate import (
    CLASSIFIER,
    Classifier,
    balanced,
    coverage_metrics,
    distribution_metrics,
    fid,
    load_classifier,
    memorised,
    nll_bound,
    sample_images,
)
from experiments.classifier import augmented, train_classifier
from runtime.checkpoint import CheckpointError, load_model, save_checkpoint

MNIST = ROOT / "mnist"


@pytest.fixture(scope="module")
def data():
    return load_mnist(True, MNIST, limit=3000), load_mnist(False, MNIST, limit=1000)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


# The classifier

def test_the_included_classifier_reads_digits(classifier, data):
    images, labels = data[1][:]
    assert 0.99 < evaluate.accuracy(classifier, images, labels) < 1
    assert evaluate.accuracy(classifier, images, (labels + 1) % 10) < 0.01


def test_an_unusable_classifier_is_refused_with_the_remedy(tmp_path):
    file, weights = tmp_path / "classifier.pth", Classifier().state_dict()
    with pytest.raises(CheckpointError, match=r"No such file.*git checkout"):
        load_classifier(file=file)
    for entries in ({"ema": {}}, {"classifier": {}},
                    {"classifier": {**weights, "head.bias": torch.zeros(9)}},
                    {"classifier": {**weights, "head.bias": torch.full((10,), torch.nan)}}):
        save_checkpoint(file, entries)
        with pytest.raises(CheckpointError, match=r"classifier.*git checkout"):
            load_classifier(file=file)


@pytest.mark.slow
def test_a_classifier_is_trained_by_its_seed(data, tmp_path):
    """Three epochs on a few of the images: enough to tell digits apart."""
    trained = []
    for number, seed in enumerate((0, 0, 1)):
        train_classifier(tmp_path / str(number), data[0], seed, epochs=3)
        trained.append(load_classifier(file=tmp_path / str(number)).head.weight)
    assert torch.equal(*trained[:2]) and not torch.equal(*trained[1:])
    assert evaluate.accuracy(load_classifier(file=tmp_path / "0"), *data[1][:]) > 0.9


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
    expected = 128 * 0.3**2 + ((1 - scale) ** 2).sum().item()
    assert fid(a, b * scale + 0.3) == pytest.approx(expected, rel=0.05)


@pytest.mark.filterwarnings("ignore:cov")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_fid_of_what_has_no_fid_is_an_error(value):
    points = torch.randn(200, 16, dtype=torch.float64)
    broken = points.index_fill(1, torch.tensor([3]), value)
    broken[0] = 0  # so that 1e200 varies
    for sets in ((points, broken), (broken, points), (broken, broken), (points, points[:1])):
        with pytest.raises(ValueError, match="FID needs"):
            fid(*sets)


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
    same, far, narrow = (coverage_metrics(real, points)
                         for points in (other, other + 10, other * 0.05))
    assert same["density"] == pytest.approx(1, abs=0.1)
    assert min(same["precision"], same["recall"]) > 0.8
    # Naeem et al. eq. 11: 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k))
    expected = 1 - math.prod((1000 - i) / (2000 - i) for i in range(1, 6))
    assert same["coverage"] == pytest.approx(expected, abs=0.03)
    assert max(far.values()) == 0
    assert narrow["precision"] > 0.95 and narrow["recall"] < 0.05 and narrow["coverage"] < 0.3


def test_coverage_metrics_are_exact_far_from_the_origin():
    """As the definitions, in float64."""
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 1e4
    generated = torch.cat([real[:100] + 0.1, real[100:] + 5])

    def distance(a, b):
        return (a.double()[:, None] - b.double()).norm(dim=2)

    in_real = distance(real, generated) < distance(real, real).sort().values[:, 5:6]
    in_generated = distance(real, generated) < distance(generated, generated).sort().values[:, 5]
    expected = {"precision": in_real.any(0), "recall": in_generated.any(1),
                "density": in_real.sum(0) / 5, "coverage": in_real.any(1)}
    assert coverage_metrics(real, generated) == pytest.approx(
        {name: value.double().mean().item() for name, value in expected.items()}, abs=1e-6)


def test_coverage_metrics_need_more_points_than_neighbours():
    coverage_metrics(torch.rand(6, 2), torch.rand(6, 2))
    for sizes in ((5, 6), (6, 5)):
        with pytest.raises(ValueError, match="more than k = 5"):
            coverage_metrics(*(torch.rand(n, 2) for n in sizes))


def test_exact_and_noisy_copies_of_training_images_are_memorised_but_not_moved_ones(data):
    training, test = data[0][:][0], data[1][:500][0]
    copies, moved = (training[:500] + 0.02).clamp(-1, 1), training[:500].roll(1, dims=3)
    found, others = memorised(copies, training), memorised(test, training)
    assert found["memorised"] > 0.99 and 0 < found["nearest"] < 0.02 * 28 < others["nearest"]
    assert others["memorised"] < 0.01 and memorised(moved, training)["memorised"] < 0.05
    half = torch.full((1, 1, 28, 28), 0.5)
    assert memorised(half, torch.cat([half - 0.5, half - 1])) == pytest.approx(
        {"memorised": 0, "nearest": 0.5 * 28}, rel=1e-4)


def test_real_images_have_the_class_frequencies_of_the_generated(data):
    labels = torch.arange(995) % 10
    images = balanced(data[0], labels)
    for digit, part in enumerate(images.split(labels.bincount().tolist())):
        assert torch.equal(part, data[0][data[0].labels == digit][0][:len(part)])


def test_no_two_batches_share_their_noise(tiny_checkpoint, monkeypatch):
    model, seeds = load_model(tiny_checkpoint)[0], []
    monkeypatch.setattr(evaluate, "generate", lambda model, y, seed: (
        seeds.extend(seed), torch.zeros(len(y), 1, 28, 28))[1])
    for seed in (0, 1, 2, 2**28, 2**31, 2**32 - 1):
        sample_images(model, 300, seed)
    assert seeds[:3] == [0, 1, 2] and len(set(seeds)) == 18 and max(seeds) < 2**32


def test_nll_bound_is_the_sum_of_its_terms(data, tiny_checkpoint):
    """With other noise: the terms of all t, and the KL of x_T and N(0, I), image by image."""
    model, diffusion = load_model(tiny_checkpoint)[0], GaussianDiffusion()
    some, t = Digits(data[1].images[:2], data[1].labels[:2]), torch.arange(T)
    total = 0.0
    for x_0, y in zip(*some[:], strict=True):
        x_0, y = x_0.expand(T, 1, 28, 28), y.expand(T)
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7))
        x_t, alpha_bar_T = diffusion.q_sample(x_0, t, eps), diffusion.alpha_bar[-1]
        q_T = Normal(alpha_bar_T.sqrt() * x_0[0], (1 - alpha_bar_T).sqrt())
        total += kl_divergence(q_T, Normal(0, 1)).mean().item() / math.log(2)
        total += diffusion.vlb_term(model(x_t, t, y), x_0, x_t, t, clip=True).sum().item()
    assert nll_bound(model, some, diffusion) == pytest.approx(total / 2, rel=0.01)


# The script

def test_a_run_elsewhere_measures_each_strength(tmp_path, monkeypatch, call, data, tiny_checkpoint):
    """With the project's data and classifier."""
    monkeypatch.chdir(tmp_path)
    sets = {(train, MNIST): data[not train] for train in (True, False)}
    monkeypatch.setattr(evaluate, "load_mnist", lambda train, folder, device: sets[train, folder])
    status, out, err = call(evaluate.main, "--checkpoint", tiny_checkpoint, "--sampler", "ddim",
                            "--steps", 2, "--n", 150, "--guidance", 1, 1.25, "--device", "cpu",
                            "--json", "results.json")
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.pop("source") in out and list(results) == ["guidance 1", "guidance 1.25", "real"]
    assert all(f"{value:10.4f}" in out for row in results.values() for value in row.values())
    one, other, real = results.values()
    assert one != other and min(one["FID"], other["FID"]) > 3 * real["FID"]  # noise is no digit
    assert real["nearest"] < one["nearest"] and real["memorised"] == 0


def test_images_that_are_not_finite(tmp_path, monkeypatch, refused, data, tiny_checkpoint):
    broken = data[0][:100][0].index_fill(0, torch.tensor([7]), torch.nan), data[0].labels[:100]
    monkeypatch.setattr(evaluate, "load_mnist", lambda train, *rest: data[not train])
    monkeypatch.setattr(evaluate, "sample_images", lambda *arguments, **settings: broken)
    refused(evaluate.main, 1, "finite", "--checkpoint", tiny_checkpoint, "--device", "cpu",
            "--json", tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_an_output_cannot_be_an_input(tmp_path, monkeypatch, refused, tiny_checkpoint):
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(MNIST / "MNIST" / "raw", raw)
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_checkpoint, "model.pth")
    os.symlink(raw / "t10k-labels-idx1-ubyte.gz", "soft.json")
    folders = (tmp_path, tmp_path / "data", raw, CLASSIFIER.parent)
    before = [content(folder) for folder in folders]
    for output, status in (("data/../model.pth", 2), ("soft.json", 1), (CLASSIFIER, 1),
                           (raw / "train-images-idx3-ubyte.gz", 1)):
        refused(evaluate.main, status, "same file", "--device", "cpu", "--data-dir", "data",
                "--json", output)
    assert [content(folder) for folder in folders] == before
