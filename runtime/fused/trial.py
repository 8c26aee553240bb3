"""Do two versions of a network compute the same? A trial tells: outputs, gradients, effects."""

import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = 1e-4  # as a share of a tensor's largest value; at most 1.2e-5 in the study's networks
LOUD_ROUNDING = 5e-3  # where scores and hidden values are large; at most 3e-4


class Unfit(Exception):
    """The network computes something else than the C++; the message says what."""


def check_same(plain: nn.Module, network: nn.Module) -> None:
    """Unfit unless `network`, which shares the parameters of `plain`, computes what `plain` does.

    They are compared with random weights and buffers: the output, with and without gradients, and
    the gradients of x_t and of all parameters. And `plain` must do nothing else: take no random
    numbers, print nothing, change no attribute, buffer or global. Overwrites the weights of both,
    and leaves all random states as they are.
    """
    config, generator = plain.config, torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)

    size = (2, config.in_channels, config.image_size, config.image_size)
    # A large cotangent, so that whatever limits gradients counts
    x_t, cotangent = randn(*size), 1000 * randn(2, config.out_channels, *size[2:])
    t, y = torch.tensor([[0, 999], [1, config.num_classes]], device="cpu")
    with torch.enable_grad():
        plain.requires_grad_()
        named = dict((*plain.named_parameters(), *plain.named_buffers()))
        randoms = {name: randn(*value.shape) / max(1, value[0].numel())**0.5
                   for name, value in named.items()}

        def set_weights(**factors: float) -> None:
            """factors: of the parameters whose names have these parts."""
            with torch.no_grad():
                for name, value in named.items():
                    mine = (factor for part, factor in factors.items() if part in name)
                    value.copy_(randoms[name] * math.prod(mine))

        set_weights(qkv=4, fc1=4, adaLN=2)  # large values, so that whatever limits them counts
        loud = torch.cat([100 * x_t[:1], x_t[1:]])
        with torch.no_grad():  # as in sampling
            with no_effects(plain):
                expected = plain(loud, t, y)
            compare("output", network(loud, t, y), expected, LOUD_ROUNDING)
            # So that a LayerNorm's eps counts
            set_weights(x_embedder=0.001, pos_embed=0.001, adaLN=0.002)
            compare("output", network(x_t, t, y), plain(x_t, t, y), ROUNDING)
        set_weights()
        expected, found = (outputs_and_gradients(either, plain, x_t, t, y, cotangent)
                           for either in (plain, network))
        for name, value in expected.items():
            compare(name, found[name], value, ROUNDING)


def compare(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Unfit unless they are equal except for rounding; NaN is not equal."""
    if not (found - expected).abs().max() <= tolerance * expected.abs().max():
        raise Unfit(f"the network computes something else than the C++ ({name})")


def outputs_and_gradients(network: nn.Module, owner: nn.Module, x_t: Tensor, t: Tensor, y: Tensor,
                          cotangent: Tensor) -> dict[str, Tensor]:
    """All that training sees of a network whose parameters are those of `owner`."""
    names, values = zip(*owner.named_parameters(), strict=True)
    x_t = x_t.clone().requires_grad_()
    out = network(x_t, t, y)
    gradients = torch.autograd.grad(out, [x_t, *values], cotangent, allow_unused=True)
    found = {"output": out.detach()}
    for name, value, gradient in zip(("x_t", *names), (x_t, *values), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(value) if gradient is None else gradient
    return found


@contextmanager
def no_effects(network: nn.Module) -> Iterator[None]:
    """Unfit if the network does more than compute its output, which the C++ would leave out."""
    before, sys.stdout = effects(network), Overheard(sys.stdout)
    try:
        with NoRandomNumbers():
            yield
    finally:
        overheard, sys.stdout = sys.stdout, sys.stdout.stream
    if overheard.used or effects(network) != before:
        raise Unfit("the network prints, or changes something while it computes")


def effects(network: nn.Module) -> list:
    """What a forward pass could change, to compare before and after."""
    parts = list(network.modules())
    modules = {type(part).__module__ for part in parts}
    spaces = [*map(vars, parts), *(vars(sys.modules[name]) for name in sorted(modules))]
    return [[(name, id(value), list(map(id, value)) if isinstance(value, list | tuple) else
              list(map(id, value.values())) if isinstance(value, dict) else None)
             for name, value in space.items() if not name.startswith("__")] for space in spaces] + [
        [values._version for values in network.buffers()], random.getstate()]


class NoRandomNumbers(TorchDispatchMode):
    """Unfit where torch would generate random numbers, before it does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise Unfit("the network generates random numbers")
        return function(*args, **(kwargs or {}))


class Overheard:
    """A stream, and whether something was written to it."""

    def __init__(self, stream):
        self.stream, self.used = stream, False

    def write(self, text: str) -> int:
        self.used = True
        return self.stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def hooked(model: nn.Module) -> bool:
    """Whether something listens to the model's modules or parameters, or to all modules."""
    spaces = [vars(torch.nn.modules.module), *map(vars, model.modules())]
    on_parameters = (p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    return any(hooks for space in spaces for name, hooks in space.items()
               if name.endswith("_hooks")) or any(on_parameters)
