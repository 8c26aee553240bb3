"""The canonical images, without a network; their range; their order; and what is said of damaged files."""

import shutil
import socket
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from conftest import ROOT
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

from dataset import DataError, Digits, load_mnist

RAW = ROOT / "mnist" / "MNIST" / "raw"


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A data folder with the four archives alone, on a machine without a network."""

    def no_network(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("*.gz"):
        shutil.copy(archive, raw)
    return raw


def test_all_images_and_labels_from_the_archives_alone(archives):
    train, test = load_mnist(True, archives.parent.parent), load_mnist(False, archives.parent.parent)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    # The counts that LeCun et al. give.
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_images_come_scaled_to_minus_1_and_1():
    digits = Digits(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([4, 5, 6]))
    images, labels = digits[torch.tensor([2, 0, 1])]
    assert images.dtype == torch.float32
    assert images.flatten().tolist() == pytest.approx([1, -1, -0.6]) and labels.tolist() == [6, 4, 5]


def test_an_epoch_is_every_image_once_in_a_new_order():
    digits = Digits(torch.zeros(103, 1, 1, 1, dtype=torch.uint8), torch.arange(103))
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(digits.batches(10, generator))) for _ in range(2))
    for order in (first, second):
        assert len(order) == 100 and len(set(order.tolist())) == 100  # the rest of 3 is left out
    assert not torch.equal(first, second)
    again = torch.cat(list(digits.batches(10, torch.Generator().manual_seed(0))))
    assert torch.equal(again, first)
    assert all(len(batch) == 10 for batch in digits.batches(10, generator))


def test_limit_takes_the_first_images():
    few, all_of_them = load_mnist(True, ROOT / "mnist", limit=7), load_mnist(True, ROOT / "mnist")
    assert len(few) == 7 and torch.equal(few.images, all_of_them.images[:7])


def test_a_missing_archive_is_named_with_the_remedy(archives):
    (archives / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz is missing; `git checkout -- mnist` restores") as error:
        load_mnist(True, archives.parent.parent)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/MNIST/raw/train-images-idx3-ubyte\.gz is missing"):
        load_mnist(True, tmp_path / "nowhere")


def test_a_damaged_archive_is_named_and_left_alone(archives):
    archive = archives / "train-images-idx3-ubyte.gz"
    damaged = bytearray(archive.read_bytes())
    damaged[1_000_000] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged .* `git checkout -- mnist` restores"):
        load_mnist(True, archives.parent.parent)
    assert archive.read_bytes() == damaged


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "not idx"])
def test_a_damaged_unpacked_file_is_named_with_the_remedy(archives, harm):
    load_mnist(True, archives.parent.parent)
    unpacked = archives / "train-images-idx3-ubyte"
    good = unpacked.read_bytes()
    flipped = bytearray(good)
    flipped[-1000] ^= 1
    unpacked.write_bytes({"truncated": good[:-100], "flipped": flipped, "empty": b"", "not idx": b"x" * len(good)}[harm])
    with pytest.raises(DataError, match=r"raw/train-images-idx3-ubyte is damaged; delete it and run again"):
        load_mnist(True, archives.parent.parent)
    unpacked.unlink()
    assert len(load_mnist(True, archives.parent.parent)) == 60_000


def test_larger_images_have_a_black_border():
    small, large = (load_mnist(False, ROOT / "mnist", limit=3, image_size=size).images for size in (28, 32))
    assert large.shape == (3, 1, 32, 32) and torch.equal(large[..., 2:-2, 2:-2], small)
    assert large.sum() == small.sum()


@pytest.mark.parametrize(("dataset", "kind"), [("fashion-mnist", FashionMNIST), ("kmnist", KMNIST)])
def test_other_datasets_are_read_by_the_same_code(dataset, kind, archives, monkeypatch):
    """MNIST's archives in the place of the other's: torchvision reads the same format."""
    shutil.move(archives.parent, archives.parent.parent / kind.__name__)
    monkeypatch.setattr(kind, "resources", MNIST.resources)
    found = load_mnist(True, archives.parent.parent, dataset=dataset)
    assert torch.equal(found.images, load_mnist(True, ROOT / "mnist").images)


def test_a_dataset_that_cannot_be_downloaded(tmp_path, monkeypatch):
    no_network = mock.Mock(side_effect=URLError("no network"))
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=r"cannot download KMNIST: .*no network.*KMNIST/raw by hand"):
        load_mnist(True, tmp_path, dataset="kmnist")
