"""What makes the scripts fast and, but for rounding, changes no result. Nothing here is needed to understand the others."""

import copy
import ctypes
import hashlib
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from checkpoint import write_atomically
from dit import DiT
from dit_block import DiTBlock

LARGE_TABLES = 50_000_000  # values in all; 200 MB
SMALLEST_PIECE, LARGEST_PIECE = 25, 100  # images; found by benchmarks/training.py with --batch-size
LARGEST_FUSED_PIECE = 500
LARGEST_FUSED = 256  # the width of a token from which torch.compile is as fast
VECTOR_UNITS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Have malloc keep the memory of a finished step for the next one, for the rest of this process.

    glibc hands freed megabytes back to Linux, which zeroes every page of them before the next step may write there. Does
    nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


class SigmoidGELU(nn.Module):
    """GELU in its tanh form, x/2 (1 + tanh u), as x sigmoid(2u), which it equals: half the time of torch's on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


class Row(nn.Module):
    """rows[number]: a table in the place of the layer that computed it."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, number: Tensor) -> Tensor:
        return self.rows[number]


@torch.no_grad()
def tabulated(model: DiT, times: Tensor, labels: Tensor) -> DiT:
    """The network for sampling at `times` (S,) with `labels` and the null class: all conditioning is computed here, at once.

    c = t_emb + y_emb depends on t and y alone. In the copy that is returned, c is the number of the pair (t, y), and each
    modulation is the table of its values for all pairs; its blocks are `fused`. Without tables where these would be large.
    """
    fast = copy.deepcopy(model).requires_grad_(False)
    classes = torch.cat([labels, labels.new_tensor([model.y_embedder.null_class])]).unique()
    if len(times) * len(classes) * (6 * len(model.blocks) + 2) * model.config.hidden_size <= LARGE_TABLES:
        times = times.to(labels.device)
        c = (model.t_embedder(times)[:, None] + model.y_embedder(classes)).flatten(0, 1)  # (pairs, D)
        for layer in (*fast.blocks, fast.final_layer):
            layer.adaLN_modulation = Row(layer.adaLN_modulation(c))
        # The forward pass adds t_embedder(t) and y_embedder(y): from now on two ints, whose sum is the number of the pair.
        t_number, y_number = labels.new_zeros(int(times.max()) + 1), labels.new_zeros(int(classes.max()) + 1)
        t_number[times] = torch.arange(len(times), device=labels.device) * len(classes)
        y_number[classes] = torch.arange(len(classes), device=labels.device)
        fast.t_embedder, fast.y_embedder = Row(t_number), Row(y_number)
    return fused(fast, frozen=True)


class FusedBlocks(nn.Module):
    """All blocks of a DiT, one after the other, computed by dit_block.cpp. x: (N, L, D), c: (N, D) -> (N, L, D).

    frozen: the parameters will not change, nor need gradients.
    """

    def __init__(self, blocks: nn.ModuleList, library: ctypes.CDLL, frozen: bool):
        super().__init__()
        self.blocks, self.library = blocks, library
        self.ordered = [values for block in blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
                        for values in (layer.weight, layer.bias)]  # as `Parameters` in dit_block.cpp
        self.packed = self.pack() if frozen else None

    @torch.no_grad()
    def pack(self) -> tuple[Tensor, Tensor]:
        """The `Parameters` and `Transposed` of dit_block.cpp, (depth, values of a block) each."""
        packed = torch.cat([values.flatten() for values in self.ordered]).reshape(len(self.blocks), -1)
        transposed = torch.empty_like(packed)
        self.library.transposed(*arguments(len(packed), packed, transposed))
        return packed, transposed

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulations = torch.stack([block.adaLN_modulation(c) for block in self.blocks])  # (depth, N, 6D)
        return BlocksFunction.apply(x.contiguous(), modulations, self.packed or self.pack(), self.library, *self.ordered)


class BlocksFunction(torch.autograd.Function):
    """x: (N, L, D), modulations: (depth, N, 6D), the packed parameters, and themselves, for their gradients -> (N, L, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, modulations: Tensor, packed: tuple[Tensor, Tensor], library: ctypes.CDLL,
                *parameters: Tensor) -> Tensor:
        depth, N = len(modulations), len(x)
        out = torch.empty_like(x)
        saved = x.new_empty(depth, N, library.saved_floats()) if any(ctx.needs_input_grad) else None
        library.blocks_forward(*arguments(depth, N, x, modulations, *packed, out, saved), torch.get_num_threads())
        if saved is not None:
            ctx.library, ctx.shapes = library, [values.shape for values in parameters]
            ctx.save_for_backward(modulations, packed[0], saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        modulations, packed, saved = ctx.saved_tensors
        d_x, d_modulations = d_out.clone(memory_format=torch.contiguous_format), torch.empty_like(modulations)
        threads = torch.get_num_threads()
        d_packed = packed.new_zeros(threads, packed.numel())
        ctx.library.blocks_backward(*arguments(len(modulations), len(d_x), modulations, packed, saved, d_x, d_modulations,
                                               d_packed), threads)
        d_parameters = d_packed.sum(0).split([shape.numel() for shape in ctx.shapes])
        return d_x, d_modulations, None, None, *(d.view(shape) for d, shape in zip(d_parameters, ctx.shapes, strict=True))


def arguments(*values: int | Tensor | None) -> list[ctypes.c_int64 | ctypes.c_void_p]:
    """Whole numbers, and the addresses of tensors, as C has them."""
    return [ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr())
            for value in values]


@cache
def block_library(tokens: int, hidden_size: int, num_heads: int, mlp_size: int) -> ctypes.CDLL:
    """dit_block.cpp, compiled for blocks of these sizes, in a second or two at their first use.

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


def fused(model: DiT, frozen: bool = False) -> DiT:
    """A copy that shares the parameters of `model` and computes its blocks as `FusedBlocks`; `model` where that cannot be."""
    config, values = model.config, [*model.parameters(), *model.buffers()]
    mlp_size = model.blocks[0].mlp.fc1.out_features
    suited = (config.hidden_size // config.num_heads % 4 == 0 and mlp_size % 16 == 0 and config.hidden_size <= LARGEST_FUSED
              and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in values)
              and not torch.is_autocast_enabled("cpu"))
    if not suited or is_fused(model):
        return model
    try:
        library = block_library(model.pos_embed.shape[1], config.hidden_size, config.num_heads, mlp_size)
    except (OSError, subprocess.CalledProcessError):
        return model
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in values})
    copied.blocks = nn.ModuleList([FusedBlocks(copied.blocks, library, frozen)])
    return copied


def is_fused(network: nn.Module) -> bool:
    return any(isinstance(module, FusedBlocks) for module in network.modules())


def compiled(model: DiT, *batch: Tensor) -> nn.Module:
    """torch.compile(model), tried on one batch; `model` itself, and one line that says why, where that does not work.

    The model's GELUs are replaced by `SigmoidGELU` where it works.
    """
    network = fused(model)
    if is_fused(network):
        return network
    activations = [block.mlp.act for block in model.blocks]
    for block in model.blocks:
        block.mlp.act = SigmoidGELU()
    for module in model.modules():
        if isinstance(module, Row):
            torch._dynamo.mark_dynamic(module.rows, 0)  # so that a table of another length needs no other compilation
    # On a GPU, CUDA graphs: the kernels of so small a network take less time than Python needs to start them.
    network = torch.compile(model, dynamic=False, mode="reduce-overhead" if batch[0].is_cuda else "default")
    try:
        out = network(*batch)
        if out.requires_grad:
            out.sum().backward()
        return network
    except Exception as error:  # a compiler fails in as many ways as there are machines; the plain network never does
        tqdm.write(f"goes on uncompiled, which is slower: {first_line(error)}")
        for block, activation in zip(model.blocks, activations, strict=True):
            block.mlp.act = activation
        return model
    finally:
        model.zero_grad()


def pieces(network: nn.Module, *batch: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of a batch, cut into equal parts that a CPU's cache holds; whole on a GPU, or where no even cut is at hand.

    The blocks of a `fused` network keep to the cache by themselves; there, larger parts bound the memory.
    """
    N, largest = len(batch[0]), LARGEST_FUSED_PIECE if is_fused(network) else LARGEST_PIECE
    size = next(size for size in range(min(N, largest), 0, -1) if N % size == 0)
    if batch[0].device.type != "cpu" or size < SMALLEST_PIECE:
        size = N
    return list(zip(*(values.split(size) for values in batch), strict=True))


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
