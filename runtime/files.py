"""Files that are written whole or not at all, and the lock that keeps two runs apart."""

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from config import require

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
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(4)}.tmp{file.suffix}")
    try:
        write(temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # so that a power cut leaves no empty file of this name
        os.replace(temporary, file)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written ({reason}); it is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_files(outputs: Iterable[Path | None]) -> None:
    """SettingError if one cannot be written: better now than after an hour of work."""
    for path in filter(None, outputs):
        require(path.is_file() or not path.exists(), f"{path} is a directory, not a file")
        require(os.access(path.parent, os.W_OK), f"{path.parent} is no directory to write to")


def lock(path: Path) -> TextIO:
    """Claim `path` and the files next to it until the result is closed or the process ends.

    OSError if another process holds it. The lock file stays: if it were removed, two processes
    could lock two different files of this name.
    """
    held = path.with_name(f".{path.stem}.lock").open("a")
    try:
        import fcntl
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another process is writing {path} or a file next to it: wait until it "
                      "ends, or choose another --checkpoint") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return held
