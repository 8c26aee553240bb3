"""Several processes that share the work of each batch, as torchrun starts them; otherwise, one.

All draw the random numbers of the whole batch, so how many there are changes only the rounding.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them."""

    rank: int = 0  # its number in [0, size)
    size: int = 1
    restarted: bool = False  # by torchrun, after one of the processes had died

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and shows the bar."""
        return self.rank == 0

    def share(self, *batches: Tensor) -> list[Tensor]:
        """This process's part of each tensor of a whole batch."""
        return [batch.chunk(self.size)[self.rank] for batch in batches]

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, its gradients averaged over the processes at every backward pass."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the processes' values."""
        if self.size > 1:
            distributed.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in one of the processes."""
        return bool(self.mean(torch.tensor(float(flag))))  # on the CPU, which waits for no GPU


@contextmanager
def joined_ranks(device: torch.device, one_gpu: bool) -> Iterator[Ranks]:
    """The processes of this run, connected within the context: GPUs by NCCL, else by Gloo."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # of this machine's torchrun
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(restarted=restarts > 0)
        return
    store, rank, size = next(distributed.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # In torchrun's one store, restarted processes would find the addresses of dead ones.
        store = distributed.PrefixStore(f"start {restarts}", store)
    # These are of the patch weights, which `PatchEmbed` permutes.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # NCCL refuses processes that share a GPU (--device cuda:0).
    backend = "gloo" if one_gpu or device.type != "cuda" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size, restarts > 0)
    finally:
        distributed.destroy_process_group()
