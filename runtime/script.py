"""What the scripts share: how they start and end, and their device."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

import torch

from dataset import DataError
from runtime.checkpoint import CheckpointError

# As CUDA, the CPU and Windows say it
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class TrainingError(Exception):
    """Training cannot start or continue; the message says why."""


class Stopped(Exception):
    """A signal ended the work, which was saved. The message says so."""

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.number = number


class Stream:
    """A text stream that drops what it cannot write: a closed pipe does not stop hours of work."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: it is closed
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run_script(main: Callable[[], int]) -> int:
    """main() as a process of its own: its streams cannot fail, Ctrl-C is a KeyboardInterrupt."""
    sys.stdout, sys.stderr = (Stream(stream or open(os.devnull, "w"))
                              for stream in (sys.stdout, sys.stderr))
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # not ignored, as in a shell's `train.py &`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace,
                 **ranges: tuple[float, float]) -> None:
    """Exit with an error message unless each option lies in its range, both ends included."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if not least <= value <= most:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: must lie in [{least}, {most}], not {value}")


def exit_status(parser: argparse.ArgumentParser, work: Callable[[], None]) -> int:
    """The exit status of `work`: 0, 1 after an error message, 128 + n after signal n."""
    try:
        work()
        return 0
    except Stopped as stop:
        print(stop)
        return 128 + stop.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (CheckpointError, DataError, OSError, TrainingError) as error:
        sentence = str(error)
    except (MemoryError, RuntimeError) as error:
        words = OUT_OF_MEMORY if isinstance(error, RuntimeError) else [""]
        if not any(word in str(error) for word in words):
            raise
        sentence = "out of memory: try fewer images at a time, or a smaller network"
    print(f"{parser.prog}: error: {sentence}", file=sys.stderr)
    return 1


def pick_device(name: str) -> torch.device:
    """The device of that name. ValueError if it is unusable.

    "auto" is a GPU when there is one, else Apple's, else the CPU.
    """
    if name == "auto":
        apple = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if apple else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun numbers a machine's processes
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from error
