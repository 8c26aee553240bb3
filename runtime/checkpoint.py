"""Files that are whole or absent: atomic writes, and checkpoints that hold tensors and plain values only.

`model.pth` holds what sampling needs; `run_files.py` writes the same kind of file for a run to go on from.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from config import ModelConfig
from dit import DiT

FORMAT = 1  # raised when the entries of a file change, so that older code can say what is wrong
WEIGHTS = {"model_config": dict, "ema": dict, "step": int, "recipe": dict}  # the entries of model.pth


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence with the remedy."""


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary file beside `path`), then move the result into place: `path` is old or new, never half.

    OSError with a sentence if that fails.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); it is as it was before") from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        try:
            _sync(path.parent)  # the new name itself, which lives in the folder
        except OSError as error:
            raise OSError(f"{path} is written, but a power cut could undo that ({error.strerror or error})") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """OSError with a sentence if `path` could not be written: better now than after an hour's work."""
    path = Path(path)
    try:
        if path.is_dir():
            raise OSError(f"{path} is a folder, where a file is meant")
        if not path.parent.is_dir():
            raise OSError(f"{path} cannot be written: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is not a file that could be replaced")
        if not os.access(path.parent, os.W_OK):
            raise OSError(f"{path} cannot be written: no permission in folder {path.parent}")
        os.lstat(_temporary(path))  # fails otherwise than FileNotFoundError if the name is too long
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}" if error.strerror else str(error)) from error


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write a dict of tensors and plain values, nested at will, with a checksum. Atomic; OSError if it fails."""
    content = {"format": FORMAT, **content}
    buffer = io.BytesIO()  # written by Python and not by torch, for Python says why a disk refuses
    torch.save({**content, "sha256": checksum(content)}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path, entries: dict[str, type]) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU. Nothing in the file is run, and its checksum is compared.

    CheckpointError if the file is missing, damaged, of another format, or lacks one of `entries` (name: type).
    """
    try:
        file = io.BytesIO(Path(path).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        is_dict = isinstance(content, dict)
        computed = is_dict and checksum({key: value for key, value in content.items() if key != "sha256"})
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: it holds something other than tensors and plain "
                              "values, and nothing of it was run") from error
    except Exception as error:  # a damaged or crafted file can fail anywhere in torch's reader, with any exception
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({type(error).__name__} while reading it)") from error
    if not is_dict or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{path} is not a checkpoint of this project: it does not say its format")
    if content["format"] != FORMAT:
        age = "a newer" if content["format"] > FORMAT else "an older"
        raise CheckpointError(f"{path} was written by {age} version of this project (format {content['format']}; "
                              f"this one reads {FORMAT}): load it with that version")
    if computed != content.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    for name, kind in entries.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"{path} is another kind of checkpoint: it holds no {name!r}")
    return content


def checksum(content: object) -> str:
    """SHA-256 of tensors and plain values in nested dicts, lists and tuples: names, types, shapes and values."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)};".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
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


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, dict]:
    """The network that a checkpoint describes, with its EMA weights, in eval mode; and the checkpoint's other entries.

    CheckpointError if the file is missing, damaged, or not a checkpoint of this project.
    """
    if not Path(path).exists():
        raise CheckpointError(f"there is no checkpoint {path}; `python train.py` makes a model.pth, and "
                              "`git checkout -- model.pth` restores the one that ships")
    info = load_checkpoint(path, WEIGHTS)
    weights = info.pop("ema")
    try:
        model = outline(ModelConfig(**info["model_config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes a network that this code does not build: {error}") from error
    check_weights(path, weights, model)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False), info


class SkipInit(TorchFunctionMode):
    """Within it, layers get no initial values: on the meta device these would import torch's compiler, 1.3 seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def outline(config: ModelConfig) -> DiT:
    """The network without its values: names and shapes can be compared before any memory is taken."""
    with torch.device("meta"), SkipInit():
        return DiT(config, initialize=False)


def check_weights(path: str | Path, weights: dict, model: DiT) -> None:
    """CheckpointError unless names, shapes and types are the network's, and all values finite."""
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        names = ", ".join(sorted(map(str, weights.keys() ^ expected.keys()))[:3])
        raise CheckpointError(f"{path} does not fit its network: {names} missing, or not expected")
    for name, want in expected.items():
        value = weights[name]
        if not isinstance(value, torch.Tensor) or value.shape != want.shape or value.dtype != want.dtype:
            raise CheckpointError(f"{path} does not fit its network: {name} is not {tuple(want.shape)} {want.dtype}")
        if not value.isfinite().all():
            raise CheckpointError(f"{path} holds values in {name} that are not finite numbers")
