"""What makes the scripts fast, at the cost of rounding only: see benchmarks/README.md."""

import ctypes
import os
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dit import DiT
from runtime.fused import first_line, fused

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>
PLAIN_CALLS = 3  # before a CUDA graph: they create what is created once, such as momenta


def keep_freed_memory() -> None:
    """Have glibc keep the memory of a finished step for the next one, until the process ends.

    Else it returns it to Linux, which zeroes each page again: 1.28 times as long for 300 images.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def compiled(model: DiT, batch_size: int) -> nn.Module:
    """The network with its blocks in C++ where possible, else torch.compile(model).

    C++ makes a training step twice as fast, torch.compile on a GPU, too. Where neither works,
    `model` itself, and one line that says why.
    """
    network = fused(model)
    if network is not model:
        return network
    config, device = model.config, model.pos_embed.device
    size = (batch_size, config.in_channels, config.image_size, config.image_size)
    x_t, t = torch.zeros(size, device=device), torch.zeros(batch_size, device=device).long()
    if model.training and os.environ.get("RANK", "0") == "0":  # once, not for the EMA model too
        tqdm.write("compiling the network; --no-compile skips this")
    warnings.filterwarnings("ignore", "TensorFloat32")  # which gains nothing at these widths
    # CUDA graphs: a GPU computes these small kernels faster than Python starts them.
    graphs = x_t.is_cuda and not records(device)  # which has a graph of the whole step
    network = torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else "default")
    try:
        with torch.set_grad_enabled(model.training):
            out = network(x_t, t, t)
        if model.training:
            out.sum().backward()
        return network
    except Exception as error:  # a compiler fails in as many ways as there are machines
        tqdm.write(f"continuing without compilation, which is slower: {first_line(error)}")
        return model
    finally:
        model.zero_grad()


def records(device: torch.device) -> bool:
    """Whether `recorded` makes CUDA graphs: on one GPU, unless DIT_RECORD=0."""
    asked = os.environ.get("DIT_RECORD") != "0"
    return asked and device.type == "cuda" and os.environ.get("WORLD_SIZE", "1") == "1"


def recorded(function: Callable[..., Tensor], device: torch.device,
             generator: torch.Generator | None = None,
             after_failure: Callable[[], object] = lambda: None) -> Callable[..., Tensor]:
    """`function`, recorded on a GPU as a CUDA graph in its fourth call; later calls replay it.

    function: takes tensors and numbers, of the same shapes in every call, and returns a tensor. It
    gets numbers as tensors, (), because a graph would repeat a number. Its Python runs in the first
    four calls only. generator: of its random numbers. after_failure: undoes half a call; then one
    line says why, and all calls are plain.
    """
    if not records(device):
        return function
    warnings.filterwarnings("ignore", ".*capturable=True")  # of AdamW, about the plain calls
    stream = torch.cuda.Stream(device)
    inputs, calls, replay = [], 0, None

    def call(*values: Tensor | float) -> Tensor:
        nonlocal calls, replay
        if calls > PLAIN_CALLS and replay is None:
            return function(*values)
        if not inputs:
            inputs.extend(torch.as_tensor(value, device=device).clone() for value in values)
        for own, value in zip(inputs, values, strict=True):
            own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)  # no wait
        calls += 1
        if calls <= PLAIN_CALLS:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                out = function(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            return out
        try:
            graph, out = replay = replay or captured(function, inputs, stream, generator)
        except Exception as error:  # what a graph cannot hold, such as .item(), or out of memory
            tqdm.write("continuing without a CUDA graph, which is slower: "
                       f"{first_line(error.__context__ or error)}")
            after_failure()
            return function(*values)
        graph.replay()
        return out.clone()

    return call


def captured(function: Callable[..., Tensor], inputs: list[Tensor], stream: torch.cuda.Stream,
             generator: torch.Generator | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """function(*inputs) as a CUDA graph, and its result, which every replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    if generator:
        before = generator.clone_state()
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, stream=stream):
            out = function(*inputs)
    except Exception:
        if generator:  # a failed capture leaves it unusable
            generator.graphsafe_set_state(before.graphsafe_get_state())
        raise
    return graph, out
