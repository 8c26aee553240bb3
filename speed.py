"""What makes the scripts fast and, but for rounding, changes no result. Nothing here is needed to understand the others."""

import copy
import ctypes
import math
import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit import DiT
from dit_block import DiTBlock

LARGE_TABLES = 50_000_000  # values in all; 200 MB
SMALLEST_PIECE, LARGEST_PIECE = 25, 100  # images; found by benchmarks/training.py with --batch-size
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
        c = 2 * math.sqrt(2 / math.pi)
        factor = torch.addcmul(x.new_tensor(c), x, x, value=0.044715 * c)  # 2u / x, with u = sqrt(2/pi) (x + 0.044715 x^3)
        if torch.is_grad_enabled():
            return (factor * x).sigmoid() * x
        return factor.mul_(x).sigmoid_().mul_(x)


class Row(nn.Module):
    """rows[number]: a table in the place of the layer that computed it."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, number: Tensor) -> Tensor:
        return self.rows[number]


class TabulatedBlock(nn.Module):
    """A DiTBlock for sampling, with a table for its modulation and fewer, larger kernels: ten digits are 490 tokens, and
    for these a kernel takes about as long to start as to run. x: (N, L, D), number: (N,) ints -> (N, L, D)."""

    def __init__(self, block: DiTBlock, modulations: Tensor):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.mlp.act = SigmoidGELU()
        rows = modulations.unflatten(1, (6, -1)).clone()
        rows[:, [1, 4]] += 1  # the scales
        self.modulation = Row(rows.flatten(1)[:, None])

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(number).chunk(6, dim=2)
        x = torch.addcmul(x, gate_attn, self.attn(torch.addcmul(shift_attn, scale_attn, self.norm1(x))))
        return torch.addcmul(x, gate_mlp, self.mlp(torch.addcmul(shift_mlp, scale_mlp, self.norm2(x))))


@torch.no_grad()
def tabulated(model: DiT, times: Tensor, labels: Tensor) -> DiT:
    """The network for sampling at `times` (S,) with `labels` and the null class: all conditioning is computed here, at once.

    c = t_emb + y_emb depends on t and y alone. In the copy that is returned, c is the number of the pair (t, y), and each
    modulation is the table of its values for all pairs. `model` itself where these tables would be large.
    """
    classes = torch.cat([labels, labels.new_tensor([model.y_embedder.null_class])]).unique()
    D = model.config.hidden_size
    if len(times) * len(classes) * (6 * len(model.blocks) + 2) * D > LARGE_TABLES:
        return model
    fast = copy.deepcopy(model).requires_grad_(False)
    times = times.to(labels.device)
    c = (model.t_embedder(times)[:, None] + model.y_embedder(classes)).flatten(0, 1)  # (pairs, D)
    fast.blocks = nn.ModuleList(TabulatedBlock(block, block.adaLN_modulation(c)) for block in fast.blocks)
    fast.final_layer.adaLN_modulation = Row(fast.final_layer.adaLN_modulation(c))
    # The forward pass adds t_embedder(t) and y_embedder(y): from now on two ints, whose sum is the number of the pair.
    t_number, y_number = labels.new_zeros(int(times.max()) + 1), labels.new_zeros(int(classes.max()) + 1)
    t_number[times] = torch.arange(len(times), device=labels.device) * len(classes)
    y_number[classes] = torch.arange(len(classes), device=labels.device)
    fast.t_embedder, fast.y_embedder = Row(t_number), Row(y_number)
    return fast


def compiled(model: DiT, *batch: Tensor) -> nn.Module:
    """torch.compile(model), tried on one batch; `model` itself, and one line that says why, where that does not work.

    The model's GELUs are replaced by `SigmoidGELU` where it works.
    """
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


def pieces(*batch: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of a batch, cut into equal parts that a CPU's cache holds; whole on a GPU, or where no even cut is at hand."""
    N = len(batch[0])
    size = next(size for size in range(min(N, LARGEST_PIECE), 0, -1) if N % size == 0)
    if batch[0].device.type != "cpu" or size < SMALLEST_PIECE:
        size = N
    return list(zip(*(values.split(size) for values in batch), strict=True))


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
