"""What the scripts share: how they start and end, their device, what they may print, and the lock on a checkpoint."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from dataset import DataError
from runtime.checkpoint import CheckpointError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where two runs with one checkpoint are not detected
    fcntl = None

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as CUDA, the CPU and Windows say it


class TrainingError(Exception):
    """Training cannot start or continue; the message says why."""


class Stopped(Exception):
    """A signal ended the work, which was saved. The message says so."""

    def __init__(self, sentence: str, number: int):
        super().__init__(sentence)
        self.number = number


class Stream:
    """A text stream that drops what it cannot write: a closed pipe or a full disk does not stop the work."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # a file may have a name that the terminal cannot show

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
    """main() as a process of its own: with streams that cannot fail, and with Ctrl-C as a KeyboardInterrupt again."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file would take the place of a closed stderr
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = (Stream(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # and not ignored, as in `train.py &` of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """parser.parse_args(argv), but refuses --steps=--, which argparse reads as no value at all before Python 3.13."""
    if any(re.fullmatch("--[a-z-]+=--", word) for word in (sys.argv[1:] if argv is None else argv)):
        parser.error("an option lacks its value")
    return parser.parse_args(argv)


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Exit with an error message unless each of these options lies in its range, both ends included."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if not least <= value <= most:
            parser.error(f"argument --{name.replace('_', '-')}: must lie in [{least}, {most}], not {value}")


def exit_status(parser: argparse.ArgumentParser, work: Callable[[], None]) -> int:
    """The exit status of `work`: 0, 1 after an error message, 128 + n after signal n."""
    try:
        work()
    except Stopped as stop:
        print(stop)
        return 128 + stop.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (CheckpointError, DataError, OSError, TrainingError) as error:
        return _error(parser, str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return _error(parser, "out of memory: try fewer images at a time, or a smaller network")
    return 0


def _error(parser: argparse.ArgumentParser, sentence: str) -> int:
    print(f"{parser.prog}: error: {sentence}", file=sys.stderr)
    return 1


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU when there is one, else Apple's, else the CPU. ValueError if unusable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun numbers the processes of a machine
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def lock(path: Path) -> BinaryIO:
    """Claim `path` and the files next to it until the result is closed or the process dies, kill -9 included.

    TrainingError if another process has them.
    """
    # digits.pt and digits.resume.pth share files with digits.pth, and so they share the lock. Its file stays: if it were
    # removed, two processes could lock two different files of this name.
    file = Path(os.path.realpath(path))
    held = open(file.with_name(f".{file.stem.removesuffix('.resume')}.lock"), "ab+", buffering=0)
    try:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.truncate(0)
        held.write(b"%d" % os.getpid())
    except BlockingIOError:
        held.seek(0)
        raise TrainingError(f"{path} or a file next to it is being written by process {held.read().decode() or '?'}: choose "
                            "another --checkpoint, or wait until it has ended") from None
    except OSError:  # a file system without locks, or a full one
        pass
    return held
