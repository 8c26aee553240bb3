"""The canonical images, their range and order; an unfit file is named with its remedy."""

import shutil

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from dataset import DataError, Digits, load_mnist

RAW = ROOT / "mnist" / "MNIST" / "raw"
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.fixture
def archives(tmp_path):
    """A separate data folder with only the four archives."""
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("*.gz"):
        shutil.copy(archive, raw)
    return raw


def test_all_images_and_labels_come_from_the_archives_alone(archives):
    """With the counts that LeCun et al. give, and the mean that is given everywhere: 0.1307."""
    train, test = (load_mnist(part, archives.parent.parent) for part in (True, False))
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.images.float().mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert len(list(archives.iterdir())) == 4  # nothing was written


def test_images_come_scaled_to_minus_1_and_1():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    images, labels = Digits(pixels, torch.tensor([4, 5, 6]))[torch.tensor([2, 0, 1])]
    assert images.flatten().tolist() == pytest.approx([1, -1, -0.6])
    assert labels.tolist() == [6, 4, 5]


def test_an_epoch_is_every_image_once_in_a_new_order():
    digits = Digits(torch.zeros(103, 1, 1, 1, dtype=torch.uint8), torch.arange(103))
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.stack(list(digits.batch_indices(10, generator))) for _ in range(2))
    for order in (first, second):
        assert order.shape == (10, 10) and len(order.unique()) == 100  # 3 are left out
    again = torch.stack(list(digits.batch_indices(10, torch.Generator().manual_seed(0))))
    assert torch.equal(again, first) and not torch.equal(first, second)


def test_limit_takes_the_first_images_and_larger_ones_have_a_black_border():
    first = load_mnist(False, ROOT / "mnist").images[:7]
    few = load_mnist(False, ROOT / "mnist", limit=7, image_size=32).images
    assert torch.equal(few, F.pad(first, (2, 2, 2, 2)))


def test_a_missing_archive_is_named_with_both_remedies(archives):
    (archives / IMAGES).unlink()
    with pytest.raises(DataError, match=f"{IMAGES} cannot be read.*; `git .*http.*{IMAGES}"):
        load_mnist(True, archives.parent.parent)


def test_an_archive_with_one_other_bit_is_refused(archives):
    damaged = bytearray((archives / IMAGES).read_bytes())
    damaged[1_000_000] ^= 1
    (archives / IMAGES).write_bytes(damaged)
    with pytest.raises(DataError, match=f"{IMAGES} is damaged.*; `git checkout"):
        load_mnist(True, archives.parent.parent)
