"""Zero or gate? Other initial values of the blocks' modulation than `DiT.initialize_weights` has.

adaLN-Zero adds two things to adaLN: gates, and a start at zero. These separate them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from dit import DiT


def zero(modulation: nn.Linear) -> None:
    """Shift, scale and, if there is one, gate are 0: for adaLN, whose blocks then start plain."""
    nn.init.zeros_(modulation.weight)


def open_gates(modulation: nn.Linear) -> None:
    """adaLN-Zero's gates are 1, shift and scale 0: a block starts as a plain ViT block."""
    with torch.no_grad():
        for gate in modulation.bias.chunk(6)[2::3]:
            gate.fill_(1)


def xavier(modulation: nn.Linear) -> None:
    """adaLN-Zero's modulation starts as any other linear layer."""
    nn.init.xavier_uniform_(modulation.weight)


STARTS: dict[str, Callable[[nn.Linear], None]] = {
    "muon-zero": zero, "muon-gate-1": open_gates, "muon-xavier": xavier}  # recipes of study.CHANGES


@contextmanager
def started(recipe: str) -> Iterator[None]:
    """Within the block, a new DiT has the initial values of this recipe."""
    usual = DiT.initialize_weights

    def initialize_weights(model: DiT) -> None:
        usual(model)
        for block in model.blocks if recipe in STARTS else ():
            STARTS[recipe](block.adaLN_modulation[1])

    with patch.object(DiT, "initialize_weights", initialize_weights):
        yield
