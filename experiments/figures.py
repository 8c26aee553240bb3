"""Draw every picture of the report, and its tables, from results/ alone.

    python -m experiments.figures

A picture that has no rows yet is left out, with one line that says so.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from config import BLOCKS, FAMILY
from experiments.drawing import (
    COLORS,
    FONT,
    MARKERS,
    NothingToDrawError,
    curve,
    curves,
    finish,
    found,
    legend_outside,
    new_figure,
    real_line,
    show_digits,
    steps,
    varied,
)
from experiments.median import median
from experiments.rows import Rows, read
from experiments.scaling import (
    STEPS_LABEL,
    figure6,
    figure8,
    figure9,
    figure10,
    figure12,
    figure13,
)
from experiments.study import (
    CURVE_IMAGES,
    GUIDED,
    PATCHES,
    SIZES,
    TABLE,
    Network,
    current,
    select,
)
from experiments.tables import all_tables
from experiments.targets import narrow
from runtime.files import write_atomically
from runtime.pictures import save_picture
from runtime.script import exit_status

PARTS = {  # of adaLN-Zero, by recipe: label, colour and marker
    "muon-zero": ("adaLN, starts at zero", "#56B4E9", "<"),
    "muon-xavier": ("adaLN-Zero, starts as xavier", "#D55E00", "s"),
    "muon-gate-1": ("adaLN-Zero, gates start at 1", "black", "P")}


def figure5(rows: Rows) -> Figure:
    """FID against steps: the four block designs; gates and a start at zero, separately."""
    mine = found(select(rows, model="B/4", block=None, epoch=None))
    figure = new_figure(10, 4.4)
    designs, parts = figure.subplots(1, 2, sharey=True)
    designs.set_title("four block designs", fontsize=FONT)
    parts.set_title("gates and a start at zero, separately", fontsize=FONT)
    for block in BLOCKS:
        of_block = [row for row in mine if row["block"] == block]
        # Both adaLN designs are in both panels, to compare with
        for axes in (designs, parts) if block.startswith("adaLN") else (designs,):
            curve(axes, of_block, steps, color=COLORS[block], marker=MARKERS[block], label=block)
    for recipe, (label, color, marker) in PARTS.items():
        of_part = select(rows, model="B/4", block=None, epoch=None, recipe=recipe)
        curve(parts, of_part, steps, color=color, marker=marker, label=label)
    for axes in (designs, parts):
        finish(axes, xlabel=STEPS_LABEL)
        axes.label_outer()
        axes.legend(fontsize=FONT)
    return figure


def figure7(samples: Path) -> Figure:
    """Samples from the same noise: larger networks downwards, smaller patches to the right.

    samples: the directory of the strips, ten digits of 28 x 28 side by side in each.
    """
    figure = new_figure(9, 5.6)
    paths = {name: samples / f"{Network(name).name}.png" for name in FAMILY}
    found([path for path in paths.values() if path.exists()])
    panels = figure.subplots(len(SIZES), len(PATCHES)).flat
    for axes, (name, path) in zip(panels, paths.items(), strict=True):
        axes.set_title(name, fontsize=FONT + 1)
        show_digits(axes, path)
    return figure


def guidance(rows: Rows) -> Figure:
    """FID, precision and recall against the strength of guidance (1: none), of seed 0."""
    mine = varied([row for row in select(rows, guidance=None, seed=0) if row["model"] in GUIDED],
                  "guidance")
    figure = new_figure(9, 3.2)
    panels = zip(figure.subplots(1, 3), ("FID", "precision", "recall"), strict=True)
    for axes, name in panels:
        curves(axes, mine, lambda row: row["guidance"], name)
        real_line(axes, rows, CURVE_IMAGES, name)
        finish(axes, name, xlabel="guidance strength")
    return legend_outside(figure)


def draw(rows: Rows, folder: Path) -> None:
    """All pictures and tables.md into `folder`, which holds samples/. OSError if it cannot."""
    pictures = {make.__name__: make for make in (figure5, figure6, figure8, figure9, figure10,
                                                 figure12, figure13, guidance)}
    # These need more than the rows.
    pictures |= {"figure7": lambda rows: figure7(folder / "samples"),
                 "narrow": lambda rows: narrow(rows, folder / "samples"),
                 "median": lambda rows: median(folder / "median.json")}
    for name, make in pictures.items():
        try:
            save_picture(folder / f"{name}.png", lambda make=make: make(rows))
        except NothingToDrawError as reason:
            print(f"{name}.png: left out, {reason}")
        else:
            print(f"wrote {folder / name}.png")
    write_atomically(folder / "tables.md", lambda path: path.write_text(all_tables(rows)))
    print(f"wrote {folder / 'tables.md'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("experiments.figures", allow_abbrev=False,
                                     description="Draw the report's pictures and tables.")
    parser.parse_args(argv)
    return exit_status(parser, lambda: draw(current(read(TABLE)), TABLE.parent))


if __name__ == "__main__":
    sys.exit(main())
