"""The metrics: definitions, real against real images; every kind of damage is detected."""

import json
import math

import pytest
import torch
from conftest import ROOT
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import evaluate
from config import T
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion
from evaluate import (
    Classifier,
    coverage_metrics,
    distribution_metrics,
    fid,
    load_classifier,
    memorised,
    nll_bound,
    sample_images,
)
from runtime.checkpoint import load_model

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


# The metrics

def test_fid_of_gaussians_is_the_closed_form():
    """|m - m'|^2 + sum (s_i - s'_i)^2 for normal features with diagonal covariances."""
    scale, generator = torch.linspace(0.5, 2, 128), torch.Generator().manual_seed(0)
    a, b = (torch.randn(20_000, 128, generator=generator) for _ in range(2))
    expected = 128 * 0.3**2 + ((1 - scale) ** 2).sum().item()
    assert fid(a, b * scale + 0.3) == pytest.approx(expected, rel=0.05)
    for useless in (b / 0, b[:1]):
        with pytest.raises(ValueError, match="FID needs"):
            fid(a, useless)


def test_fid_grows_with_every_kind_of_damage(classifier, data):
    (real, labels), test = data[0][:600], data[1][:][0]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))

    def distance(images):
        return distribution_metrics(classifier, test[:600], images)["FID"]

    least = distance(real)
    assert abs(distance(test[:600])) < 1e-3 < least
    for less, more in ((F.avg_pool2d(real, 3, 1, 1), F.avg_pool2d(real, 5, 1, 2)),
                       (real + 0.3 * noise, real + 0.8 * noise),
                       (real[labels != 3], real[labels > 4])):
        assert least * 1.2 < distance(less) < distance(more)


def test_coverage_metrics_are_their_definitions_even_far_from_the_origin():
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 1e4
    generated = torch.cat([real[:100] + 0.1, real[100:] + 5])

    def distance(a, b):
        return (a.double()[:, None] - b.double()).norm(dim=2)

    between = distance(real, generated)
    in_real = between < distance(real, real).sort().values[:, 5:6]
    in_generated = between < distance(generated, generated).sort().values[:, 5]
    expected = {"precision": in_real.any(0), "recall": in_generated.any(1),
                "density": in_real.sum(0) / 5, "coverage": in_real.any(1)}
    assert coverage_metrics(real, generated) == pytest.approx(
        {name: value.double().mean().item() for name, value in expected.items()}, abs=1e-6)
    with pytest.raises(ValueError, match="more than k = 5"):
        coverage_metrics(real[:5], generated)


def test_noisy_copies_of_training_images_are_memorised_and_test_images_are_not(data):
    training, test = data[0][:][0], data[1][:500][0]
    found = memorised((training[:500] + 0.02).clamp(-1, 1), training)
    others = memorised(test, training)
    assert found["memorised"] > 0.99 and 0 < found["nearest"] < 0.02 * 28 < others["nearest"]
    assert others["memorised"] < 0.01


def test_no_two_batches_share_their_noise(tiny_checkpoint, monkeypatch):
    seeds = []

    def generate(model, y, seed):
        seeds.extend(seed)
        return torch.zeros(len(y), 1, 28, 28)

    monkeypatch.setattr(evaluate, "generate", generate)
    for seed in (0, 1, 2, 2**28, 2**31, 2**32 - 1):
        sample_images(load_model(tiny_checkpoint)[0], 300, seed)
    assert len(set(seeds)) == len(seeds) == 18 and max(seeds) < 2**32


def test_nll_bound_is_the_sum_of_its_terms(data, tiny_checkpoint):
    """With other noise: the terms of all t, and the KL of x_T and N(0, I)."""
    model, diffusion = load_model(tiny_checkpoint)[0], GaussianDiffusion()
    some, t = Digits(data[1].images[:1], data[1].labels[:1]), torch.arange(T)
    x_0, y = some[torch.zeros(T, dtype=torch.long)]
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7))
    x_t, alpha_bar_T = diffusion.q_sample(x_0, t, eps), diffusion.alpha_bar[-1]
    q_T = Normal(alpha_bar_T.sqrt() * x_0[0], (1 - alpha_bar_T).sqrt())
    prior = kl_divergence(q_T, Normal(0, 1)).mean() / math.log(2)
    with torch.no_grad():
        total = prior + diffusion.vlb_term(model(x_t, t, y), x_0, x_t, t, clip=True).sum()
    assert nll_bound(model, some, diffusion) == pytest.approx(total.item(), rel=0.04)


# The script

def test_each_strength_is_measured(tmp_path, call, monkeypatch, data, tiny_checkpoint):
    monkeypatch.setattr(evaluate, "load_mnist", lambda train, *rest: data[not train])
    file = tmp_path / "results.json"
    status, out, err = call(evaluate.main, "--checkpoint", tiny_checkpoint, "--sampler", "ddim",
                            "--steps", 2, "--n", 150, "--guidance", 1, 1.25, "--device", "cpu",
                            "--json", file)
    assert status == 0, err
    results = json.loads(file.read_text())
    assert results.pop("source") in out
    assert list(results) == ["guidance 1", "guidance 1.25", "real"]
    assert all(f"{value:10.4f}" in out for row in results.values() for value in row.values())
    one, other, real = results.values()
    assert one != other and min(one["FID"], other["FID"]) > 3 * real["FID"]  # noise is no digit
