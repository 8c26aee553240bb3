"""dit_block.cpp as a library, compiled for a network's sizes when first used, then kept."""

import ctypes
import hashlib
import os
import shlex
import stat
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from runtime.files import write_atomically

VECTOR_UNITS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}


@cache
def block_library(tokens: int, hidden_size: int, num_heads: int, mlp_size: int) -> ctypes.CDLL:
    """dit_block.cpp for blocks of these sizes; compiling it takes a second or two.

    OSError or ValueError with one sentence where it cannot be built.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in VECTOR_UNITS:
        raise OSError("this processor has neither AVX2 nor AVX-512")
    sizes = {"TOKENS": tokens, "WIDTH": hidden_size, "HEADS": num_heads, "MLP_WIDTH": mlp_size}
    source = Path(__file__).with_name("dit_block.cpp").read_bytes()
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-x", "c++", "-", "-std=c++17", "-O3",
               "-fopenmp", "-shared", "-fPIC", *VECTOR_UNITS[capability],
               *(f"-D{name}={value}" for name, value in sizes.items())]
    key = hashlib.sha256(source + repr(command).encode()).hexdigest()[:16]
    name = f"dit_block-{key}.so"
    for folder in library_folders():
        with suppress(OSError):
            return load(folder / name)
    return build(command, source, name)


def library_folders() -> list[Path]:
    """Where libraries are kept: next to the source, or if that is read-only, in a cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [Path(__file__).with_name("__pycache__")]
    return [*folders, user / "dit-101"] if user.is_absolute() else folders


def check_owner(path: Path) -> None:
    """OSError unless `path` is this user's or root's, and nobody else may write to it."""
    status = path.stat()
    if os.name == "posix" and (status.st_uid not in (os.getuid(), 0)
                               or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise OSError(f"{path} can be changed by another user")


def digest(name: str, library: bytes) -> bytes:
    """The checksum at the end of a library's file, where the system's loader does not look."""
    return hashlib.sha256(name.encode() + library).digest()


def load(path: Path) -> ctypes.CDLL:
    """The library in a file of `build`. OSError if there is none that is whole and safe to run."""
    content = path.read_bytes()
    if content[-32:] != digest(path.name, content[:-32]):
        raise OSError(f"{path} is damaged")
    check_owner(path)
    check_owner(path.parent)
    library = ctypes.CDLL(str(path))
    library.saved_floats.restype = ctypes.c_int64  # AttributeError: it is another library
    return library


def build(command: list[str], source: bytes, name: str) -> ctypes.CDLL:
    """Compile the source, keep the library in the first folder that takes it, and load it."""
    with TemporaryDirectory() as temporary:
        built = Path(temporary) / name
        done = subprocess.run([*command, "-o", built], input=source, capture_output=True)
        if done.returncode or not built.exists():
            reason = done.stderr.decode(errors="replace").strip().partition("\n")[0]
            raise OSError(f"{command[0]} cannot build it ({reason or done.returncode})")
        content = built.read_bytes()
        content += digest(name, content)
        for folder in library_folders():
            with suppress(OSError):
                folder.mkdir(0o755, parents=True, exist_ok=True)  # else `load` would refuse it
                check_owner(folder)
                write_atomically(folder / name,
                                 lambda path: (path.write_bytes(content), path.chmod(0o755)))
                return load(folder / name)
        built.write_bytes(content)
        built.chmod(0o700)
        return load(built)
