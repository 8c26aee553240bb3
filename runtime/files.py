"""Files that are written whole or not at all, and the lock that keeps two runs apart."""

import glob
import os
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where two runs with one checkpoint are not detected
    fcntl = None

PROJECT = Path(__file__).resolve().parent.parent


def here_or_in_project(path: str | Path) -> Path:
    """`path`, or the same path in this project's directory if only that exists."""
    here = os.path.exists(path) or not os.path.exists(PROJECT / path)
    return Path(path) if here else PROJECT / path


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary file), then move the result to `path`, which is old or new, never half.

    If `path` is a link, its target is replaced. OSError with one sentence if that fails.
    """
    file = Path(os.path.realpath(path))
    temporary = _temporary(file)
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)  # Windows syncs no file that is open for reading only
        os.replace(temporary, file)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written ({reason}); it is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # not all systems can
        _sync(file.parent, os.O_RDONLY)  # the new name, which is in the directory


def _temporary(path: Path, token: str = "") -> Path:
    return path.with_name(f".{path.stem}.{token or secrets.token_hex(4)}.tmp{path.suffix}")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove the temporary files of these that a kill has left. Only with the lock on them."""
    for file in (Path(os.path.realpath(path)) for path in paths):
        pattern = _temporary(Path(glob.escape(file.name)), "[0-9a-f]" * 8)
        for leftover in file.parent.glob(str(pattern)):
            with suppress(OSError):
                leftover.unlink()


def check_files(outputs: Iterable[Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """OSError if an output cannot be written, or is an input or another output too."""
    known = {os.path.realpath(path): path for path in inputs if path}
    for path in filter(None, outputs):
        file = os.path.realpath(path)
        if file in known:
            raise OSError(f"{path} and {known[file]} are the same file: choose another path")
        special = re.match("/(dev$|proc/)", os.path.realpath(path.parent))  # such as /dev/stdout
        if special or (path.exists() and not path.is_file()):
            raise OSError(f"{path} is a directory or a device, not a file")
        try:
            temporary = _temporary(Path(file))
            temporary.touch()  # better an error now than after an hour of work
            temporary.unlink()
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error
        known[file] = path


def lock(path: Path) -> BinaryIO:
    """Claim `path` and the files next to it until the result is closed or the process ends.

    OSError with the lock's name if it cannot be opened, or if another process holds it.
    """
    # digits.pt and digits.resume.pth share files with digits.pth, and so they share the lock. It
    # stays: if it were removed, two processes could lock two different files of this name.
    target = Path(os.path.realpath(path))
    file = target.with_name(f".{target.stem.removesuffix('.resume')}.lock")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    held = open(os.open(file, flags, 0o666), "rb+", buffering=0)
    try:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.truncate(0)
        held.write(b"%d" % os.getpid())
    except BlockingIOError:
        owner = held.read().decode() or "?"
        held.close()
        raise OSError(f"{path} or a file next to it is being written by process {owner}: choose "
                      "another --checkpoint, or wait until it has ended") from None
    except OSError:  # a file system without locks, or a full one
        pass
    return held
