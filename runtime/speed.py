"""What makes the scripts fast and, but for rounding, changes no result. Nothing here is needed to understand the others."""

import copy
import ctypes
import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit import DiT
from runtime.fused import fused, is_fused

LARGE_TABLES = 50_000_000  # values in all; 200 MB
SMALLEST_PIECE, LARGEST_PIECE = 25, 100  # images; found with torch.compile
LARGEST_FUSED_PIECE = 500  # images; bounds the memory
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


def compiled(model: DiT, *batch: Tensor) -> nn.Module:
    """`fused` where that can be, else torch.compile(model), tried on one batch.

    `model` itself, and one line that says why, where neither works.
    """
    network = fused(model)
    if is_fused(network):
        return network
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
        return model
    finally:
        model.zero_grad()


def pieces(network: nn.Module, *batch: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of a batch, cut into equal parts that a CPU's cache holds; whole on a GPU, or where no even cut is at hand.

    The blocks of a `fused` network keep to the cache by themselves; its parts are larger.
    """
    N, largest = len(batch[0]), LARGEST_FUSED_PIECE if is_fused(network) else LARGEST_PIECE
    size = next(size for size in range(min(N, largest), 0, -1) if N % size == 0)
    if batch[0].device.type != "cpu" or size < SMALLEST_PIECE:
        size = N
    return list(zip(*(values.split(size) for values in batch), strict=True))


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
