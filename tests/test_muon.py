"""Muon: momentum, Nesterov and Newton-Schulz as torch.optim.Muon has them, computed for all matrices of a shape at once."""

import copy

import pytest
import torch
from torch import nn

from muon import Muon, orthogonalized

SHAPES = [(192, 64), (64, 64), (64, 256), (64, 64), (192, 64), (8, 3)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.01 for shape in SHAPES]


def take_steps(optimizer: Muon, matrices: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for matrix, gradient in zip(matrices, gradients(step), strict=True):
            matrix.grad = gradient
        optimizer.step()


def by_hand(matrix: torch.Tensor, some_gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """One matrix in float64, as torch.optim.Muon updates it with adjust_lr_fn="match_rms_adamw" and no weight decay."""
    matrix, momentum = matrix.detach().double(), 0
    for gradient in some_gradients:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        X = 0.05 * gradient.double() + 0.95 * momentum
        X = X / X.norm()
        for _ in range(5):
            S = X @ X.T
            X = 3.4445 * X - 4.775 * S @ X + 2.0315 * S @ S @ X
        matrix = matrix - lr * 0.2 * max(matrix.shape)**0.5 * X
    return matrix


def test_three_steps_by_hand():
    matrices = parameters()
    expected = [by_hand(matrix, [gradients(step)[i] for step in range(3)], 0.5) for i, matrix in enumerate(matrices)]
    take_steps(Muon(matrices, lr=0.5), matrices, range(3))
    for found, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, rtol=0, atol=3e-5)


def test_torchs_own_which_computes_in_bfloat16():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours, theirs = parameters(), parameters()
    take_steps(Muon(ours, lr=0.5), ours, range(3))
    other = torch.optim.Muon(theirs, lr=0.5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    take_steps(other, theirs, range(3))
    for a, b, start in zip(ours, theirs, parameters(), strict=True):
        assert (a - b).norm() < 0.03 * (a - start).norm()


@pytest.mark.parametrize("shape", [(5, 64, 64), (3, 256, 64), (2, 64, 384), (1, 1, 7)])
def test_singular_values_are_about_one_and_directions_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalized(matrices)
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    values = (U.mT @ found @ Vh.mT).diagonal(dim1=1, dim2=2)
    assert values[S > 0.03 * S[:, :1]].min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(U @ torch.diag_embed(values) @ Vh, found, rtol=0, atol=1e-4)


def test_alone_or_in_a_batch():
    matrices = torch.randn(6, 64, 48, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([orthogonalized(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(alone, orthogonalized(matrices), rtol=0, atol=1e-6)


def test_zero_tiny_and_missing_gradients():
    """Zero, or none, moves nothing; the smallest numbers neither overflow nor become NaN, in whatever company."""
    matrices = [nn.Parameter(torch.ones(4, 4)) for _ in range(4)]
    for matrix, gradient in zip(matrices, (0.0, 1e-38, None, 1.0), strict=True):
        matrix.grad = None if gradient is None else torch.eye(4) * gradient
    Muon(matrices, lr=1.0).step()
    zero, tiny, missing, usual = (matrix.detach() for matrix in matrices)
    assert torch.equal(zero, torch.ones(4, 4)) and torch.equal(missing, zero)
    assert tiny.isfinite().all() and (tiny - 1).abs().max() < (usual - 1).abs().max()


def test_the_rate_may_be_a_tensor():
    results = []
    for lr in (0.25, torch.tensor(0.25)):
        matrices = parameters()
        take_steps(Muon(matrices, lr=lr), matrices, range(2))
        results.append(matrices)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_it_continues_from_its_state_with_the_same_bits():
    whole, half = parameters(), parameters()
    take_steps(Muon(whole, lr=0.1), whole, range(4))
    first = Muon(half, lr=0.1)
    take_steps(first, half, range(2))
    second = Muon(half, lr=0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, half, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))
