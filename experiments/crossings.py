"""Figure 9: where the curves of two models cross, FID against training compute."""

import math
from collections.abc import Sequence
from itertools import pairwise, product

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
    pairs = [(f"{a}/{patch}", f"{b}/{patch}") for patch in PATCHES
             for a, b in pairwise(study.SIZES)]
    pairs += [(f"{size}/{a}", f"{size}/{b}") for size in study.SIZES for a, b in pairwise(PATCHES)]
    lines = [crossing_line(rows, *pair, recipe) for recipe in ("muon", "muon-long")
             for pair in pairs if IMPOSSIBLE not in pair]
    return [line for line in lines if line]


def crossing_line(rows: Rows, small: str, large: str, recipe: str) -> tuple[str, ...]:
    """The line of a pair, with this recipe of the smaller; () if one of them has no rows."""
    curves = [log_curve(rows, model=small, recipe=recipe), log_curve(rows, model=large)]
    if not all(curves):
        return ()
    x, (end, fid) = crossing(*curves), curves[0][-1]
    meet = ("not yet", "") if x is None else (f"{math.exp(x):.1e}",
                                              f"{math.exp(at(curves[0], x)):.1f}")

    def of_seeds(**wanted) -> list[Curve]:
        seeds = sorted({row["seed"] for row in select(rows, epoch=None, **wanted)})
        return [log_curve(rows, seed=seed, **wanted) for seed in seeds]

    found = [crossing(*pair) is not None for pair in
             product(of_seeds(model=small, recipe=recipe), of_seeds(model=large))]
    name, other = small if recipe == "muon" else f"{small}, longer", at(curves[1], end)
    return (name, large, *meet, f"{sum(found)} of {len(found)}", f"{math.exp(end):.1e}",
            f"{math.exp(fid):.2f}", "" if math.isnan(other) else f"{math.exp(other):.2f}")
