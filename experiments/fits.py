"""Lines through few points, and how sure they are: the formulas of a statistics book."""

import math
import statistics
from collections.abc import Sequence

import torch


def t_within(t: float, dof: int) -> float:
    """P(|T| <= t) of Student's t with `dof` degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    cos2, angle = dof / (dof + t * t), math.atan(t / math.sqrt(dof))
    odd = dof % 2
    term, total = (math.sqrt(cos2) if odd else 1.0), 0.0
    for k in range(2 + odd, dof + 1, 2):
        total, term = total + term, term * cos2 * (k - 1) / k
    total *= math.sin(angle)
    if odd:
        return 2 / math.pi * (angle + total)
    return total


def t_quantile(dof: int, share: float = 0.95) -> float:
    """The t within which this share of the distribution lies, on both sides of 0."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, dof) < share else (low, middle)
    return low


class Line:
    """Least squares: y = b_0 + b_1 x_1 + b_2 x_2 + ..., with normal errors of equal size."""

    def __init__(self, y: Sequence[float], *xs: Sequence[float]):
        X = torch.tensor([[1.0, *point] for point in zip(*xs, strict=True)], dtype=torch.float64)
        target = torch.tensor(y, dtype=torch.float64)
        self.dof = len(y) - X.shape[1]
        inverse = torch.linalg.inv(X.T @ X)
        self.b = inverse @ X.T @ target
        self.covariance = inverse * (target - X @ self.b).square().sum() / self.dof

    def at(self, *x: float) -> tuple[float, float]:
        """The line's y there, and half the width of its 95% band."""
        point = torch.tensor([1.0, *x], dtype=torch.float64)
        error = (point @ self.covariance @ point).sqrt()
        return float(point @ self.b), float(error) * t_quantile(self.dof)

    def coefficient(self, i: int) -> tuple[float, float]:
        """b_i and its standard error."""
        return float(self.b[i]), float(self.covariance[i, i].sqrt())

    def interval(self, i: int) -> tuple[float, float]:
        """The 95% interval of b_i."""
        b, error = self.coefficient(i)
        return b - error * t_quantile(self.dof), b + error * t_quantile(self.dof)


def logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def correlation_interval(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Pearson's correlation and its 95% interval, by Fisher's z."""
    r = statistics.correlation(x, y)
    width = 1.96 / math.sqrt(len(x) - 3)
    return r, math.tanh(math.atanh(r) - width), math.tanh(math.atanh(r) + width)


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, t and two-sided p of the hypothesis that differences of equal seeds have mean 0."""
    mean = statistics.mean(differences)
    t = mean / (statistics.stdev(differences) / math.sqrt(len(differences)))
    return mean, t, 1 - t_within(abs(t), len(differences) - 1)
