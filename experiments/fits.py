"""Lines through few points, and how sure they are."""

import math
from collections.abc import Sequence

import torch
from scipy import stats


class Line:
    """Least squares: y = b_0 + b_1 x_1 + b_2 x_2 + ..., with normal errors of equal size."""

    def __init__(self, y: Sequence[float], *xs: Sequence[float]):
        X = torch.tensor([[1.0, *point] for point in zip(*xs, strict=True)], dtype=torch.float64)
        target = torch.tensor(y, dtype=torch.float64)
        dof = len(y) - X.shape[1]
        self.quantile = float(stats.t.ppf(0.975, dof))  # 95% of Student's t lie within it
        inverse = torch.linalg.inv(X.T @ X)
        self.b = inverse @ X.T @ target
        self.covariance = inverse * (target - X @ self.b).square().sum() / dof

    def at(self, *x: float) -> tuple[float, float]:
        """The line's y there, and half the width of its 95% band."""
        point = torch.tensor([1.0, *x], dtype=torch.float64)
        error = (point @ self.covariance @ point).sqrt()
        return float(point @ self.b), float(error) * self.quantile

    def coefficient(self, i: int) -> tuple[float, float]:
        """b_i and its standard error."""
        return float(self.b[i]), float(self.covariance[i, i].sqrt())

    def interval(self, i: int) -> tuple[float, float]:
        """The 95% interval of b_i."""
        b, error = self.coefficient(i)
        return b - error * self.quantile, b + error * self.quantile


def logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def correlation_interval(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Pearson's correlation and its 95% interval, by Fisher's z."""
    result = stats.pearsonr(x, y)
    return result.statistic, *result.confidence_interval()
