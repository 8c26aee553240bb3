"""MNIST as a tensor of images and one of labels, on the device: 47 MB need no loader processes."""

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import MNIST


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

    def batch_indices(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """An epoch's indices in random order, (batch_size,) at a time; what is left is dropped."""
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        for start in range(0, len(self) - batch_size + 1, batch_size):
            yield order[start:start + batch_size]


def load_mnist(train: bool, data_dir: str | Path = "mnist", device: str | torch.device = "cpu",
               limit: int = 0, image_size: int = 28) -> Digits:
    """The 60,000 training or 10,000 test images, or `limit` of them.

    A black border fills them up to image_size. They are read from the canonical archives in
    data_dir/MNIST/raw/; nothing is written. DataError if one is missing or damaged.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    archives = MNIST.resources[:2] if train else MNIST.resources[2:]
    images, labels = (_read(raw / name, md5) for name, md5 in archives)
    count = limit or len(labels)
    pixels = F.pad(images[:count, None], [(image_size - 28) // 2] * 4)
    return Digits(pixels.to(device), labels[:count].long().to(device))


def _read(archive: Path, md5: str) -> Tensor:
    """The values of a gzipped IDX file, uint8, in its shape. DataError unless it has this MD5."""
    remedy = f"`git checkout -- mnist` restores ours, {MNIST.mirrors[0]}{archive.name} has it too"
    try:
        packed = archive.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{archive} cannot be read ({reason}); {remedy}") from error
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{archive} is damaged, its MD5 is not {md5}; {remedy}")
    content = bytearray(gzip.decompress(packed))  # writable, as frombuffer wants
    # IDX: two zeros, the type, the number of dimensions; each of them in 4 bytes; the values
    dimensions = content[3]
    shape = [int.from_bytes(content[at:at + 4], "big") for at in range(4, 4 + 4 * dimensions, 4)]
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)
