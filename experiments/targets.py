"""Our own question: what should a narrow token predict? Its picture."""

from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from config import FAMILY
from experiments.drawing import FONT, curve, finish, found, new_figure, real_line, show_digits
from experiments.rows import Rows
from experiments.study import FINAL_IMAGES, IMPOSSIBLE, PATCHES, Network, select
from experiments.tables import least_loss

TARGETS = {"eps": {"color": "#0072B2", "marker": "o"},
           "v": {"color": "#009E73", "marker": "^", "fillstyle": "none", "zorder": 3},
           "x_0": {"color": "#D55E00", "marker": "s"}}  # what the output is read as


def width_per_value(row: dict) -> float:
    """The width of a token over the values of its patch: below 1, it cannot hold the noise."""
    return FAMILY[row["model"]].hidden_size / FAMILY[row["model"]].patch_size ** 2


def narrow(rows: Rows, samples: Path) -> Figure:
    """FID, accuracy and test loss of eps, v and x_0 against the width of a token; S/7's digits.

    rows: of runs.csv; samples: the directory of the strips of ten digits.
    """
    mine = found(select(rows, predicts=None, n=FINAL_IMAGES))
    figure = new_figure(9, 4.6)
    grid = figure.add_gridspec(2, 3, height_ratios=(3.2, 1))
    for column, name in enumerate(("FID", "accuracy", "test_loss")):
        axes = figure.add_subplot(grid[0, column])
        for (target, line), patch in product(TARGETS.items(), PATCHES):
            some = [row for row in mine if (row["predicts"], FAMILY[row["model"]].patch_size)
                    == (target, patch)]
            curve(axes, some, width_per_value, name, **line,
                  label=target if patch == PATCHES[0] else None)  # a line for each patch size
        if name == "test_loss":
            axes.hlines(least_loss(FAMILY[IMPOSSIBLE]), 0.5, 0.9, color="black", linestyle="--",
                        label="least for eps, S/7")
            axes.set_ylim(0.02, 0.5)
        else:
            real_line(axes, rows, FINAL_IMAGES, name)
        if name == "FID":  # which line is whose
            for row in select(mine, n=FINAL_IMAGES, seed=0):
                if row["model"].startswith("S/"):
                    axes.annotate(f"patch {row['model'][-1]}", (width_per_value(row), row[name]),
                                  xytext=(7, 0), textcoords="offset points", fontsize=FONT - 2)
        # Ticks at plain numbers
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.5, 30)
        finish(axes, name.replace("_", " "), xlabel="width of a token / values of a patch")
        axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8, 16]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=FONT - 2)
    for column, target in enumerate(TARGETS):
        axes = figure.add_subplot(grid[1, column])
        show_digits(axes, samples / f"{Network(IMPOSSIBLE, predicts=target).name}.png")
        axes.set_title(f"S/7 predicts {target}", fontsize=FONT)
    return figure
