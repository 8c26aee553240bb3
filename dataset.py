"""MNIST as a tensor of images and one of labels, on the device: 47 MB need no loader processes."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity

KINDS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}


class DataError(Exception):
    """The data set is missing or damaged; the message names the file and the remedy."""


class Digits:
    """images: (N, 1, H, W) uint8; labels: (N,) int64 in [0, 10)."""

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


def load_mnist(train: bool, data_dir: str | Path = "mnist", device: str | torch.device = "cpu", limit: int = 0,
               dataset: str = "mnist", image_size: int = 28) -> Digits:
    """The 60,000 training or 10,000 test images, or the first `limit` of them, padded with black to image_size.

    dataset: "mnist", whose archives lie in data_dir/MNIST/raw/ and are unpacked there at the first use, without a network;
    "fashion-mnist" or "kmnist", which torchvision downloads. DataError if a file is missing or damaged.
    """
    if dataset not in KINDS:
        raise DataError(f"there is no data set {dataset!r}; it must be one of {', '.join(KINDS)}")
    kind = KINDS[dataset]
    raw = Path(data_dir) / kind.__name__ / "raw"
    for name, md5 in kind.resources:
        if kind is MNIST or (raw / name).exists():
            _check(raw / name, md5)
    try:
        images = kind(data_dir, train=train, download=True)  # unpacks the archives that are there, downloads the others
    except (RuntimeError, URLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot download {kind.__name__}: {reason}; its archives can be put into {raw} by hand") from error
    except OSError as error:
        raise DataError(f"cannot unpack {kind.__name__} in {raw}: {error.strerror or error}; make that folder writable"
                        ) from error
    count = limit or len(images.data)
    pixels = F.pad(images.data[:count, None], [(image_size - 28) // 2] * 4)
    return Digits(pixels.to(device), images.targets[:count].to(device))


def _check(archive: Path, md5: str) -> None:
    """DataError if the archive is not the canonical one, or what was unpacked from it earlier is not what it holds."""
    remedy = "`git checkout -- mnist` restores the archives of this project; for another folder, copy them from there"
    try:
        if not archive.is_file():
            raise DataError(f"{archive} is missing; {remedy}")
        if not check_integrity(str(archive), md5):
            raise DataError(f"{archive} is damaged (its MD5 is not {md5}); {remedy}")
        unpacked = archive.with_suffix("")  # torchvision does not look at its content
        if unpacked.exists():
            content = unpacked.read_bytes()
            if struct.pack("<II", zlib.crc32(content), len(content)) != archive.read_bytes()[-8:]:  # as gzip files end
                raise DataError(f"{unpacked} is damaged; delete it and run again: it is unpacked anew from {archive.name}")
    except OSError as error:
        raise DataError(f"{archive} or what was unpacked from it cannot be read: {error.strerror or error}") from error
