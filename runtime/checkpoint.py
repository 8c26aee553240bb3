"""Checkpoints that hold tensors and plain values only, and are checked before they are used.

`model.pth` holds what sampling needs; `run.py` writes the same kind of file for --resume.
"""

import hashlib
import io
import pickle
import textwrap
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ModelConfig
from diffusion import GaussianDiffusion
from dit import DiT
from runtime.files import write_atomically

FORMAT = 1  # incremented when the entries of a file change, so that older code says what is wrong
WEIGHTS = ("model_config", "ema", "step", "recipe", "schedule")  # what model.pth must have


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence."""


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write nested dicts and lists of tensors and plain values. Atomic; OSError if it fails."""
    content = {"format": FORMAT, **content}
    buffer = io.BytesIO()  # written by Python: torch's errors do not say why a disk refuses
    torch.save({**content, "sha256": checksum(content)}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def load_checkpoint(path: str | Path, entries: Iterable[str],
                    schedule: list[float] | None = None) -> dict:
    """Read what `save_checkpoint` wrote, on the CPU, and verify it. Nothing in the file is run.

    entries: the names that it needs; schedule: what it must have been trained with, see
    `GaussianDiffusion.schedule`. CheckpointError if it is missing, damaged or another kind of file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it is of another project, or of another version of this one")
        if content.get("sha256") != checksum({k: v for k, v in content.items() if k != "sha256"}):
            raise ValueError("it is damaged, as its checksum says")
        if missing := [name for name in entries if name not in content]:
            raise ValueError(f"it is another kind of checkpoint, without {missing[0]!r}")
        if schedule and (before := content["schedule"]) != schedule:
            raise ValueError("it was trained with another schedule than this code has: [T, first "
                             f"beta, last beta, last alpha_bar] was {before} and is {schedule}")
        return content
    except Exception as error:  # a damaged file can fail anywhere, with any exception
        reason = str(error).partition("\n")[0].partition(". ")[0]  # torch explains at length
        if isinstance(error, pickle.UnpicklingError):  # torch's sentence advises to run it
            reason = "it holds something other than tensors and plain values; none of it was run"
        raise CheckpointError(f"{path} cannot be used: {reason}") from error


def checksum(content: object) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values, names included."""
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)};".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict | list | tuple):
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            sha.update(f"{kind} {len(value)};".encode())
            for item in chain.from_iterable(value.items()) if kind == "dict" else value:
                add(item)
        else:
            sha.update(f"{value!r};".encode())

    add(content)
    return sha.hexdigest()


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[DiT, dict]:
    """The network of a checkpoint with its EMA weights, in eval mode; and its other entries.

    CheckpointError if it does not fit this code.
    """
    if not Path(path).exists():
        raise CheckpointError(f"there is no checkpoint {path}; `python train.py --checkpoint "
                              f"{path}` makes one, `git checkout model.pth` restores the included")
    info = load_checkpoint(path, WEIGHTS, GaussianDiffusion().schedule)
    try:
        model = DiT(ModelConfig(**info["model_config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this code: {error}") from error
    load_weights(path, model, info.pop("ema"))
    return model.to(device).eval().requires_grad_(False), info


def load_weights(path: str | Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy them into the model. CheckpointError unless they fit it and are finite numbers."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")  # torch writes many lines
        raise CheckpointError(f"{path} does not fit this code: {reason}") from error
    if not all(value.isfinite().all() for value in weights.values()):
        raise CheckpointError(f"{path} has weights that are not finite numbers")
