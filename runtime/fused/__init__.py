"""The blocks of a DiT, and the final layer's norm, in C++ for a CPU: dit_block.cpp, compiled for the network at hand.

torch's kernels each write their result for the whole batch to memory and read it back; here an image goes through a block
without leaving the core's cache. dit_block.py remains what one reads; nothing here changes a result but by rounding.
"""

import copy
import ctypes
import hashlib
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dit import DiT, FinalLayer
from runtime.checkpoint import write_atomically

LARGEST_WIDTH = 256  # of a token; for wider ones torch.compile is as fast
READABLE = ("cpu", torch.float32)  # the device and dtype that dit_block.cpp takes
MOST_TOKENS = 1024  # of an image; the scratch memory of a thread grows with their square
VECTOR_UNITS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]}


def fused(model: DiT, frozen: bool = False) -> DiT:
    """A copy of `model` that shares its parameters and has its blocks in C++; `model` itself where that cannot be.

    It can in float32 on a CPU with AVX2 or AVX-512, for networks that are not too large, where there is a C++ compiler.
    frozen: see `FusedBlocks`.
    """
    config, tokens = model.config, model.pos_embed.shape[1]
    kinds = {(values.device.type, values.dtype) for values in (*model.parameters(), *model.buffers())}
    if is_fused(model) or torch.is_autocast_enabled("cpu") or kinds != {READABLE}:
        return model
    mlp_size = model.blocks[0].mlp.fc1.out_features
    whole_vectors = config.hidden_size // config.num_heads % 4 == 0 and mlp_size % 16 == 0  # see W in dit_block.cpp
    whole_tiles = any(tokens % rows == 0 for rows in (4, 5, 6, 7))  # see product() there
    if not whole_vectors or not whole_tiles or config.hidden_size > LARGEST_WIDTH or tokens > MOST_TOKENS:
        return model
    library = block_library(tokens, config.hidden_size, config.num_heads, mlp_size)
    if library is None:
        return model
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    copied.blocks = nn.ModuleList([FusedBlocks(model.blocks, library, frozen)])
    copied.final_layer = FusedFinalLayer(model.final_layer, library)
    return copied


def is_fused(network: nn.Module) -> bool:
    """Whether `fused` made it, or made what it wraps."""
    return any(isinstance(module, FusedBlocks) for module in network.modules())


@cache
def block_library(tokens: int, hidden_size: int, num_heads: int, mlp_size: int) -> ctypes.CDLL | None:
    """dit_block.cpp for blocks of these sizes; compiled at their first use, in a second or two, and kept in __pycache__.

    None where that does not work.
    """
    vector_units = VECTOR_UNITS.get(torch.backends.cpu.get_cpu_capability())
    if vector_units is None:
        return None
    source = Path(__file__).with_name("dit_block.cpp")
    sizes = {"TOKENS": tokens, "WIDTH": hidden_size, "HEADS": num_heads, "MLP_WIDTH": mlp_size}
    command = [*shlex.split(os.environ.get("CXX", "c++")), str(source), "-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC",
               *vector_units, *(f"-D{name}={value}" for name, value in sizes.items())]
    key = hashlib.sha256(source.read_bytes() + repr(command).encode()).hexdigest()[:16]
    place = source.with_name("__pycache__") / f"dit_block-{key}.so"
    try:
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            write_atomically(place, lambda path: subprocess.run([*command, "-o", path], check=True, capture_output=True))
        library = ctypes.CDLL(str(place))
    except (OSError, subprocess.CalledProcessError):
        return None
    library.saved_floats.restype = ctypes.c_int64
    return library


class FusedBlocks(nn.Module):
    """All blocks of a DiT, one after the other. x: (N, L, D), c: (N, D) -> (N, L, D), in float32 under autocast too.

    frozen: their parameters will not change, nor need gradients, and are packed once instead of at every call.
    """

    def __init__(self, blocks: nn.ModuleList, library: ctypes.CDLL, frozen: bool):
        super().__init__()
        self.blocks, self.library = blocks, library
        self.packed = self.pack(self.ordered()) if frozen else None

    def ordered(self) -> list[Tensor]:
        """The parameters, but for the modulation's, in the order of `Parameters` in dit_block.cpp."""
        return [values for block in self.blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
                for values in (layer.weight, layer.bias)]

    @torch.no_grad()
    def pack(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The `Parameters` and `Transposed` of dit_block.cpp: (depth, values of a block) each."""
        packed = torch.cat([values.flatten() for values in parameters]).reshape(len(self.blocks), -1)
        transposed = torch.empty_like(packed)
        self.library.transposed(*arguments(len(packed), packed, transposed), torch.get_num_threads())
        return packed, transposed

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if len(x) != len(c):
            raise ValueError(f"{len(x)} images cannot be conditioned on {len(c)} times and labels")
        parameters = [] if self.packed else self.ordered()
        with torch.autocast("cpu", enabled=False):
            modulations = torch.stack([block.adaLN_modulation(c) for block in self.blocks])  # (depth, N, 6D)
            return BlocksFunction.apply(x.float().contiguous(), modulations.float(), self.packed or self.pack(parameters),
                                        self.library, torch.is_grad_enabled(), *parameters)


class BlocksFunction(torch.autograd.Function):
    """x: (N, L, D), modulations: (depth, N, 6D), the packed parameters, and themselves, for their gradients -> (N, L, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, modulations: Tensor, packed: tuple[Tensor, Tensor], library: ctypes.CDLL, grad_enabled: bool,
                *parameters: Tensor) -> Tensor:
        depth, N = len(modulations), len(x)
        out = torch.empty_like(x)
        saved = x.new_empty(depth, N, library.saved_floats()) if grad_enabled and any(ctx.needs_input_grad) else None
        library.blocks_forward(*arguments(depth, N, x, modulations, *packed, out, saved), torch.get_num_threads())
        if saved is not None:
            ctx.library, ctx.shapes = library, [values.shape for values in parameters]
            ctx.save_for_backward(modulations, packed[0], saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        modulations, packed, saved = ctx.saved_tensors
        threads = max(1, min(torch.get_num_threads(), len(d_out)))
        d_x, d_modulations = d_out.clone(memory_format=torch.contiguous_format), torch.empty_like(modulations)
        d_packed = packed.new_zeros(threads, packed.numel())
        ctx.library.blocks_backward(*arguments(len(modulations), len(d_x), modulations, packed, saved, d_x, d_modulations,
                                               d_packed), threads)
        d_parameters = []
        if ctx.shapes:
            parts = d_packed.sum(0).split([shape.numel() for shape in ctx.shapes])
            d_parameters = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return d_x, d_modulations, None, None, None, *d_parameters


class FusedFinalLayer(nn.Module):
    """The final layer with its LayerNorm and modulation in one. x: (N, L, D), c: (N, D) -> (N, L, p*p*C_out)."""

    def __init__(self, layer: FinalLayer, library: ctypes.CDLL):
        super().__init__()
        self.layer, self.library = layer, library

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            modulation = self.layer.adaLN_modulation(c).float()
            return self.layer.linear(FinalFunction.apply(x.float().contiguous(), modulation, self.library))


class FinalFunction(torch.autograd.Function):
    """x: (N, L, D), modulation: (N, 2D) -> (N, L, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, modulation: Tensor, library: ctypes.CDLL) -> Tensor:
        out = torch.empty_like(x)
        library.final_forward(*arguments(len(x), x, modulation, out), torch.get_num_threads())
        ctx.library = library
        ctx.save_for_backward(x, modulation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, modulation = ctx.saved_tensors
        d_x, d_modulation = torch.zeros_like(x), torch.empty_like(modulation)
        tensors = (x, modulation, d_out.contiguous(), d_x, d_modulation)
        ctx.library.final_backward(*arguments(len(x), *tensors), torch.get_num_threads())
        return d_x, d_modulation, None


def arguments(*values: int | Tensor | None) -> list[ctypes.c_int64 | ctypes.c_void_p]:
    """Whole numbers, and the addresses of tensors, as C has them. TypeError for a tensor that C++ could not read."""
    for value in values:
        if isinstance(value, Tensor) and ((value.device.type, value.dtype) != READABLE or not value.is_contiguous()):
            raise TypeError(f"the fused blocks take contiguous float32 on a CPU, not {value.dtype} on {value.device}")
    return [ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr())
            for value in values]
