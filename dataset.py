"""MNIST as two tensors on the device: 47 MB need no loader processes."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity


class DataError(Exception):
    """The data set is missing or damaged; the message names the file and the remedy."""


class Digits:
    """images: (N, 1, 28, 28) uint8; labels: (N,) int64 in [0, 10)."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        """The chosen images as float32 in [-1, 1], and their labels."""
        return self.images[index].float() / 127.5 - 1, self.labels[index]

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The indices of one epoch in a new random order, (batch_size,) at a time; a smaller rest is left out."""
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        for start in range(0, len(self) - batch_size + 1, batch_size):
            yield order[start:start + batch_size]


def load_mnist(train: bool, data_dir: str = "mnist", device: str | torch.device = "cpu", limit: int = 0) -> Digits:
    """The 60,000 training or 10,000 test images, or the first `limit` of them. DataError if files are not as they were.

    torchvision checks the MD5 of the four archives in data_dir/MNIST/raw/ and unpacks them, without a network.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    for name, md5 in MNIST.resources:
        _check_archive(raw / name, md5, data_dir)
    try:
        mnist = MNIST(data_dir, train=train, download=True)  # all archives are there: unpacks, downloads nothing
    except OSError as error:
        raise DataError(f"cannot unpack MNIST in {raw}: {error.strerror or error}; make that folder writable") from error
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError):
        mnist = None  # an unpacked file that torchvision cannot parse: the check below names it
    for name, _ in MNIST.resources:
        _check_unpacked(raw / name)
    if mnist is None:
        raise DataError(f"cannot read MNIST in {raw}: delete the unpacked files, those without .gz, and run again")
    count = limit or len(mnist.data)
    return Digits(mnist.data[:count, None].to(device), mnist.targets[:count].to(device))


def _check_archive(archive: Path, md5: str, data_dir: str) -> None:
    remedy = f"put the original there with `git checkout -- {archive}`" if data_dir == "mnist" else \
        f"copy it from the mnist folder of this project: cp mnist/MNIST/raw/{archive.name} {archive}"
    if not archive.is_file():
        raise DataError(f"{archive} is missing; {remedy}")
    try:
        if not check_integrity(str(archive), md5):
            raise DataError(f"{archive} is damaged (its MD5 is not {md5}); {remedy}")
    except OSError as error:
        raise DataError(f"{archive} cannot be read: {error.strerror}; {remedy}") from error


def _check_unpacked(archive: Path) -> None:
    """An archive ends with the checksum of what it holds; torchvision does not look at a file unpacked earlier."""
    unpacked = archive.with_suffix("")
    crc, size = struct.unpack("<II", archive.read_bytes()[-8:])
    content = unpacked.read_bytes()
    if len(content) != size or zlib.crc32(content) != crc:
        raise DataError(f"{unpacked} is damaged; delete it and run again: it is unpacked anew from {archive.name}")
