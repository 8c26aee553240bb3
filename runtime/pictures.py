"""One style for all pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from runtime.files import write_atomically

GAP, ZOOM = 2, 2  # pixels between two images; screen pixels per pixel
DPI = 128  # a power of two: pixels / DPI * DPI is exact, so that no row of pixels is lost


def save_picture(path: Path, make: Callable[[], Figure]) -> None:
    """Make a figure and write it. Atomic; OSError if it fails."""
    write_atomically(path, lambda temporary: make().savefig(temporary))


def denser_at_the_end(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, in order, denser towards the last, which is one of them."""
    count, n = min(count, len(values)), len(values) - 1
    places = [round(n * (i / max(count - 1, 1)) ** 1.75) for i in range(count)]
    # max: distinct values, even where the power rounds two places to one
    return [values[n - max(i, place)] for i, place in reversed(list(enumerate(places)))]


def tile(rows: Sequence[Tensor]) -> Tensor:
    """Rows of images, each (columns, 1, H, W) in [-1, 1], on one white canvas."""
    images = torch.stack(list(rows))[:, :, 0].clamp(-1, 1)  # (rows, columns, H, W)
    framed = F.pad(images, (0, GAP, 0, GAP), value=1.0)
    return framed.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def show(rows: Sequence[Tensor], columns: Sequence[str] = (), labels: Sequence[str] = ()) -> Figure:
    """A `tile` of images. columns, labels: the names of columns and rows."""
    canvas, side = tile(rows), rows[0].shape[-1] + GAP
    height, width = (ZOOM * size for size in canvas.shape)
    left, top = 10 + 9 * max(map(len, labels), default=0), 24 if columns else 0  # screen pixels
    full_width, full_height = left + width, top + height
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI)
    axes = figure.add_axes((left / full_width, 0, width / full_width, height / full_height))
    axes.imshow(canvas.numpy(), cmap="gray", vmin=-1, vmax=1, aspect="auto", origin="upper",
                interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
    axes.set_xticks([(i + 0.5) * side for i in range(len(columns))], labels=columns)
    axes.set_yticks([(i + 0.5) * side for i in range(len(labels))], labels=labels)
    return figure


def save_animation(path: Path, frames: Sequence[Sequence[Tensor]], titles: Sequence[str]) -> None:
    """A GIF of frames, each a `tile` under its title, with a pause on the last one. Atomic."""
    pictures = []
    for rows, title in zip(frames, titles, strict=True):
        greys = as_bytes(((tile(rows) + 1) * 3.5).round() / 3.5 - 1)  # 8: noise compresses badly
        pixels = greys.repeat_interleave(ZOOM, 0).repeat_interleave(ZOOM, 1)
        picture = Image.new("L", (pixels.shape[1], pixels.shape[0] + 14), 255)
        picture.paste(Image.fromarray(pixels.numpy()), (0, 14))
        ImageDraw.Draw(picture).text((2, 1), title, fill=0)
        pictures.append(picture)
    milliseconds = [125] * (len(pictures) - 1) + [2500]
    write_atomically(path, lambda temporary: pictures[0].save(
        temporary, "GIF", save_all=True, append_images=pictures[1:], loop=0, duration=milliseconds))


def loss_curve(curve: list[dict], ylabel: str, weighted: str) -> Figure:
    """Both losses of loss.csv against the epoch. weighted: what to say of the training loss."""
    figure = Figure(figsize=(6, 3.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name, label in (("train_loss", f"training images{weighted}"),
                        ("test_loss", "test images, EMA model, unweighted")):
        x, y = zip(*((row["epoch"], row[name]) for row in curve), strict=True)
        axes.plot(x, y, ".-", markersize=3, label=label)
    axes.set(xlabel="epoch", ylabel=ylabel, yscale="log")
    tidy(axes, 1, 2, 3, 4, 6)
    axes.legend()
    return figure


def tidy(axes: Axes, *ticks: int) -> None:
    """A faint grid and small labels; plain numbers on a logarithmic y axis, at ticks x 10^n."""
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def as_bytes(images: Tensor) -> Tensor:
    """Values in [-1, 1] as uint8 in [0, 255]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
