"""Checkpoints that hold tensors and plain values only, and are checked before they are used.

`model.pth` holds what sampling needs; `run.py` writes the same kind of file for a run to continue from.
"""

import hashlib
import io
import math
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from config import ModelConfig
from dit import DiT
from runtime.files import PROJECT, write_atomically

FORMAT = 1  # incremented when the entries of a file change, so that older code can say what is wrong
WEIGHTS = {"model_config": dict, "ema": dict, "step": int, "recipe": dict}  # the entries of model.pth
MAX_BYTES = 2**34  # of a file that is read
KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
         *(f"torch {kind}Storage" for kind in KINDS)}  # what the pickle in a file may refer to


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence."""


def printable(value: object) -> str:
    """Text from a file for a terminal: short, and without characters that the terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[:200])


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write a dict of tensors and plain values, arbitrarily nested, with a checksum. Atomic; OSError if it fails."""
    content = {"format": FORMAT, **content}
    buffer = io.BytesIO()  # written by Python and not by torch, whose errors do not say why a disk refuses
    torch.save({**content, "sha256": checksum(content)}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path, entries: dict[str, type]) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU. Nothing in the file is run, and its checksum is verified.

    CheckpointError if the file is missing, damaged, of another kind, or lacks one of `entries` (name: type). A hostile
    file costs time and memory in proportion to its size, and no more.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for someone to write into it
            raise CheckpointError(f"{path} is a {'directory' if path.is_dir() else 'pipe or a device'}, not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} is too large for a checkpoint ({size / 2**30:.0f} GiB)")
        with path.open("rb") as file:
            if kind := _other_kind(file):
                raise CheckpointError(f"{path} is {kind}; a checkpoint of this project is needed")
            check_archive(file, size)
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise CheckpointError(f"{path} is not a checkpoint of this project: it does not say its format")
        computed = checksum({key: value for key, value in content.items() if key != "sha256"}, most=2**20 + 16 * size)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} needs more memory than there is") from error
    except Exception as error:  # a damaged or crafted file can fail anywhere, with any exception
        reason = f"{type(error).__name__}: {printable(error)}"
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} is of another version of this project (format {content['format']}, not {FORMAT})")
    if computed != content.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    for name, kind in entries.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"{path} is another kind of checkpoint: it holds no {name!r}")
    return content


def _other_kind(file: BinaryIO) -> str:
    """What the file is, if it is of another known format; "" for anything else."""
    start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, whose file `git lfs pull` fetches"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:  # the length of its header, then that, as JSON
        return "a safetensors file"
    if start.startswith(b"\x80"):
        return "a bare pickle, as torch wrote before version 1.6"
    return "a NumPy .npz file" if start.startswith(b"PK") and b".npy" in start else ""


def check_archive(file: BinaryIO, size: int) -> None:
    """ValueError or UnpicklingError unless a file of `size` bytes is as torch.save writes tensors and plain values.

    torch.load(weights_only=True) runs no foreign code either. But it decompresses entries, and it calls functions such as
    bytearray, which can allocate any amount of memory.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed")
        if sum(entry.file_size for entry in entries) > size or len(set(archive.namelist())) < len(entries):
            raise ValueError("its entries overlap")
        [pickled] = (archive.read(entry) for entry in entries if entry.filename.endswith("data.pkl"))
    tuples = 20_000 + 4 * len(entries)  # a tensor needs four; 200,000 nested ones, as a dict's key, crash Python
    for instruction, value, _ in pickletools.genops(pickled):
        tuples -= instruction.name.startswith("TUPLE")
        if tuples < 0:
            raise ValueError("it holds too many tuples")
        if instruction.name == "GLOBAL" and value not in NAMES:
            raise pickle.UnpicklingError("it holds something other than tensors and plain values; none of it was run")


def checksum(content: object, most: float = math.inf) -> str:
    """SHA-256 of tensors and plain values in nested dicts, lists and tuples: names, types, shapes and values.

    ValueError after `most` bytes: [a, a] with a = [b, b], and so on, has 2^n values in 8 n bytes of a file.
    """
    sha, count = hashlib.sha256(), 0

    def update(data) -> None:
        nonlocal count
        count += len(data) + 8
        if count > most:
            raise ValueError("it repeats its values too often")
        sha.update(data)

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # with a stride of 0
                raise ValueError("a tensor has more values than its storage holds")
            update(f"{value.dtype} {tuple(value.shape)};".encode())
            update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            update(f"{type(value).__name__} {len(value)};".encode())
            for item in value:
                add(item)
        else:
            update(f"{value!r};".encode())

    add(content)
    return sha.hexdigest()


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, dict]:
    """The network that a checkpoint describes, with its EMA weights, in eval mode; and the checkpoint's other entries.

    float32, whatever torch's default is. CheckpointError if the file is missing, damaged, or not such a checkpoint.
    """
    own = PROJECT / "model.pth"
    if not os.path.exists(path):
        restored = (f", and `git checkout -- model.pth` in {PROJECT} restores the included one"
                    if Path(path).absolute() == own and (PROJECT / ".git").exists() else "")
        raise CheckpointError(f"there is no checkpoint {path}; `python train.py --checkpoint {path}` makes one{restored}")
    info = load_checkpoint(path, WEIGHTS)
    weights = info.pop("ema")
    try:
        config = ModelConfig(**info["model_config"])
        # A few bytes can ask for a huge network: building many blocks takes time, and large ones memory, except on "meta".
        if len(weights) < 8 * config.depth:
            raise ValueError(f"{len(weights)} tensors are too few for {config.depth} blocks")
        with torch.device("meta"):
            model = DiT(config, initialize=False).float()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes a network that this code does not build: {printable(error)}") from error
    check_weights(path, weights, model)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False), info


def check_weights(path: str | Path, weights: dict, model: nn.Module) -> None:
    """CheckpointError unless names, shapes and types are the network's, and all values finite."""
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        names = ", ".join(sorted(map(str, weights.keys() ^ expected.keys()))[:3])
        raise CheckpointError(f"{path} does not fit its network: {printable(names)} missing, or not expected")
    for name, want in expected.items():
        value = weights[name]
        if not isinstance(value, Tensor) or value.shape != want.shape or value.dtype != want.dtype:
            raise CheckpointError(f"{path} does not fit its network: {name} is not {tuple(want.shape)} {want.dtype}")
        if not value.isfinite().all():
            raise CheckpointError(f"{path} holds values in {name} that are not finite numbers")
