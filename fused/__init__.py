"""The blocks of a DiT in C++, for training and sampling on a CPU: dit_block.cpp, compiled for the network at hand.

torch's kernels each write their result for the whole batch to memory and read it back; here an image goes through a block
without leaving the core's cache. dit_block.py remains what one reads; nothing here changes a result but by rounding.
"""

import copy
import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from checkpoint import write_atomically
from dit import DiT, FinalLayer

LARGEST_WIDTH = 256  # of a token; for wider ones torch.compile is as fast
VECTOR_UNITS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]}


def fused(model: DiT, frozen: bool = False) -> DiT:
    """A copy of `model` that shares its parameters and has `FusedBlocks`; `model` itself where that cannot be.

    It can for float32 on a CPU with a C++ compiler, up to a width of LARGEST_WIDTH. frozen: see `FusedBlocks`.
    """
    config, values = model.config, [*model.parameters(), *model.buffers()]
    suited = (config.hidden_size <= LARGEST_WIDTH and not is_fused(model) and not torch.is_autocast_enabled("cpu")
              and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in values))
    # Whole vectors: see W in dit_block.cpp.
    mlp_size = model.blocks[0].mlp.fc1.out_features if suited else 0
    if not suited or config.hidden_size // config.num_heads % 4 or mlp_size % 16:
        return model
    try:
        library = block_library(model.pos_embed.shape[1], config.hidden_size, config.num_heads, mlp_size)
    except (OSError, subprocess.CalledProcessError):
        return model
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in values})
    copied.blocks = nn.ModuleList([FusedBlocks(copied.blocks, library, frozen)])
    copied.final_layer = FusedFinalLayer(copied.final_layer, library)
    return copied


def is_fused(network: nn.Module) -> bool:
    return any(isinstance(module, FusedBlocks) for module in network.modules())


@cache
def block_library(tokens: int, hidden_size: int, num_heads: int, mlp_size: int) -> ctypes.CDLL:
    """dit_block.cpp for blocks of these sizes; compiled at their first use, in a second or two, and kept in __pycache__.

    OSError or CalledProcessError where that does not work.
    """
    source = Path(__file__).with_name("dit_block.cpp")
    sizes = {"L": tokens, "D": hidden_size, "HEADS": num_heads, "M": mlp_size}
    command = [os.environ.get("CXX", "c++"), str(source), "-O3", "-fopenmp", "-shared", "-fPIC",
               *VECTOR_UNITS.get(torch.backends.cpu.get_cpu_capability(), []),
               *(f"-D{name}={value}" for name, value in sizes.items())]
    key = hashlib.sha256(source.read_bytes() + repr(command).encode()).hexdigest()[:16]
    place = source.with_name("__pycache__") / f"dit_block-{key}.so"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        write_atomically(place, lambda path: subprocess.run([*command, "-o", path], check=True, capture_output=True))
    library = ctypes.CDLL(str(place))
    library.saved_floats.restype = ctypes.c_int64
    return library


class FusedBlocks(nn.Module):
    """All blocks of a DiT, one after the other. x: (N, L, D), c: (N, D) -> (N, L, D).

    frozen: their parameters will not change, nor need gradients, and are packed once instead of at every call.
    """

    def __init__(self, blocks: nn.ModuleList, library: ctypes.CDLL, frozen: bool):
        super().__init__()
        self.blocks, self.library = blocks, library
        layers = [layer for block in blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
        self.ordered = [values for layer in layers for values in (layer.weight, layer.bias)]  # as `Parameters` there
        self.packed = self.pack() if frozen else None

    @torch.no_grad()
    def pack(self) -> tuple[Tensor, Tensor]:
        """The `Parameters` and `Transposed` of dit_block.cpp: (depth, values of a block) each."""
        packed = torch.cat([values.flatten() for values in self.ordered]).reshape(len(self.blocks), -1)
        transposed = torch.empty_like(packed)
        self.library.transposed(*arguments(len(packed), packed, transposed))
        return packed, transposed

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulations = torch.stack([block.adaLN_modulation(c) for block in self.blocks])  # (depth, N, 6D)
        return BlocksFunction.apply(x.contiguous(), modulations, self.packed or self.pack(), self.library,
                                    torch.is_grad_enabled(), *self.ordered)


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
        threads = torch.get_num_threads()
        d_x, d_modulations = d_out.clone(memory_format=torch.contiguous_format), torch.empty_like(modulations)
        d_packed = packed.new_zeros(threads, packed.numel())
        ctx.library.blocks_backward(*arguments(len(modulations), len(d_x), modulations, packed, saved, d_x, d_modulations,
                                               d_packed), threads)
        d_parameters = d_packed.sum(0).split([shape.numel() for shape in ctx.shapes])
        d_parameters = [d.view(shape) for d, shape in zip(d_parameters, ctx.shapes, strict=True)]
        return d_x, d_modulations, None, None, None, *d_parameters


class FusedFinalLayer(nn.Module):
    """The final layer with its LayerNorm and modulation in one. x: (N, L, D), c: (N, D) -> (N, L, p*p*C_out)."""

    def __init__(self, layer: FinalLayer, library: ctypes.CDLL):
        super().__init__()
        self.layer, self.library = layer, library

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.layer.linear(FinalFunction.apply(x.contiguous(), self.layer.adaLN_modulation(c), self.library))


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
    """Whole numbers, and the addresses of tensors, as C has them."""
    return [ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr())
            for value in values]
