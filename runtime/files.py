"""Files that are written whole or not at all, and the lock that keeps two runs apart."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock file `path` is ours, until the block or the process ends.

    The file stays: if it were removed, two processes could lock two different files of this name.
    """
    with path.open("a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield True
