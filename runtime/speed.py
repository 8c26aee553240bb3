"""What makes the scripts fast; it changes results by rounding only, and the other files can be read without it.

How much each part gains: benchmarks/README.md.
"""

import ctypes
import os
import sys
import warnings

import torch
from torch import nn
from tqdm import tqdm

from dit import DiT
from runtime.fused import fused

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Have malloc keep the memory of a finished step for the next one, for the rest of this process.

    glibc hands freed megabytes back to Linux, which zeroes every page of them before the next step may write there. Without
    this, a step of 300 images takes 1.28 times as long. Does nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def compiled(model: DiT, batch_size: int) -> nn.Module:
    """The network with its blocks in C++ where that is possible, else torch.compile(model), tried on one batch.

    C++ makes a training step twice as fast, torch.compile on a GPU 1.6 times. `model` itself, and one line that says why,
    where neither works.
    """
    network = fused(model)
    if network is not model:
        return network
    config, device = model.config, model.pos_embed.device
    x_t = torch.zeros(batch_size, config.in_channels, config.image_size, config.image_size, device=device)
    t = y = torch.zeros(batch_size, dtype=torch.long, device=device)
    if model.training and os.environ.get("RANK", "0") == "0":  # once: not for the EMA model, nor in each process of torchrun
        tqdm.write("compiling the network; --no-compile skips this")
    warnings.filterwarnings("ignore", "TensorFloat32")  # which gains nothing at these widths (benchmarks/README.md)
    # On a GPU, CUDA graphs: the kernels of so small a network take less time than Python needs to start them.
    network = torch.compile(model, dynamic=False, mode="reduce-overhead" if x_t.is_cuda else "default")
    try:
        with torch.set_grad_enabled(model.training):
            out = network(x_t, t, y)
        if model.training:
            out.sum().backward()
        return network
    except Exception as error:  # a compiler fails in as many ways as there are machines; the plain network never does
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        tqdm.write(f"continuing without compilation, which is slower: {reason}")
        return model
    finally:
        model.zero_grad()
