"""Draw every picture of the report, and its tables, from results/runs.csv and the strips of results/samples/ alone.

    python -m experiments.figures

A picture that has no rows yet is left out, with one line that says so.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from config import BLOCKS, FAMILY
from experiments.study import (
    CURVE_IMAGES,
    FINAL_IMAGES,
    GUIDED,
    IMPOSSIBLE,
    PATCHES,
    REAL,
    SIZES,
    TABLE,
    Network,
    Rows,
    over_seeds,
    read,
    select,
    training_compute,
)
from experiments.tables import all_tables
from runtime.files import write_atomically
from runtime.pictures import DPI, save_picture, tidy, tile
from runtime.script import exit_status, run_script

COLORS = dict(zip((*BLOCKS, *SIZES), ("C7", "C1", "C2", "C0", "C0", "C1", "C2", "C3"), strict=True))
MARKERS = dict(zip(PATCHES, "s^o", strict=True))
LINES = dict(zip(PATCHES, (":", "--", "-"), strict=True))
LABELS = {7: (16, 0), 4: (-16, 0), 2: (0, -10)}  # offsets, so that labels of models with equal compute do not overlap


class NothingToDraw(Exception):
    """No row of the table belongs in this picture."""


def found(rows: Rows) -> Rows:
    if not rows:
        raise NothingToDraw("there is no row for it yet")
    return rows


def varied(rows: Rows, column: str) -> Rows:
    """The rows, if they differ in this column: a picture against it needs two points."""
    return found(rows if len({row[column] for row in rows}) > 1 else [])


def curve(axes: Axes, rows: Rows, x: Callable[[dict], float], y: str = "FID", **style) -> None:
    """The mean over seeds, with a band from the least to the greatest."""
    if rows:
        at, mean, least, greatest = zip(*over_seeds(rows, x, y), strict=True)
        axes.plot(at, mean, markersize=4, linewidth=1.2, **style)
        axes.fill_between(at, least, greatest, color=style["color"], alpha=0.2, linewidth=0)


def real_line(axes: Axes, rows: Rows, n: int, y: str = "FID") -> None:
    for row in rows:
        if (row["run"], row["n"]) == (REAL, n):
            axes.axhline(row[y], color="black", linestyle="-.", linewidth=1, label=REAL)


def finish(axes: Axes, ylabel: str = "FID", **labels) -> None:
    """Labels, ticks and grid; FID on a logarithmic axis."""
    axes.set(ylabel=ylabel, yscale="log" if ylabel == "FID" else "linear", **labels)
    tidy(axes, 1, 2, 5)


def steps(row: dict) -> float:
    return row["step"] / 1000


def sampling_compute(row: dict) -> float:
    return row["multiply_adds"] * row["sampling_steps"]


def patch_of(name: str) -> int:
    return FAMILY[name].patch_size


def figure5(rows: Rows) -> Figure:
    """FID against steps, the four block designs."""
    mine = found(select(rows, model="B/4", block=None, epoch=None))
    figure = Figure(figsize=(6, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for block in BLOCKS:
        curve(axes, [row for row in mine if row["block"] == block], steps, color=COLORS[block], marker="o", label=block)
    real_line(axes, rows, CURVE_IMAGES)
    seeds = sorted({len({row["seed"] for row in mine if row["block"] == block}) for block in BLOCKS})
    title = f"B/4, seeds: {' or '.join(map(str, seeds))}, images per point: {CURVE_IMAGES:,}"
    finish(axes, title=title, xlabel="training steps (thousands)")
    axes.legend()
    return figure


def figure6(rows: Rows) -> Figure:
    """FID against steps, the twelve models: at each patch size above, at each size of the network below."""
    mine = found(select(rows, epoch=None))
    figure = Figure(figsize=(9, 5.5), dpi=DPI, layout="constrained")
    for part, panels, inside in zip(figure.subfigures(2, 1), (PATCHES, SIZES), (SIZES, PATCHES), strict=True):
        for axes, panel in zip(part.subplots(1, len(panels), sharex=True, sharey=True), panels, strict=True):
            for one in inside:
                size, patch = (one, panel) if panels is PATCHES else (panel, one)
                curve(axes, [row for row in mine if row["model"] == f"{size}/{patch}"], steps, color=COLORS[size],
                      marker=MARKERS[patch], linestyle=LINES[patch], label=f"{size}/{patch}")
            finish(axes, title=f"patch {panel}" if panels is PATCHES else f"size {panel}",
                   xlabel="training steps (thousands)")
            axes.label_outer()
            if axes.lines:
                axes.legend(fontsize=7)
    return figure


def figure7(samples: Path) -> Figure:
    """Samples of the twelve models from the same noise: larger networks downwards, smaller patches to the right."""
    figure = Figure(figsize=(9, 5.4), dpi=DPI, layout="constrained")
    paths = {name: samples / f"{Network(name).name}.png" for name in FAMILY}
    found([path for path in paths.values() if path.exists()])
    for axes, (name, path) in zip(figure.subplots(len(SIZES), len(PATCHES)).flat, paths.items(), strict=True):
        axes.set_axis_off()
        axes.set_title(name, fontsize=9)
        if path.exists():
            digits = torch.stack(pil_to_tensor(Image.open(path)).chunk(10, dim=2)) / 127.5 - 1  # (10, 1, H, W)
            axes.imshow(tile(digits.split(5)).numpy(), cmap="gray", vmin=-1, vmax=1)
        else:
            axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes)
    return figure


def correlation(points: Iterable[tuple[float, float]]) -> float:
    """Pearson's, of the logarithms of both."""
    return statistics.correlation(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True))


def figure8(rows: Rows) -> Figure:
    """FID at the end against the multiply-adds of a forward pass, and against the parameters."""
    mine = found(select(rows, n=FINAL_IMAGES))
    figure = Figure(figsize=(9, 4), dpi=DPI, layout="constrained")
    for axes, column, xlabel in zip(figure.subplots(1, 2, sharey=True), ("multiply_adds", "parameters"),
                                    ("multiply-adds of a forward pass", "trainable parameters"), strict=True):
        points = {}
        for name in sorted(FAMILY, key=patch_of, reverse=True):  # squares first: triangles leave some of them in sight
            of_model = [row for row in mine if row["model"] == name]
            for x, mean, least, greatest in over_seeds(of_model, lambda row, column=column: row[column]):
                points[name], color = (x, mean), COLORS[name.split("/")[0]]
                axes.errorbar(x, mean, [[mean - least], [greatest - mean]], color=color, marker=MARKERS[patch_of(name)],
                              markerfacecolor="white" if name == IMPOSSIBLE else None,
                              capsize=3 if greatest > least else 0)
                axes.annotate(name, (x, mean), xytext=LABELS[patch_of(name)], textcoords="offset points", fontsize=8,
                              ha="center", va="center", color=color)
        real_line(axes, rows, FINAL_IMAGES)
        kept = [point for name, point in points.items() if name != IMPOSSIBLE]
        title = f"correlation of the logarithms {correlation(kept):.3f}, without {IMPOSSIBLE}" if len(kept) > 5 else ""
        axes.set_title(title, fontsize=10)
        finish(axes, xlabel=xlabel, xscale="log")
        axes.margins(x=0.15)
        axes.label_outer()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")
    return figure


def against_compute(rows: Rows, x: Callable[[dict], float], xlabel: str) -> Figure:
    """FID against some compute, a line for each model."""
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name in FAMILY:
        curve(axes, [row for row in rows if row["model"] == name], x, color=COLORS[name.split("/")[0]],
              marker=MARKERS[patch_of(name)], linestyle=LINES[patch_of(name)], label=name)
    finish(axes, xlabel=xlabel, xscale="log")
    return figure


def legend_outside(figure: Figure) -> Figure:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def figure9(rows: Rows) -> Figure:
    """FID against training compute."""
    figure = against_compute(found(select(rows, epoch=None)), training_compute, "multiply-adds of training")
    real_line(figure.axes[0], rows, CURVE_IMAGES)
    return legend_outside(figure)


def figure10(rows: Rows) -> Figure:
    """FID against sampling compute."""
    mine = varied(select(rows, sampling_steps=None, seed=0), "sampling_steps")
    figure = against_compute(mine, sampling_compute, "multiply-adds per sampled image")
    real_line(figure.axes[0], rows, CURVE_IMAGES)
    return legend_outside(figure)


def guidance(rows: Rows) -> Figure:
    """FID, precision and recall against the strength of guidance."""
    mine = varied([row for row in select(rows, guidance=None, seed=0) if row["model"] in GUIDED], "guidance")
    figure = Figure(figsize=(9, 3), dpi=DPI, layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("FID", "precision", "recall"), strict=True):
        for model in GUIDED:
            curve(axes, [row for row in mine if row["model"] == model], lambda row: row["guidance"], name,
                  color=COLORS[model.split("/")[0]], marker="o", label=model)
        real_line(axes, rows, CURVE_IMAGES, name)
        finish(axes, xlabel="guidance", ylabel=name)
    return legend_outside(figure)


def draw(rows: Rows, folder: Path) -> None:
    """All pictures and tables.md into `folder`, which holds samples/. OSError with a sentence if one cannot be written."""
    pictures = {make.__name__: make for make in (figure5, figure6, figure8, figure9, figure10, guidance)}
    for name, make in (pictures | {"figure7": lambda rows: figure7(folder / "samples")}).items():
        try:
            save_picture(folder / f"{name}.png", lambda make=make: make(rows))
        except NothingToDraw as reason:
            print(f"{name}.png: left out, {reason}")
        else:
            print(f"wrote {folder / name}.png")
    write_atomically(folder / "tables.md", lambda path: path.write_text(all_tables(rows)))
    print(f"wrote {folder / 'tables.md'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("experiments.figures", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.parse_args(argv)
    return exit_status(parser, lambda: draw(read(TABLE), TABLE.parent))


if __name__ == "__main__":
    sys.exit(run_script(main))
