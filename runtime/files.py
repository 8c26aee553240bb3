"""Writing files whole or not at all, and the lock that keeps two runs apart."""

import glob
import os
import re
import secrets
import stat
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
    elsewhere = not os.path.exists(path) and os.path.exists(PROJECT / path)
    return PROJECT / path if elsewhere else Path(path)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary file next to `path`), then move the result into place.

    So `path` is old or new, never half. A link stays, and the file that it points to is replaced.
    OSError with a one-sentence message if that fails.
    """
    file = _target(path)
    temporary = _temporary(file, secrets.token_hex(4))
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)  # Windows syncs no file that is open for reading only
        os.replace(temporary, file)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written ({reason}); it is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some systems sync no directory
        _sync(file.parent, os.O_RDONLY)  # the new name itself, which lives there


def _target(path: str | Path) -> Path:
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def _temporary(path: Path, token: str) -> Path:
    """A hidden name. Not from the process number: containers that share a directory have equal ones."""
    return path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what processes left that were killed while they wrote these files; needs the lock."""
    for path in map(_target, paths):
        pattern = _temporary(Path(glob.escape(path.name)), "[0-9a-f]" * 8)
        for leftover in path.parent.glob(str(pattern)):
            with suppress(OSError):
                leftover.unlink()


def check_writable(path: str | Path) -> None:
    """OSError with one sentence if `path` could not be written: better now than after an hour."""
    file = _target(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is a directory or a device, not a file")
    if re.match("/(dev$|proc/)", os.path.realpath(Path(path).parent)):  # such as /dev/stdout
        raise OSError(f"{path} cannot be written: {Path(path).parent} is for devices, not for files")
    if not os.path.isdir(file.parent):
        raise OSError(f"{path} cannot be written: there is no directory {file.parent}")
    try:
        temporary = _temporary(file, secrets.token_hex(4))
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def check_files(outputs: Iterable[Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """OSError if an output cannot be written, or is the same file as an input or another output."""
    known = [path for path in inputs if path]
    for path in filter(None, outputs):
        for other in known:
            linked = path.exists() and other.exists() and path.samefile(other)
            if linked or os.path.realpath(path) == os.path.realpath(other):
                raise OSError(f"{path} and {other} are the same file: choose another path")
        check_writable(path)
        known.append(path)


def lock(path: Path) -> BinaryIO:
    """Claim `path` and the files next to it, until the result is closed or the process dies.

    OSError if another process has them, or if the lock is not an ordinary file of ours.
    """
    # digits.pt and digits.resume.pth share files with digits.pth, and so they share the lock. It
    # stays: if it were removed, two processes could lock two different files of this name.
    target = Path(os.path.realpath(path))
    file = target.with_name(f".{target.stem.removesuffix('.resume')}.lock")
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        held = open(os.open(file, flags, 0o666), "rb+", buffering=0)
    except OSError as error:
        reason = "it is a link" if file.is_symlink() else error.strerror
        raise OSError(f"{file}, the lock of {path}, cannot be opened: {reason}") from error
    information = os.fstat(held.fileno())
    if not stat.S_ISREG(information.st_mode) or information.st_nlink > 1:
        held.close()
        raise OSError(f"{file}, the lock of {path}, cannot be used: it is a device or a link")
    try:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.truncate(0)
        held.write(b"%d" % os.getpid())
    except BlockingIOError:
        owner = held.read(20).decode(errors="replace") or "?"
        held.close()
        raise OSError(f"{path} or a file next to it is being written by process {owner}: choose "
                      "another --checkpoint, or wait until it has ended") from None
    except OSError:  # a file system without locks, or a full one
        pass
    return held
