"""Several processes that share the work of each batch, as torchrun starts them; otherwise, one.

Every process draws the same random numbers for the whole batch and computes its share of it, so
that the number of processes changes the result only by rounding.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them."""

    rank: int = 0  # its number in [0, size)
    size: int = 1
    launch: str = ""  # what torchrun calls this launch of the processes
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
        if self.size == 1:
            return value
        distributed.all_reduce(value)
        return value / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in one of the processes."""
        return bool(self._max(int(flag)))

    def same(self, digest: str) -> bool:
        """Whether all processes have this digest, a hexadecimal number."""
        number = int(digest[:15], 16)
        return self._max(number) == -self._max(-number)

    def _max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)  # on the CPU, where reading it waits for no GPU
        distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
        return int(numbers)


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes of this run, connected while the context lasts.

    device: this process's own. GPUs are connected by NCCL, CPUs by Gloo.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # each machine has its own
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")  # with --standalone a new one every time
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(launch=launch, restarted=restarts > 0)
        return
    store, rank, size = next(distributed.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps one store over restarts, in which a new process would find the addresses
        # of dead ones. On several machines the counts differ: see docs/faq.md.
        store = distributed.PrefixStore(f"start {restarts}", store)
    # "Grad strides": of the patch weights, which `PatchEmbed` permutes
    warnings.filterwarnings("ignore", "Grad strides do not match")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        ranks = Ranks(rank, size, launch)
        yield replace(ranks, restarted=ranks.any(restarts > 0))
    finally:
        distributed.destroy_process_group()
