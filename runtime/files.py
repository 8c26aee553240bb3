"""Finding files, writing them whole or not at all, and naming those of a run."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def here_or_in_project(path: str | Path) -> Path:
    """`path`, or the same path in this project's directory if only that exists."""
    return Path(path) if os.path.exists(path) or not os.path.exists(PROJECT / path) else PROJECT / path


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call write(temporary file next to `path`), then move the result into place: `path` is old or new, never half.

    A link stays, and the file that it points to is replaced. OSError with a one-sentence message if that fails.
    """
    file = _target(path)
    temporary = _temporary(file)
    try:
        write(temporary)
        _sync(temporary, os.O_RDWR)  # Windows syncs no file that is open for reading only
        os.replace(temporary, file)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); it is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        try:
            _sync(file.parent, os.O_RDONLY)  # the new name itself, which lives in the directory
        except OSError as error:
            raise OSError(f"{path} is written, but a power cut could undo that ({error.strerror or error})") from error


def _target(path: str | Path) -> Path:
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def _temporary(path: Path) -> Path:
    """A hidden name of its own. Random, because containers that share a directory may have equal process numbers."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """OSError with a one-sentence message if `path` could not be written: better now than after an hour's work."""
    file = _target(path)
    if os.path.exists(file) and not os.path.isfile(file):
        raise OSError(f"{path} is a directory or a device, not a file")
    if not os.path.isdir(file.parent):
        raise OSError(f"{path} cannot be written: there is no directory {file.parent}")
    try:
        temporary = _temporary(file)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def check_files(outputs: Iterable[Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """OSError if an output could not be written, or is the same file as an input or another output."""
    known = [path for path in inputs if path]
    for path in filter(None, outputs):
        for other in known:
            linked = path.exists() and other.exists() and path.samefile(other)
            if linked or os.path.realpath(path) == os.path.realpath(other):
                raise OSError(f"{path} and {other} are the same file: choose another path")
        check_writable(path)
        known.append(path)


def files_of_run(weights: Path) -> tuple[Path, ...]:
    """The files of the run whose weights are in this one: weights, state, loss.csv, loss.png, samples.png."""
    stem, suffix = weights.stem, weights.suffix
    prefix = "" if stem == "model" else f"{stem}."
    others = f"{stem}.resume{suffix}", f"{prefix}loss.csv", f"{prefix}loss.png", f"{prefix}samples.png"
    return weights, *(weights.parent / name for name in others)


def keep_other_run(weights: Path) -> None:
    """Keep another run's files under the names of --checkpoint model.old-1.pth, or -2, ..., where it can be resumed."""
    files = files_of_run(weights)
    if not any(path.exists() for path in files):
        return
    choices = (files_of_run(weights.with_stem(f"{weights.stem}.old-{number}")) for number in count(1))
    kept = next(names for names in choices if not any(path.exists() for path in names))
    if weights.exists():  # a copy, so that there is a model.pth at every moment
        write_atomically(kept[0], lambda temporary: shutil.copy2(weights, temporary))
    for path, name in zip(files[1:], kept[1:], strict=True):
        if path.exists():
            path.rename(name)
    continues = f"; --resume --checkpoint {kept[0]} continues it" if kept[1].exists() else ""
    print(f"{weights} and the files next to it are another run's: kept as {kept[0]} and so on{continues}")
