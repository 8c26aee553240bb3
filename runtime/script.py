"""What the scripts share: how they start and end, and their device."""

import argparse
import os
import sys
from collections.abc import Callable

import torch

from config import SettingError
from dataset import DataError
from runtime.checkpoint import CheckpointError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # GPU, CPU, Windows


class TrainingError(Exception):
    """Training cannot start or continue; the message says why."""


def exit_status(parser: argparse.ArgumentParser, work: Callable[[], None]) -> int:
    """The exit status of `work`: 0, or 1 or 2 after an error message of one sentence."""
    try:
        work()
        return 0
    except SettingError as error:
        parser.error(str(error))
    except (CheckpointError, DataError, FloatingPointError, OSError, TrainingError) as error:
        sentence = str(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in OUT_OF_MEMORY):
            raise
        sentence = "out of memory: try fewer images at a time, or a smaller network"
    print(f"{parser.prog}: error: {sentence}", file=sys.stderr)
    return 1


def pick_device(name: str) -> torch.device:
    """"auto" is a GPU when there is one, else Apple's, else the CPU. SettingError if unusable."""
    if name == "auto":
        apple = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else apple
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun numbers a machine's processes
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"device {name!r} cannot be used here: {reason}") from error
