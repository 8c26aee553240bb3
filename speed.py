"""What makes training fast and changes no result. Read the other files first: nothing here is needed to understand them."""

import ctypes
import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Have malloc keep the memory of a finished step for the next one, for the rest of this process.

    glibc hands freed megabytes back to Linux, which zeroes every page of them before the next step may write there: a
    quarter of the time of a step. Does nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


class SigmoidGELU(nn.Module):
    """GELU in its tanh form, x/2 (1 + tanh u), as x sigmoid(2u), which it equals: when compiled, twice as fast."""

    def forward(self, x: Tensor) -> Tensor:
        two_u = 1.5957691216057308 * (x + 0.044715 * x**3)  # 2 sqrt(2/pi) (x + 0.044715 x^3)
        return x * torch.sigmoid(two_u)


def compiled(model: nn.Module, *batch: Tensor) -> nn.Module:
    """torch.compile(model), tried on one batch; `model` itself, and one line that says why, where that does not work."""
    activations = [block.mlp.act for block in model.blocks]
    for block in model.blocks:
        block.mlp.act = SigmoidGELU()
    network = torch.compile(model, dynamic=False)
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


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
