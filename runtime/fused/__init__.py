"""The blocks of a DiT in C++ for a CPU: dit_block.cpp, compiled for the network.

torch's kernels each write their result for the whole batch to memory and read it back; here an image goes through a block
without leaving the core's cache. dit_block.py is the version to read; results differ from it by rounding only.
"""

import copy
import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dit import DiT
from runtime.files import write_atomically

MAX_WIDTH = 256  # of a token; for wider ones torch.compile is as fast
READABLE = ("cpu", torch.float32)  # the device and dtype that dit_block.cpp takes
MAX_TOKENS = 1024  # of an image; the scratch memory of a thread grows with their square
log = logging.getLogger(__name__)  # prints to stderr; a stream that is closed or broken does not stop the work

VECTOR_UNITS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]}


def fused(model: DiT, frozen: bool = False) -> DiT:
    """A copy of `model` that shares its parameters and has its blocks in C++; `model` itself where that is impossible.

    It needs float32 on a CPU with AVX2 or AVX-512, a C++ compiler, and the adaLN or adaLN-Zero blocks of dit_block.py, with
    sizes that fill whole vectors and tiles and are not too large. frozen: see `FusedBlocks`.
    """
    if type(model) is not DiT or not model.adaptive or model.config.hidden_size > MAX_WIDTH:
        return model
    kinds = {(values.device.type, values.dtype) for values in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng(devices=[]):
        reference = DiT(model.config, initialize=False)
    if kinds != {READABLE} or not same_computation(model.blocks, reference.blocks):
        return model
    config, tokens, mlp_size = model.config, model.pos_embed.shape[1], model.blocks[0].mlp.fc1.out_features
    whole_vectors = config.hidden_size // config.num_heads % 4 == 0 and mlp_size % 16 == 0  # see W in dit_block.cpp
    whole_tiles = any(tokens % rows == 0 for rows in (4, 5, 6, 7))  # see strip() there
    if not whole_vectors or not whole_tiles or tokens > MAX_TOKENS:
        return model
    library = block_library(tokens, config.hidden_size, config.num_heads, mlp_size)
    if library is None:
        return model
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    copied.blocks = nn.ModuleList([FusedBlocks(model.blocks, library, frozen)])
    return copied


def same_computation(module: nn.Module, reference: nn.Module) -> bool:
    """Whether the two differ in the values of their parameters only: C++ replaces nothing but what it was written for.

    All parts have exactly the same types, shapes and settings (eps, the form of GELU, number of heads, hooks).
    """
    def described(module: nn.Module) -> list:
        return [(type(part), {name: p is not None and p.shape for name, p in part._parameters.items()},
                 {name: value for name, value in vars(part).items() if name not in ("_parameters", "_modules", "training")})
                for part in module.modules()]

    return described(module) == described(reference)


@cache
def block_library(tokens: int, hidden_size: int, num_heads: int, mlp_size: int) -> ctypes.CDLL | None:
    """dit_block.cpp for blocks of these sizes; compiled in a second or two when first used, and then kept in a file.

    None where the processor has no vector unit for it, and, with one line that says why, where it cannot be built.
    """
    vector_units = VECTOR_UNITS.get(torch.backends.cpu.get_cpu_capability())
    if vector_units is None:
        return None
    sizes = {"TOKENS": tokens, "WIDTH": hidden_size, "HEADS": num_heads, "MLP_WIDTH": mlp_size}
    try:
        source = Path(__file__).with_name("dit_block.cpp").read_bytes()
        command = [*shlex.split(os.environ.get("CXX") or "c++"), "-x", "c++", "-", "-std=c++17", "-O3", "-fopenmp",
                   "-shared", "-fPIC", *vector_units, *(f"-D{name}={value}" for name, value in sizes.items())]
        name = f"dit_block-{hashlib.sha256(source + repr(command).encode()).hexdigest()[:16]}.so"
        for folder in library_folders():
            with suppress(OSError):
                return load(folder / name)
        return build(command, source, name)
    except (OSError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        log.warning("continuing without the C++ blocks, which is slower: they cannot be built (%s)", reason.splitlines()[0])
        log.disabled = True  # once is enough
        return None


def library_folders() -> list[Path]:
    """Where compiled libraries are kept: next to the source, or, where that cannot be written, in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [Path(__file__).with_name("__pycache__"), *([user / "dit-101"] if user.is_absolute() else [])]


def digest(name: str, library: bytes) -> bytes:
    """The checksum at the end of a library's file, where the system's loader does not look."""
    return hashlib.sha256(name.encode() + library).digest()


def load(path: Path) -> ctypes.CDLL:
    """The library in a file of `build`; a file that is not whole is never run. OSError if there is no such file."""
    content = path.read_bytes()
    if content[-32:] != digest(path.name, content[:-32]):
        raise OSError(f"{path} is damaged")
    library = ctypes.CDLL(str(path))
    library.saved_floats.restype = ctypes.c_int64
    return library


def build(command: list[str], source: bytes, name: str) -> ctypes.CDLL:
    """Compile the source that the name stands for, keep the library in the first folder that takes it, and load it."""
    with TemporaryDirectory() as temporary:
        built = Path(temporary) / name
        subprocess.run([*command, "-o", built], input=source, check=True, capture_output=True)
        content = built.read_bytes()
        content += digest(name, content)
        for folder in library_folders():
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, lambda path: path.write_bytes(content))
                return load(folder / name)
        built.write_bytes(content)
        return load(built)


class FusedBlocks(nn.Module):
    """All blocks of a DiT, one after the other. x: (N, L, D), c: (N, D) -> (N, L, D), float32.

    frozen: their parameters will not change and need no gradients, so they are packed once instead of in every call, which
    makes a call for ten digits 1.4 times as fast.
    """

    def __init__(self, blocks: nn.ModuleList, library: ctypes.CDLL, frozen: bool):
        super().__init__()
        self.blocks, self.library = blocks, library
        self.packed = (self.modulation(), self.pack(self.ordered())) if frozen else None

    def ordered(self) -> list[Tensor]:
        """The parameters of attention and MLP, in the order of `Parameters` in dit_block.cpp."""
        return [values for block in self.blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
                for values in (layer.weight, layer.bias)]

    def modulation(self) -> tuple[Tensor, Tensor]:
        """All adaLN layers as one: its weight (depth * K * D, D) and bias, with K = 6 for adaLN-Zero and 4 for adaLN."""
        layers = [block.adaLN_modulation[1] for block in self.blocks]
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    @torch.no_grad()
    def pack(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The `Parameters` and `Transposed` of dit_block.cpp: (depth, values of a block) each."""
        packed = torch.cat([values.flatten() for values in parameters]).reshape(len(self.blocks), -1)
        transposed = torch.empty_like(packed)
        self.library.transposed(*arguments(len(packed), packed, transposed), torch.get_num_threads())
        return packed, transposed

    @torch.autocast("cpu", enabled=False)  # the C++ takes float32
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, c = x.float(), c.float()
        (N, D), depth = c.shape, len(self.blocks)
        if len(x) != N:
            raise ValueError(f"{len(x)} images cannot be conditioned on {N} times and labels")
        parameters = [] if self.packed else self.ordered()
        (weight, bias), packed = self.packed or (self.modulation(), self.pack(parameters))
        mod = F.linear(F.silu(c), weight, bias).view(N, depth, len(bias) // (depth * D), D)
        if mod.shape[2] == 4:  # adaLN is adaLN-Zero with gates of 1
            gate = mod.new_ones(N, depth, 1, D)
            mod = torch.cat([mod[:, :, :2], gate, mod[:, :, 2:], gate], dim=2)
        return BlocksFunction.apply(x.contiguous(), mod, packed, self.library, torch.is_grad_enabled(), *parameters)


class BlocksFunction(torch.autograd.Function):
    """x: (N, L, D), mod: (N, depth, 6, D), the packed parameters, then the originals, for their gradients -> (N, L, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, mod: Tensor, packed: tuple[Tensor, Tensor], library: ctypes.CDLL, grad_enabled: bool,
                *parameters: Tensor) -> Tensor:
        N, depth = mod.shape[:2]
        out = torch.empty_like(x)
        saved = x.new_empty(depth, N, library.saved_floats()) if grad_enabled and any(ctx.needs_input_grad) else None
        library.blocks_forward(*arguments(depth, N, x, mod, *packed, out, saved), torch.get_num_threads())
        if saved is not None:
            ctx.library, ctx.shapes = library, [values.shape for values in parameters]
            ctx.save_for_backward(mod, packed[0], saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        mod, packed, saved = ctx.saved_tensors
        threads = max(1, min(torch.get_num_threads(), len(d_out)))
        d_x, d_mod = d_out.clone(memory_format=torch.contiguous_format), torch.empty_like(mod)
        d_packed = packed.new_zeros(threads, packed.numel())
        ctx.library.blocks_backward(*arguments(mod.shape[1], len(d_x), mod, packed, saved, d_x, d_mod, d_packed), threads)
        d_parameters = []
        if ctx.shapes:
            parts = d_packed.sum(0).split([shape.numel() for shape in ctx.shapes])
            d_parameters = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return d_x, d_mod, None, None, None, *d_parameters


def arguments(*values: int | Tensor | None) -> list[ctypes.c_int64 | ctypes.c_void_p]:
    """Ints, and the addresses of tensors, as C arguments. TypeError for a tensor that C++ could not read."""
    for value in values:
        if isinstance(value, Tensor) and ((value.device.type, value.dtype) != READABLE or not value.is_contiguous()):
            raise TypeError(f"the fused blocks take contiguous float32 on a CPU, not {value.dtype} on {value.device}")
    return [ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr())
            for value in values]
