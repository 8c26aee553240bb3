"""The measures measured: real against real is near the floor, and every kind of harm is seen."""

import json
import math

import pytest
import torch
from conftest import ROOT, content
from torch.nn import functional as F

import evaluate
from config import T
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion
from evaluate import Recogniser, copied_share, frechet_distance, nearest_two, shaken, spread, trained_recogniser
from runtime.checkpoint import load_model, save_checkpoint
from vlb import bits_per_dimension


@pytest.fixture(scope="module")
def data():
    return load_mnist(True, ROOT / "mnist", limit=3000), load_mnist(False, ROOT / "mnist", limit=1000)


@pytest.fixture(scope="module")
def judge(data, tmp_path_factory) -> Recogniser:
    """Three epochs on a few of the images: enough to tell digits apart."""
    return trained_recogniser(tmp_path_factory.mktemp("judge") / "recogniser.pth", data[0], epochs=3)


def distance(judge, data, images):
    return frechet_distance(judge, data[1][:][0], images)


# The judge

@pytest.mark.slow
def test_the_recogniser_reads_digits_and_is_kept(judge, data, tmp_path):
    file = tmp_path / "recogniser.pth"
    save_checkpoint(file, {"recogniser": judge.state_dict()})
    again = trained_recogniser(file, data[0])
    images, labels = data[1][:]
    assert torch.equal(again(images), judge(images))
    share, each = evaluate.accuracy(judge, images, labels)
    assert share > 0.9 and min(each) > 0.7
    assert share == pytest.approx((judge(images).argmax(1) == labels).float().mean().item())
    wrong, _ = evaluate.accuracy(judge, images, (labels + 1) % 10)
    assert wrong < 0.05


def test_shaken_images_stay_digits_on_black(data):
    images = data[0][:100][0]
    moved = shaken(images)
    assert moved.shape == images.shape and moved.min() >= -1 and moved.max() <= 1
    assert not torch.equal(moved, images)
    assert (moved[:, :, 0, 0] == -1).all()
    assert moved.mean().item() == pytest.approx(images.mean().item(), abs=0.05)


# The Frechet distance

def test_frechet_distance_of_gaussians_is_the_closed_form():
    """|m - m'|^2 + sum (s_i - s'_i)^2 for normal features with diagonal covariances."""
    class Plain(Recogniser):
        def features(self, images):
            return images.flatten(1)[:, :128]

    judge, generator = Plain(), torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 2, 784)
    a, b = (torch.randn(20_000, 784, generator=generator) for _ in range(2))
    got = frechet_distance(judge, a.reshape(-1, 1, 28, 28), (b * scale + 0.3).reshape(-1, 1, 28, 28))
    expected = 128 * 0.3**2 + ((1 - scale[:128]) ** 2).sum().item()
    assert got == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_frechet_distance_of_real_images_is_the_floor_and_grows_with_harm(judge, data):
    real = data[0][:1000][0]
    labels = data[0].labels[:1000]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(real.shape, generator=generator)
    kernel = torch.ones(1, 1, 3, 3) / 9
    blurred = F.conv2d(F.pad(real, (1, 1, 1, 1), value=-1), kernel)
    harms = {
        "blur": [blurred, F.conv2d(F.pad(blurred, (1, 1, 1, 1), value=-1), kernel)],
        "noise": [(real + s * noise).clamp(-1, 1) for s in (0.3, 0.8)],
        "shift": [torch.roll(real, s, dims=3) for s in (3, 6)],
        "mode dropping": [real[labels != 3], real[labels > 4]],
    }
    floor = distance(judge, data, real)
    assert distance(judge, data, data[1][:][0]) < 1e-3 < floor
    for name, (less, more) in harms.items():
        some, much = distance(judge, data, less), distance(judge, data, more)
        assert floor * 1.2 < some < much, (name, floor, some, much)


# Precision, recall, density, coverage

def test_spread_of_the_same_distribution():
    generator = torch.Generator().manual_seed(0)
    real, drawn = (torch.randn(1000, 8, generator=generator) for _ in range(2))
    same = spread(real, drawn)
    assert same["density"] == pytest.approx(1, abs=0.1)
    # Coverage of the same distribution, Naeem et al. eq. 11: 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k))
    expected = 1 - math.prod((1000 - i) / (2000 - i) for i in range(1, 6))
    assert same["coverage"] == pytest.approx(expected, abs=0.03)
    assert min(same["precision"], same["recall"]) > 0.8


def test_spread_tells_poor_from_unvaried():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1000, 8, generator=generator)
    far = spread(real, torch.randn(1000, 8, generator=generator) + 10)
    assert max(far.values()) == 0
    narrow = spread(real, 0.05 * torch.randn(1000, 8, generator=generator))
    assert narrow["precision"] > 0.95 and narrow["recall"] < 0.05 and narrow["coverage"] < 0.3


# Copies

def test_a_repeated_training_set_is_found_to_be_copies(data):
    training, test = data[0][:][0], data[1][:500][0]
    assert copied_share(training[:500], training) > 0.99
    assert copied_share((training[:500] + 0.02).clamp(-1, 1), training) > 0.99
    assert copied_share(test, training) < 0.01


def test_nearest_two_against_a_loop(data):
    images, training = data[1][:5][0], data[0][:300][0]
    values, numbers = nearest_two(images, training)
    for n in range(5):
        distances = ((training - images[n]) ** 2).sum(dim=(1, 2, 3)).sqrt()
        nearest = distances.argsort()[:2]
        assert numbers[n].tolist() == nearest.tolist()
        torch.testing.assert_close(values[n], distances[nearest], rtol=1e-3, atol=1e-3)


# The script

@pytest.fixture
def quick(monkeypatch, judge, data):
    """evaluate.py with a few of the images and the judge of these tests."""
    monkeypatch.setattr(evaluate, "load_mnist", lambda train, data_dir, device, **settings: data[0] if train else data[1])
    monkeypatch.setattr(evaluate, "trained_recogniser", lambda file, train_set: judge)


def test_bound_is_the_mean_of_the_images(data, tiny_checkpoint):
    model, _ = load_model(tiny_checkpoint)
    some = Digits(data[1].images[:4], data[1].labels[:4])
    expected = bits_per_dimension(GaussianDiffusion(T), model, *some[:], torch.Generator().manual_seed(7)).mean().item()
    assert evaluate.bound(model, some, seed=7) == pytest.approx(expected, rel=1e-4)
    assert 1 < expected < 100


@pytest.mark.slow
def test_a_tiny_run(tmp_path, call, quick, tiny_checkpoint):
    files = {name: tmp_path / name for name in ("results.json", "neighbours.png", "drawn.pt")}
    status, out, err = call(evaluate.main, "--checkpoint", tiny_checkpoint, "--n", 150, "--sampler", "ddim", "--steps", 2,
                            "--device", "cpu", "--json", files["results.json"], "--neighbours", files["neighbours.png"],
                            "--save-images", files["drawn.pt"])
    assert status == 0, err
    results = json.loads(files["results.json"].read_text())
    source = results.pop("source")
    assert out.startswith(source)
    assert source == f"{tiny_checkpoint}: 150 images, ddim, 2 steps, eta 0, seed 0, guidance 1.5"
    assert set(results) >= {"accuracy", "accuracy of 7", "Frechet distance", "precision", "recall", "density", "coverage",
                            "copies"}
    for name, row in results.items():
        assert f"{name:18}{row['drawn']:10.4f}{row['real']:10.4f}" in out
    assert results["Frechet distance"]["drawn"] > 3 * results["Frechet distance"]["real"]  # noise is no digit
    drawn = torch.load(files["drawn.pt"], weights_only=True)
    assert drawn["images"].shape == (150, 1, 28, 28) and drawn["images"].abs().max() <= 1
    assert drawn["labels"].bincount().tolist() == [15] * 10

    status, again, err = call(evaluate.main, "--images", files["drawn.pt"], "--device", "cpu")
    assert status == 0, err
    assert again.splitlines()[1:] == out.splitlines()[1:] and again.startswith(f"{files['drawn.pt']}: 150 images\n")


@pytest.mark.slow
def test_real_images_are_measured_as_real(tmp_path, call, quick, data):
    images, labels = data[0][2000:3000]
    save_checkpoint(tmp_path / "real.pt", {"images": images, "labels": labels})
    status, _, err = call(evaluate.main, "--images", tmp_path / "real.pt", "--device", "cpu", "--json", tmp_path / "r.json")
    assert status == 0, err
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["accuracy"]["drawn"] > 0.9
    assert results["Frechet distance"]["drawn"] < 2 * results["Frechet distance"]["real"]
    assert results["coverage"]["drawn"] == pytest.approx(results["coverage"]["real"], abs=0.05)
    assert results["copies"]["drawn"] > 0.99  # of the training set, and found to be


@pytest.mark.parametrize("entries", [
    {"images": torch.zeros(5, 28, 28), "labels": torch.zeros(5, dtype=torch.long)},
    {"images": torch.zeros(5, 1, 28, 28), "labels": torch.zeros(4, dtype=torch.long)},
    {"images": torch.zeros(5, 1, 28, 28), "labels": torch.full((5,), 10)},
    {"images": torch.full((5, 1, 28, 28), torch.nan), "labels": torch.zeros(5, dtype=torch.long)},
    {"images": torch.zeros(5, 1, 28, 28)},
    {"images": torch.zeros(100, 1, 28, 28), "labels": torch.arange(100) % 10, "dataset": "letters"},
], ids=["shape", "count", "label", "nan", "none", "dataset"])
def test_files_that_hold_no_images(tmp_path, monkeypatch, refused, entries):
    monkeypatch.setattr(evaluate, "trained_recogniser", lambda *args: Recogniser().eval())
    save_checkpoint(tmp_path / "bad.pt", entries)
    before = content(tmp_path)
    words = "no data set 'letters'" if "dataset" in entries else "bad.pt"
    refused(evaluate.main, 1, words, "--images", tmp_path / "bad.pt", "--device", "cpu", "--json", tmp_path / "r.json")
    assert content(tmp_path) == before


def test_a_bound_and_images_of_another_data_set(tmp_path, refused, tiny_checkpoint):
    images = tmp_path / "drawn.pt"
    save_checkpoint(images, {"images": torch.zeros(100, 1, 28, 28), "labels": torch.arange(100) % 10, "dataset": "kmnist"})
    refused(evaluate.main, 1, "holds images of kmnist", "--images", images, "--bpd", 10, "--checkpoint", tiny_checkpoint,
            "--device", "cpu")


@pytest.mark.parametrize(("options", "words"), [
    (("--n", 99), "argument --n: must lie in [100, 20000], not 99"), (("--n", 0), "must be at least 1"),
    (("--json", "nowhere/r.json"), "there is no folder nowhere"), (("--neighbours", "a.txt"), "must end in .png"),
    (("--steps", 1001), "argument --steps"), (("--n=--",), "lacks its value"),
])
def test_bad_arguments(tmp_path, monkeypatch, refused, options, words):
    monkeypatch.chdir(tmp_path)
    refused(evaluate.main, 2, words, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_kept_recogniser_is_good_enough():
    """The one that evaluate.py trains at its first use on all images, if it has been used."""
    file = ROOT / "mnist" / "recogniser.mnist.pth"
    if not file.exists():
        pytest.skip("evaluate.py has not been run here")
    train_set, test_set = load_mnist(True, ROOT / "mnist"), load_mnist(False, ROOT / "mnist")
    assert evaluate.accuracy(trained_recogniser(file, train_set), *test_set[:])[0] >= 0.995
