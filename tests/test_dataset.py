"""The canonical images, without a network or a writable folder; their range; their order; the errors for unfit files."""

import os
import shutil

import pytest
import torch
from conftest import ROOT

from dataset import DataError, Digits, load_mnist

RAW = ROOT / "mnist" / "MNIST" / "raw"
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.fixture
def archives(tmp_path):
    """A separate data folder with only the four archives."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("*.gz"):
        shutil.copy(archive, raw)
    return raw


def refuse(raw, words):
    with pytest.raises(DataError, match=words) as error:
        load_mnist(True, raw.parent.parent)
    assert "\n" not in str(error.value)


def test_all_images_and_labels_from_the_archives_alone(archives):
    train, test = load_mnist(True, archives.parent.parent), load_mnist(False, archives.parent.parent)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    # The counts that LeCun et al. give.
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.images.float().mean() == pytest.approx(33.318, abs=0.001)  # the mean that is given everywhere: 0.1307
    assert len(list(archives.iterdir())) == 4  # so any number of processes may read at once, and the folder be read-only


def test_images_come_scaled_to_minus_1_and_1():
    digits = Digits(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1), torch.tensor([4, 5, 6]))
    images, labels = digits[torch.tensor([2, 0, 1])]
    assert images.dtype == torch.float32
    assert images.flatten().tolist() == pytest.approx([1, -1, -0.6]) and labels.tolist() == [6, 4, 5]


def test_an_epoch_is_every_image_once_in_a_new_order():
    digits = Digits(torch.zeros(103, 1, 1, 1, dtype=torch.uint8), torch.arange(103))
    generator = torch.Generator().manual_seed(0)
    first, second = (list(digits.batch_indices(10, generator)) for _ in range(2))
    for order in (first, second):
        assert [len(batch) for batch in order] == 10 * [10] and len(set(torch.cat(order).tolist())) == 100  # 3 are left out
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(list(digits.batch_indices(10, torch.Generator().manual_seed(0)))), torch.cat(first))


def test_limit_takes_the_first_images_and_larger_ones_have_a_black_border():
    first = load_mnist(False, ROOT / "mnist").images[:7]
    few = load_mnist(False, ROOT / "mnist", limit=7, image_size=32).images
    assert few.shape == (7, 1, 32, 32) and torch.equal(few[..., 2:-2, 2:-2], first) and few.sum() == first.sum()


def test_missing_archives(archives, tmp_path):
    """Unpacked files are not read; only someone who has nothing else is told so."""
    (archives / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0" * 1000)
    assert len(load_mnist(True, tmp_path)) == 60_000
    (archives / IMAGES).unlink()
    refuse(archives, rf"{IMAGES} is missing \(train-images-idx3-ubyte is there.*\); download it from http.*/{IMAGES}")
    refuse(tmp_path / "nowhere" / "MNIST" / "raw", f"nowhere/MNIST/raw/{IMAGES} is missing; download it")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file" / "MNIST" / "raw", r"cannot be read \(Not a directory\); download it")


def test_the_projects_own_folder_is_restored_with_git(archives, monkeypatch):
    """From wherever it is read; of other folders git knows nothing."""
    own = archives.parent.parent.rename(archives.parent.parent.parent / "mnist")
    monkeypatch.setattr("dataset.OWN", own)
    (own / "MNIST" / "raw" / IMAGES).unlink()
    refuse(own / "MNIST" / "raw", "is missing; download")
    (own.parent / ".git").mkdir()
    refuse(own / "MNIST" / "raw", f"is missing; `git checkout -- mnist` in {own.parent} restores it")


def flip_a_bit(archive):
    damaged = bytearray((RAW / IMAGES).read_bytes())
    damaged[1_000_000] ^= 1
    archive.write_bytes(damaged)


def make_sparse(archive):
    archive.touch()
    os.truncate(archive, 2**40)  # more than memory holds


@pytest.mark.parametrize("make", [
    flip_a_bit, make_sparse, os.mkdir, os.mkfifo, lambda path: path.write_bytes(b""), lambda path: os.symlink(path, path),
    lambda path: shutil.copy(RAW / "t10k-images-idx3-ubyte.gz", path),
], ids=["flipped", "huge", "folder", "pipe", "empty", "loop", "another archive"])
def test_another_file_is_named_and_left_alone(archives, make):
    (archives / IMAGES).unlink()
    make(archives / IMAGES)
    before = (archives / IMAGES).lstat()
    refuse(archives, rf"{IMAGES} (is damaged or another file|is not a file|cannot be read).*; download it")
    assert (archives / IMAGES).lstat().st_mtime_ns == before.st_mtime_ns
