"""Checkpoints that hold tensors and plain values only, and are checked before they are used.

`model.pth` holds what sampling needs; `run.py` writes the same kind of file for --resume.
"""

import hashlib
import io
import math
import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ModelConfig
from diffusion import GaussianDiffusion
from dit import DiT
from runtime.files import PROJECT, write_atomically

FORMAT = 1  # incremented when the entries of a file change, so that older code says what is wrong
WEIGHTS = {"model_config": dict, "ema": dict, "step": int, "recipe": dict}  # what model.pth needs
FIRST_SCHEDULE = [1000, 0.0001, 0.02, 4.03583e-05]  # of files that do not name theirs


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence."""


def printable(value: object) -> str:
    """Text from a file for a terminal: short, and without characters that it would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)[:200])


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write nested dicts and lists of tensors and plain values. Atomic; OSError if it fails."""
    content = {"format": FORMAT, **content}
    buffer = io.BytesIO()  # written by Python: torch's errors do not say why a disk refuses
    torch.save({**content, "sha256": checksum(content)}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path, entries: dict[str, type]) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU, and verify it. Nothing in the file is run.

    CheckpointError if it is missing, damaged, of another kind, or lacks an entry (name: type).
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            kind = "directory" if path.is_dir() else "pipe or a device"
            raise CheckpointError(f"{path} is a {kind}, not a file")
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise CheckpointError(f"{path} is not a checkpoint of this project: it names no format")
        computed = checksum({name: content[name] for name in content if name != "sha256"})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} needs more memory than there is") from error
    except Exception as error:  # a damaged file can fail anywhere, with any exception
        reason = f"{type(error).__name__}: {printable(error)}"
        if isinstance(error, pickle.UnpicklingError):  # torch's sentence advises to run it
            reason = "it holds something other than tensors and plain values; none of it was run"
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from error
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} is of another version of this project "
                              f"(format {content['format']}, not {FORMAT})")
    if computed != content.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    for name, kind in entries.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"{path} is another kind of checkpoint: it holds no {name!r}")
    return content


def check_archive(path: Path) -> None:
    """ValueError if the file would grow when it is read: torch.save does not compress."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries overlap")


def checksum(content: object) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values, names included."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)};".encode())
            values = value.detach().cpu().contiguous().reshape(-1)
            sha.update(values.view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            sha.update(f"{type(value).__name__} {len(value)};".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{value!r};".encode())

    add(content)
    return sha.hexdigest()


def load_model(path: str | Path, device: str | torch.device = "cpu",
               diffusion: GaussianDiffusion | None = None) -> tuple[DiT, dict]:
    """The network of a checkpoint with its EMA weights, in eval mode; and its other entries.

    diffusion: what the network is for; the default has the schedule of config.py. float32,
    whatever torch's default is. CheckpointError if the file is missing, damaged, not such a
    checkpoint, or trained with another schedule.
    """
    if not os.path.exists(path):
        ours = Path(path).absolute() == PROJECT / "model.pth" and (PROJECT / ".git").exists()
        restored = f", and `git checkout -- model.pth` in {PROJECT} restores the included one"
        raise CheckpointError(f"there is no checkpoint {path}; `python train.py --checkpoint "
                              f"{path}` makes one{restored if ours else ''}")
    info = load_checkpoint(path, WEIGHTS)
    check_schedule(path, info, (diffusion or GaussianDiffusion()).schedule)
    weights = info.pop("ema")
    try:
        with torch.device("meta"):  # which takes no memory
            model = DiT(ModelConfig(**info["model_config"]), initialize=False).float()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes a network that this code does not build: "
                              f"{printable(error)}") from error
    check_weights(path, weights, model)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False), info


def check_schedule(path: str | Path, content: dict, schedule: list[float]) -> None:
    """CheckpointError if the file was made with another `GaussianDiffusion.schedule` than this."""
    def described(values: object) -> str:
        try:
            return "T = {}, beta from {:g} to {:g}, last alpha_bar {:g}".format(*values)
        except (IndexError, TypeError, ValueError):
            return printable(values)

    before = content.get("schedule", FIRST_SCHEDULE)
    if before != schedule:
        raise CheckpointError(f"{path} was trained with another schedule ({described(before)}) "
                              f"than this code has ({described(schedule)})")


def check_weights(path: str | Path, weights: dict, model: nn.Module) -> None:
    """CheckpointError unless they fit the network: names, shapes and types; all values finite."""
    try:
        check_like(model.state_dict(), weights)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit its network: {printable(error)}") from error


def check_like(expected: object, value: object, name: str = "") -> None:
    """ValueError unless `value` has the names, types and shapes of `expected`, and finite numbers.

    name: what it is, for the message.
    """
    if isinstance(expected, Tensor):
        def layout(tensor: object) -> object:  # with strides: the optimizers' kernels trust them
            return isinstance(tensor, Tensor) and (tensor.shape, tensor.dtype, tensor.stride())

        if layout(value) != layout(expected):
            raise ValueError(f"{name} is not {tuple(expected.shape)} {expected.dtype}")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite numbers")
    elif isinstance(expected, list) and isinstance(value, list):
        check_like(dict(enumerate(expected)), dict(enumerate(value)), name)
    elif isinstance(expected, dict) and isinstance(value, dict):
        within = f"{name}." if name else ""
        if unlike := [f"{within}{key}" for key in expected.keys() ^ value.keys()]:
            raise ValueError(f"{', '.join(sorted(unlike)[:3])} missing, or not expected")
        for key, item in expected.items():
            check_like(item, value[key], f"{within}{key}")
    elif type(value) is not type(expected) or value != value or value in (math.inf, -math.inf):
        raise ValueError(f"{name} is {value!r}")
