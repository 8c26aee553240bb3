"""Muon, the optimizer of the blocks' matrices (Jordan et al. 2024).

The momentum of a matrix is made orthogonal before it is applied, so that a step moves all its
directions equally (https://kellerjordan.github.io/posts/muon). q, k and v count as one matrix.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
A, B, C = 3.4445, -4.7750, 2.0315  # s -> A s + B s^3 + C s^5, five times


def orthogonalized(matrices: Tensor) -> Tensor:
    """U S' V^T for U S V^T, (K, m, n), by Newton-Schulz; S' in 0.68 to 1.2, less if S is tiny."""
    wide = matrices.shape[1] <= matrices.shape[2]
    X = matrices if wide else matrices.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1; 0 stays 0
    for _ in range(5):
        G = X @ X.mT  # then A X + B G X + C G G X
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=B, alpha=C), X, beta=A)
    return X if wide else X.mT


class Muon(torch.optim.Optimizer):
    """For matrices, (m, n) each. lr: a number, or a 0-dimensional tensor for a CUDA graph."""

    def __init__(self, matrices: Iterable[Tensor], lr: float | Tensor):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    same_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in same_shape.items():
                gradients = [matrix.grad for matrix in matrices]
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                momenta = [self.state[matrix]["momentum"] for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                updates = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))  # Nesterov
                scale = 0.2 * max(shape)**0.5  # updates of RMS 0.2, like AdamW's (arXiv 2502.16982)
                updates = group["lr"] * scale * orthogonalized(updates)
                torch._foreach_sub_(matrices, updates.unbind())
