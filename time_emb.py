"""Timestep embedding: the Transformer's sinusoid of t, then a small MLP (DiT appendix A)."""

import math

import torch
from torch import Tensor, nn

FREQUENCY_DIM = 256  # half of them cosines, half sines (DiT appendix A)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[cos(t w_0), ..., cos(t w_{h-1}), sin(t w_0), ...] with h = dim / 2, w_i = 10000^(-i / h).

    t: (N,), any real values; returns (N, dim), float32. `dim` is even.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    omega = torch.exp(-math.log(10_000) * i / half)
    angle = t.float()[:, None] * omega
    # As in the paper's code: all cosines, then all sines. Trained weights depend on the order.
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimestepEmbedder(nn.Module):
    """t: (N,) ints in [0, T) -> (N, hidden_size)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, FREQUENCY_DIM).to(self.mlp[0].weight.dtype))
