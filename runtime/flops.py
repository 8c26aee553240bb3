"""How much arithmetic a call does."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def arithmetic(call: Callable[[], object]) -> int:
    """Operations of the matrix products of a call: 2 for a multiplication and an addition."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
