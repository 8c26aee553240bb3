"""Figure 9: where the curves of two models cross, FID against training compute."""

import math
from collections.abc import Sequence
from itertools import pairwise, product

from config import FAMILY
from experiments import study
from experiments.rows import Rows
from experiments.study import IMPOSSIBLE, PATCHES, select

Curve = Sequence[tuple[float, float]]  # logarithms of compute and of FID, the former rising


def at(curve: Curve, x: float) -> float:
    """Its value at x, on the line between two measured points; NaN outside them."""
    for (x_0, y_0), (x_1, y_1) in pairwise(curve):
        if x_0 <= x <= x_1:
            return y_0 + (y_1 - y_0) * (x - x_0) / (x_1 - x_0)
    return math.nan


def crossing(small: Curve, large: Curve) -> float | None:
    """Where `large`, above `small` at first, falls below it; None if it never does."""
    gaps = [(x, at(small, x) - at(large, x)) for x in sorted({x for x, _ in (*small, *large)})]
    # Both are straight between these x, so the sign of the gap tells; NaN compares as false.
    for (x_0, gap_0), (x_1, gap_1) in pairwise(gaps):
        if gap_0 < 0 <= gap_1:
            return x_0 + (x_1 - x_0) * gap_0 / (gap_0 - gap_1)
    return None


def log_curve(rows: Rows, **wanted) -> Curve:
    points = study.over_seeds(select(rows, epoch=None, **wanted), study.training_compute)
    return [(math.log(x), math.log(mean)) for x, mean, _, _ in points]


def crossing_lines(rows: Rows) -> list[tuple[str, ...]]:
    """A table of the neighbours in size or in patch; the one of fewer flops comes first."""
    curves = {name: curve for name in FAMILY
              if name != IMPOSSIBLE and (curve := log_curve(rows, model=name))}
    seeds = {name: sorted({row["seed"] for row in select(rows, model=name, epoch=None)})
             for name in curves}
    pairs = [(f"{a}/{patch}", f"{b}/{patch}") for patch in PATCHES
             for a, b in pairwise(study.SIZES)]
    pairs += [(f"{size}/{a}", f"{size}/{b}") for size in study.SIZES for a, b in pairwise(PATCHES)]
    lines = []
    for small, large in (pair for pair in pairs if curves.keys() >= set(pair)):
        x, (end, fid) = crossing(curves[small], curves[large]), curves[small][-1]
        meet = ("not yet", "") if x is None else (f"{math.exp(x):.1e}",
                                                  f"{math.exp(at(curves[small], x)):.1f}")
        of_seeds = [crossing(log_curve(rows, model=small, seed=a),
                             log_curve(rows, model=large, seed=b))
                    for a, b in product(seeds[small], seeds[large])]
        crossed = f"{sum(x is not None for x in of_seeds)} of {len(of_seeds)}"
        lines.append((small, large, *meet, crossed, f"{math.exp(end):.1e}", f"{math.exp(fid):.2f}",
                      f"{math.exp(at(curves[large], end)):.2f}"))
    return lines
