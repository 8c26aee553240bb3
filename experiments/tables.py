"""The tables of the report, in Markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

from config import BLOCKS, FAMILY
from experiments import study
from experiments.study import CURVE_IMAGES, FINAL_IMAGES, REAL, Rows, select


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose header and lines are cells, already formatted."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def spread(values: list[float], form: str) -> str:
    """The mean, with the range if there are several values."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def final_table(rows: Rows) -> str:
    """Every network at its end, as in the paper's Table 4."""
    lines, groups = [], {}  # a group: the seeds of one network; in the order of the family, then of the paper's designs
    for row in select(rows, recipe=None, block=None, n=FINAL_IMAGES):
        groups.setdefault((row["model"], row["block"], row["recipe"]), []).append(row)
    for names, group in sorted(groups.items(), key=lambda one: (list(FAMILY).index(one[0][0]), BLOCKS.index(one[0][1]))):
        lines.append([*names, f"{group[0]['multiply_adds'] / 1e6:.2f}", f"{group[0]['parameters'] / 1e3:.1f}",
                      str(len(group)), spread([row["FID"] for row in group], ".2f"),
                      spread([100 * row["accuracy"] for row in group], ".2f"),
                      f"{group[0]['train_seconds'] / 60:.0f}"])
    # Real images stand for a perfect network: they have no cost.
    lines += [[REAL, *[""] * 5, f"{row['FID']:.2f}", f"{100 * row['accuracy']:.2f}", ""] for row in rows
              if (row["run"], row["n"]) == (REAL, FINAL_IMAGES)]
    return markdown(("model", "block", "recipe", "multiply-adds, M", "parameters, K", "seeds", "FID", "accuracy, %",
                     "minutes, first seed"), lines)


def guidance_table(rows: Rows) -> str:
    """Like the paper's Tables 2 and 3."""
    mine = [row for row in select(rows, guidance=None, seed=0) if row["model"] in study.GUIDED]
    mine += [row for row in rows if (row["run"], row["n"]) == (REAL, CURVE_IMAGES)]
    lines = [[row["model"] or REAL, "" if row["guidance"] is None else f"{row['guidance']:g}", f"{row['FID']:.2f}",
              f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{100 * row['accuracy']:.2f}"]
             for row in sorted(mine, key=lambda row: (row["model"] or "~", row["guidance"] or 0))]  # "~": real images last
    return markdown(("model", "guidance", "FID", "precision", "recall", "accuracy, %"), lines)


def rate_table(rows: Rows) -> str:
    """FID of the two networks whose learning rate was tried, after the epochs that all three rates have."""
    lines = [[row["model"], row["block"], row["recipe"], str(row["epoch"]), f"{row['FID']:.2f}"]
             for model, block in (("XL/4", "adaLN-Zero"), ("B/4", "in-context"))
             for recipe in ("muon-0.002", "muon", "muon-0.008")
             for row in select(rows, model=model, block=block, recipe=recipe, epoch=study.EPOCHS[2], seed=0)]
    return markdown(("model", "block", "recipe", "epochs", "FID"), lines)


Curve = Sequence[tuple[float, float]]  # logarithms of compute and of FID, the former rising


def at(curve: Curve, x: float) -> float:
    """Its value at x, on the line between two measured points; NaN outside them."""
    for (x_0, y_0), (x_1, y_1) in pairwise(curve):
        if x_0 <= x <= x_1:
            return y_0 + (y_1 - y_0) * (x - x_0) / (x_1 - x_0)
    return math.nan


def crossing(small: Curve, large: Curve) -> float | None:
    """Where `large`, which is above `small` at first, falls below it; None if it does not while both last."""
    gaps = [(x, at(small, x) - at(large, x)) for x in sorted({x for x, _ in (*small, *large)})]
    for (x_0, gap_0), (x_1, gap_1) in pairwise(gaps):  # straight in between; a comparison with NaN is false
        if gap_0 < 0 <= gap_1:
            return x_0 + (x_1 - x_0) * gap_0 / (gap_0 - gap_1)
    return None


def crossing_table(rows: Rows) -> str:
    """Figure 9: neighbours in size or in patch, and where the larger one's curve crosses the smaller one's."""
    curves = {name: [(math.log(x), math.log(mean)) for x, mean, _, _ in study.over_seeds(mine, study.training_compute)]
              for name in FAMILY if name != study.IMPOSSIBLE and (mine := select(rows, model=name, epoch=None))}
    # The one that costs fewer multiply-adds per image comes first.
    pairs = [(f"{a}/{patch}", f"{b}/{patch}") for patch in study.PATCHES for a, b in pairwise(study.SIZES)]
    pairs += [(f"{size}/{a}", f"{size}/{b}") for size in study.SIZES for a, b in pairwise(study.PATCHES)]
    lines = []
    for small, large in (pair for pair in pairs if curves.keys() >= set(pair)):
        x, (end, fid) = crossing(curves[small], curves[large]), curves[small][-1]
        meet = ("not yet", "") if x is None else (f"{math.exp(x):.1e}", f"{math.exp(at(curves[small], x)):.1f}")
        lines.append((small, large, *meet, f"{math.exp(end):.1e}", f"{math.exp(fid):.2f}",
                      f"{math.exp(at(curves[large], end)):.2f}"))
    return markdown(("smaller", "larger", "meet at", "FID there", "smaller ends at", "its FID", "FID of the larger there"),
                    lines)


def all_tables(rows: Rows) -> str:
    tables = {f"At the end of training, {FINAL_IMAGES:,} images": final_table,
              f"Guidance, {CURVE_IMAGES:,} images": guidance_table, f"Learning rate, {CURVE_IMAGES:,} images": rate_table,
              f"Equal training compute in multiply-adds, {CURVE_IMAGES:,} images": crossing_table}
    return "\n".join(f"## {title}\n\n{make(rows)}" for title, make in tables.items())
