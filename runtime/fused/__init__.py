"""The blocks of a DiT in C++ for a CPU: dit_block.cpp, compiled for the network.

torch's kernels each write their result for the whole batch to memory and read it back; here an
image goes through a block without leaving the core's cache. dit_block.py is the version to read,
and the one that counts: C++ stands in only where a trial shows that it computes the same.
"""

import copy
import ctypes
import logging

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dit import DiT
from runtime.fused.library import block_library
from runtime.fused.trial import Unfit, check_same, hooked

MAX_WIDTH = 256  # of a token; for wider ones torch.compile is as fast
MAX_TOKENS = 1024  # of an image; the scratch memory of a thread grows with their square
READABLE = ("cpu", torch.float32)  # the device and dtype that dit_block.cpp takes
log = logging.getLogger(__name__)  # prints to stderr, and fails quietly if that is closed
said = set()


def fused(model: DiT, frozen: bool = False) -> DiT:
    """A copy of `model` that shares its parameters and has its blocks in C++.

    `model` itself, and one line that says why, where that is impossible or a trial of the two
    differs in an output or a gradient: an edit of dit_block.py is never replaced. On other devices
    than a CPU `model` itself. frozen: see `FusedBlocks`.
    """
    if any(p.device.type != "cpu" for p in model.parameters()):
        return model
    try:
        if hooked(model):
            raise Unfit("the network has hooks")
        with torch.inference_mode(False):
            plain = copy.deepcopy(model)
            check_same(plain, in_cpp(plain))
        return in_cpp(model, frozen)
    except Exception as error:  # an edited network fails in as many ways as there are edits
        reason = first_line(error)
        if reason not in said:
            log.warning("plain PyTorch instead of C++, which is slower: %s", reason)
        said.add(reason)
        return model


def first_line(error: BaseException) -> str:
    """Of its message, or its type if that is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def in_cpp(model: DiT, frozen: bool = False) -> DiT:
    """`model` with all its blocks replaced by `FusedBlocks`. Unfit where their sizes do not fit."""
    copied = copy.copy(model)
    copied._modules = dict(model._modules)
    copied.blocks = nn.ModuleList([FusedBlocks(model, frozen)])
    return copied


class FusedBlocks(nn.Module):
    """All blocks of a DiT, one after the other. x: (N, L, D), c: (N, D) -> (N, L, D), float32.

    frozen: their parameters will not change and need no gradients, so they are packed once instead
    of in every call, which makes a call for ten digits 1.4 times as fast.
    """

    def __init__(self, model: DiT, frozen: bool):
        super().__init__()
        self.blocks, D = model.blocks, model.config.hidden_size
        if not all(hasattr(block, "adaLN_modulation") for block in self.blocks):
            raise Unfit(f"there is no C++ for {type(self.blocks[0]).__name__}")
        if any((p.device.type, p.dtype) != READABLE for p in model.parameters()):
            raise Unfit("the C++ takes float32 on a CPU")
        self.tokens, mlp_size = model.pos_embed.shape[1], self.blocks[0].mlp.fc1.out_features
        # Whole vectors: see W in dit_block.cpp.
        if D > MAX_WIDTH or self.tokens > MAX_TOKENS or (
                D // model.config.num_heads % 4 or mlp_size % 16):
            raise Unfit(f"the C++ does not take {self.tokens} tokens of {D} values, heads of "
                        f"{D // model.config.num_heads} and MLPs of {mlp_size}")
        layers = [(3 * D, D), (D, D), (mlp_size, D), (D, mlp_size)]
        shapes = [shape for rows, columns in layers for shape in ((rows, columns), (rows,))]
        if [tuple(p.shape) for p in self.ordered()] != len(self.blocks) * shapes:
            raise Unfit("a block has other layers than the C++")
        self.library = block_library(self.tokens, D, model.config.num_heads, mlp_size)
        self.packed = (self.modulation(), self.pack(self.ordered())) if frozen else None

    def ordered(self) -> list[Tensor]:
        """The parameters of attention and MLP, in the order of `Parameters` in dit_block.cpp."""
        return [values for block in self.blocks
                for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
                for values in (layer.weight, layer.bias)]

    def modulation(self) -> tuple[Tensor, Tensor]:
        """All adaLN layers as one: its weight (depth * K * D, D) and bias.

        K is 6 for adaLN-Zero and 4 for adaLN.
        """
        layers = [block.adaLN_modulation[1] for block in self.blocks]
        weights, biases = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
        return torch.cat(weights), torch.cat(biases)

    @torch.no_grad()
    def pack(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The `Parameters` and `Transposed` of dit_block.cpp: (depth, values of a block) each."""
        packed = torch.cat([values.flatten() for values in parameters])
        packed = packed.reshape(len(self.blocks), -1)
        transposed = torch.empty_like(packed)
        self.library.transposed(*arguments(len(packed), packed, transposed),
                                torch.get_num_threads())
        return packed, transposed

    @torch.autocast("cpu", enabled=False)  # the C++ takes float32
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x, c = x.float(), c.float()
        (N, D), depth = c.shape, len(self.blocks)
        if x.shape != (N, self.tokens, D):  # C++ would read past its end
            raise ValueError(f"{tuple(x.shape)} tokens cannot be conditioned on {tuple(c.shape)}")
        parameters = [] if self.packed else self.ordered()
        (weight, bias), packed = self.packed or (self.modulation(), self.pack(parameters))
        mod = F.linear(F.silu(c), weight, bias).view(N, depth, len(bias) // (depth * D), D)
        if mod.shape[2] == 4:  # adaLN is adaLN-Zero with gates of 1
            gate = mod.new_ones(N, depth, 1, D)
            mod = torch.cat([mod[:, :, :2], gate, mod[:, :, 2:], gate], dim=2)
        if mod.shape[2] != 6:
            raise ValueError(f"{mod.shape[2]} values of modulation per channel, where C++ has 6")
        return BlocksFunction.apply(x.contiguous(), mod.contiguous(), packed, self.library,
                                    torch.is_grad_enabled(), *parameters)


class BlocksFunction(torch.autograd.Function):
    """x: (N, L, D), mod: (N, depth, 6, D), the packed parameters, then the originals, for their
    gradients -> (N, L, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, mod: Tensor, packed: tuple[Tensor, Tensor], library: ctypes.CDLL,
                grad_enabled: bool, *parameters: Tensor) -> Tensor:
        N, depth = mod.shape[:2]
        out, saved = torch.empty_like(x), None
        if grad_enabled and any(ctx.needs_input_grad):
            saved = x.new_empty(depth, N, library.saved_floats())
        library.blocks_forward(*arguments(depth, N, x, mod, *packed, out, saved),
                               torch.get_num_threads())
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
        ctx.library.blocks_backward(
            *arguments(mod.shape[1], len(d_x), mod, packed, saved, d_x, d_mod, d_packed), threads)
        d_parameters = []
        if ctx.shapes:
            parts = d_packed.sum(0).split([shape.numel() for shape in ctx.shapes])
            d_parameters = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return d_x, d_mod, None, None, None, *d_parameters


def arguments(*values: int | Tensor | None) -> list[ctypes.c_int64 | ctypes.c_void_p]:
    """Ints, and the addresses of tensors, as C arguments. TypeError for what C++ could not read."""
    for value in values:
        if isinstance(value, Tensor) and (
                (value.device.type, value.dtype) != READABLE or not value.is_contiguous()):
            raise TypeError("the fused blocks take contiguous float32 on a CPU, "
                            f"not {value.dtype} on {value.device}")
    return [ctypes.c_int64(value) if isinstance(value, int)
            else ctypes.c_void_p(None if value is None else value.data_ptr()) for value in values]
