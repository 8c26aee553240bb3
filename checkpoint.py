"""Files that are whole or absent: atomic writes, and checkpoints of tensors and plain values only."""

import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from config import ModelConfig, TrainConfig
from dit import DiT

FORMAT = 1  # of a checkpoint; raised when older code could not read a newer file


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence with the remedy."""


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary file beside `path`), then move the result into place: `path` is old or new, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """OSError with a sentence if `path` could not be written: better now than after an hour's work."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"{path} is a folder, where a file is meant")
    if not path.parent.is_dir():
        raise OSError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"{path} cannot be written: no permission in folder {path.parent}")


def save_checkpoint(path: str | Path, ema: DiT, step: int, recipe: TrainConfig) -> None:
    """The averaged weights with all that is needed to rebuild their network and to repeat their training."""
    checkpoint = {
        "format": FORMAT,
        "model_config": asdict(ema.config),
        "ema": {name: value.cpu() for name, value in ema.state_dict().items()},
        "step": step,
        "recipe": asdict(recipe),
    }
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, dict]:
    """The network that a checkpoint describes, with its EMA weights, in eval mode; and the checkpoint's other entries.

    Nothing in the file is executed. CheckpointError if it is missing, damaged, or not a checkpoint of this project.
    """
    checkpoint = _read(Path(path))
    try:
        config = ModelConfig(**checkpoint["model_config"])
        with torch.device("meta"):  # names and shapes are compared before any memory is taken
            model = DiT(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes a network that this code does not build: {error}") from error
    _check_weights(path, checkpoint["ema"], model)
    model.load_state_dict(checkpoint.pop("ema"), assign=True)
    return model.to(device).eval().requires_grad_(False), checkpoint


def _read(path: Path) -> dict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; `python train.py` makes one, and "
                              "`git checkout -- model.pth` restores the one that ships") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this project: it is no torch file, or holds more than "
                              "tensors and plain values; nothing in it was run") from error
    except Exception as error:  # a damaged archive can fail anywhere in torch's reader, in many ways
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({type(error).__name__} while reading)") from error
    kinds = {"format": int, "model_config": dict, "ema": dict, "step": int, "recipe": dict}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), kinds[key]) for key in kinds):
        raise CheckpointError(f"{path} is not a checkpoint of this project: it does not hold {', '.join(kinds)}")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {checkpoint['format']}, and this code reads format {FORMAT}: "
                              "use the version of the project that wrote it")
    return checkpoint


def _check_weights(path: str | Path, weights: dict, model: nn.Module) -> None:
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        names = ", ".join(sorted(map(str, weights.keys() ^ expected.keys()))[:3])
        raise CheckpointError(f"{path} does not fit the network it describes: {names} missing or not expected")
    for name, value in weights.items():
        want = expected[name]
        if not isinstance(value, torch.Tensor) or value.shape != want.shape or value.dtype != want.dtype:
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"{path} does not fit the network it describes: {name} is {found}, "
                                  f"not {tuple(want.shape)} {want.dtype}")
        if not value.isfinite().all():
            raise CheckpointError(f"{path} holds values in {name} that are not finite")
