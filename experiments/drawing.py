"""What the pictures share: colours, markers, a curve with its seeds, the line of real images."""

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from config import BLOCKS, FAMILY
from experiments.rows import REAL, Rows
from experiments.study import CURVE_IMAGES, PATCHES, SIZES, over_seeds
from runtime.pictures import DPI, tidy, tile

# Okabe and Ito's colours, which differ for colour-blind readers too. They serve twice: no picture
# has both designs and sizes.
COLORS = dict(zip((*BLOCKS, *SIZES), ("#CC79A7", "#E69F00", "#009E73", "#0072B2",
                                      "#0072B2", "#E69F00", "#009E73", "#D55E00"), strict=True))
MARKERS = dict(zip((*BLOCKS, *PATCHES), "Dv^os^o", strict=True))
LINES = dict(zip(PATCHES, (":", "--", "-"), strict=True))
FONT = 10


class NothingToDrawError(Exception):
    """No row of the table belongs in this picture."""


def found(rows: Rows) -> Rows:
    if not rows:
        raise NothingToDrawError("there is no row for it yet")
    return rows


def varied(rows: Rows, column: str) -> Rows:
    """The rows, if they differ in this column: a picture against it needs two points."""
    return found(rows if len({row[column] for row in rows}) > 1 else [])


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def style(name: str) -> dict:
    """Colour, marker and line of a model of FAMILY."""
    patch = FAMILY[name].patch_size
    return {"color": COLORS[name.split("/")[0]], "marker": MARKERS[patch],
            "linestyle": LINES[patch]}


def curve(axes: Axes, rows: Rows, x: Callable[[dict], float], y: str = "FID", **line) -> None:
    """The mean over seeds, with a band from the least to the greatest."""
    if rows:
        at, mean, least, greatest = zip(*over_seeds(rows, x, y), strict=True)
        axes.plot(at, mean, markersize=4, linewidth=1.2, **line)
        axes.fill_between(at, least, greatest, color=line["color"], alpha=0.2, linewidth=0)


def curves(axes: Axes, rows: Rows, x: Callable[[dict], float], y: str = "FID") -> None:
    """One line per model."""
    for name in FAMILY:
        curve(axes, [row for row in rows if row["model"] == name], x, y, label=name, **style(name))


def real_line(axes: Axes, rows: Rows, n: int, y: str = "FID") -> None:
    for row in rows:
        if (row["run"], row["n"]) == (REAL, n):
            axes.axhline(row[y], color="black", linestyle="-.", linewidth=1, label=REAL)


def show_digits(axes: Axes, path: Path) -> None:
    """The strip of ten digits of 28 x 28 in the file `path`, in two rows, if it is there."""
    axes.set_axis_off()
    if not path.exists():
        axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes)
        return
    strip = pil_to_tensor(Image.open(path)).chunk(10, dim=2)
    digits = torch.stack(strip) / 127.5 - 1  # (10, 1, H, W)
    axes.imshow(tile(digits.split(5)).numpy(), cmap="gray", vmin=-1, vmax=1)


def finish(axes: Axes, ylabel: str = f"FID, {CURVE_IMAGES:,} images", **labels) -> None:
    """Labels, ticks and grid; FID and losses on a logarithmic axis."""
    scale = "log" if ylabel.startswith(("FID", "test loss")) else "linear"
    axes.set(**{"ylabel": ylabel, "yscale": scale} | labels)
    tidy(axes, 1, 2, 5)
    axes.tick_params(labelsize=FONT - 1)


def legend_outside(figure: Figure) -> Figure:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=FONT - 1)
    return figure


def steps(row: dict) -> float:
    return row["step"] / 1000
