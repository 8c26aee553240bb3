"""Muon is torch.optim.Muon, computed for all matrices of a shape at once in float32."""

import pytest
import torch
from torch import nn

from muon import Muon, orthogonalized

SHAPES = [(192, 64), (64, 64), (64, 256), (64, 64), (192, 64), (8, 3)]


def randoms(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def after_steps(optimizer_of) -> list[nn.Parameter]:
    """SHAPES after three steps of optimizer_of(matrices)."""
    matrices = [nn.Parameter(matrix) for matrix in randoms(seed=100)]
    optimizer = optimizer_of(matrices)
    for step in range(3):
        for matrix, gradient in zip(matrices, randoms(step, 0.01), strict=True):
            matrix.grad = gradient
        optimizer.step()
    return matrices


def by_hand(matrix: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """One matrix in float64: momentum, Nesterov, Newton-Schulz, and a step of AdamW's size."""
    matrix, momentum = matrix.double(), 0
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        X = 0.05 * gradient.double() + 0.95 * momentum
        X = X / X.norm()
        for _ in range(5):
            S = X @ X.T
            X = 3.4445 * X - 4.775 * S @ X + 2.0315 * S @ S @ X
        matrix = matrix - lr * 0.2 * max(matrix.shape)**0.5 * X
    return matrix


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_three_steps_by_hand(lr):
    gradients = [randoms(step, 0.01) for step in range(3)]
    for i, found in enumerate(after_steps(lambda matrices: Muon(matrices, lr))):
        expected = by_hand(randoms(seed=100)[i], [some[i] for some in gradients], 0.5)
        torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=3e-5)


def test_torchs_own_which_computes_in_bfloat16():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours = after_steps(lambda matrices: Muon(matrices, lr=0.5))
    theirs = after_steps(lambda matrices: torch.optim.Muon(
        matrices, lr=0.5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for a, b, start in zip(ours, theirs, randoms(seed=100), strict=True):
        assert (a - b).norm() < 0.03 * (a - start).norm()


@pytest.mark.parametrize("shape", [(5, 64, 64), (3, 256, 64), (2, 64, 384), (1, 1, 7)])
def test_singular_values_are_about_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalized(matrices)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    values = (U.mT @ found @ Vh.mT).diagonal(dim1=1, dim2=2)
    assert values[S > 0.03 * S[:, :1]].min() > 0.68 and values.max() < 1.2
    torch.testing.assert_close(U @ torch.diag_embed(values) @ Vh, found, rtol=0, atol=1e-4)


def test_zero_tiny_and_missing_gradients():
    """Zero, or none, moves nothing; the smallest numbers neither overflow nor become NaN."""
    matrices = [nn.Parameter(torch.ones(4, 4)) for _ in range(4)]
    for matrix, gradient in zip(matrices, (0.0, 1e-38, None, 1.0), strict=True):
        matrix.grad = None if gradient is None else torch.eye(4) * gradient
    Muon(matrices, lr=1.0).step()
    zero, tiny, missing, usual = (matrix.detach() for matrix in matrices)
    assert torch.equal(zero, torch.ones(4, 4)) and torch.equal(missing, zero)
    assert tiny.isfinite().all() and (tiny - 1).abs().max() < (usual - 1).abs().max()
