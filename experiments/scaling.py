"""The pictures of how the twelve models scale: Figures 6, 8, 9, 10, 12 and 13 of the paper."""

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullFormatter

from config import FAMILY
from experiments.drawing import (
    COLORS,
    FONT,
    MARKERS,
    curve,
    curves,
    finish,
    found,
    legend_outside,
    new_figure,
    real_line,
    steps,
    style,
    varied,
)
from experiments.fits import Line, correlation_interval, logs
from experiments.paper import TABLE_4
from experiments.rows import METRICS, Rows
from experiments.study import (
    CURVE_IMAGES,
    FINAL_IMAGES,
    IMPOSSIBLE,
    LONG,
    PATCHES,
    SIZES,
    at_the_end,
    over_seeds,
    select,
    training_compute,
)

STEPS_LABEL = "training steps (thousands)"
FLOPS_LABEL = "flops of a forward pass (multiply-adds)"
LOSSES = (0.02, 0.025, 0.03, 0.04, 0.06)  # ticks
LARGE_PATCHES_FIRST = sorted(FAMILY, key=lambda name: -FAMILY[name].patch_size)  # none is hidden


def figure6(rows: Rows) -> Figure:
    """FID against steps: a panel for each patch size above, for each size of the network below."""
    mine = found(select(rows, epoch=None))
    figure = new_figure(9, 6)
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    panels = [*(f"patch {patch}" for patch in PATCHES), "", *(f"size {size}" for size in SIZES)]
    for axes, panel in zip(grid.flat, panels, strict=True):
        if panel:
            # Of "patch 4" or "size B", the second word is half of a model's name.
            inside = [row for row in mine if panel.split()[1] in row["model"].split("/")]
            curves(axes, inside, steps)
            finish(axes, title=panel, xticks=(2, 4, 6, 8, 10))
            axes.label_outer()
        else:  # the place of the legend
            axes.set_axis_off()
    # No panel holds all twelve models, so the legend collects them.
    handles = {label: handle for axes in grid.flat
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in FAMILY if name in handles]
    grid[0, 3].legend([handles[name] for name in names], names, loc="center", fontsize=FONT,
                      ncols=2, frameon=False)
    figure.supxlabel(STEPS_LABEL, fontsize=FONT)
    return figure


def power_law(axes: Axes, models: dict[str, tuple[float, float]]) -> str:
    """The line log FID = a + b log flops with its 95% band; what it says, for the title.

    models: flops and FID by name.
    """
    if len(models) < 5:  # too few for a band
        return ""
    flops, fid = (logs(values) for values in zip(*models.values(), strict=True))
    line, (r, low, high) = Line(fid, flops), correlation_interval(flops, fid)
    # Evenly spaced logarithms, for a smooth band
    x = [min(flops) + (max(flops) - min(flops)) * i / 50 for i in range(51)]
    y, width = zip(*(line.at(at) for at in x), strict=True)
    x = [math.exp(at) for at in x]
    axes.plot(x, [math.exp(at) for at in y], color="0.3", linewidth=1)
    axes.fill_between(x, [math.exp(at - w) for at, w in zip(y, width, strict=True)],
                      [math.exp(at + w) for at, w in zip(y, width, strict=True)],
                      color="0.5", alpha=0.2, linewidth=0)
    least, most = line.interval(1)
    return (f"FID ~ flops$^{{{line.coefficient(1)[0]:.2f}}}$ ({least:.2f} to {most:.2f})\n"
            f"correlation {r:.2f} ({low:.2f} to {high:.2f})")


def key(figure: Figure, real: list) -> None:
    """What colours and markers mean, for pictures of our models and of the paper's."""
    dots = [Line2D([], [], color=COLORS[size], marker="o", linestyle="") for size in SIZES]
    shapes = [Line2D([], [], color="0.3", marker=MARKERS[patch], linestyle="")
              for patch in PATCHES]
    lines = [(Line2D([], [], color="0.3", linewidth=1), Patch(color="0.5", alpha=0.2))]  # one entry
    names = [*SIZES, "patch 7 (8)", "patch 4", "patch 2", "fit, 95% band", "real images"]
    figure.legend([*dots, *shapes, *lines, *real], names[:8 + len(real)],
                  loc="outside right center", fontsize=FONT - 1)


def figure8(rows: Rows) -> Figure:
    """FID at the end against flops, ours and the paper's, with fitted power laws.

    S/7 is drawn, but not fitted: it cannot predict noise. Bars span the seeds.
    """
    mine = found(select(rows, n=FINAL_IMAGES))
    figure = new_figure(9, 4)
    ours, papers = figure.subplots(1, 2)
    for name in LARGE_PATCHES_FIRST:
        for x, mean, least, greatest in over_seeds([row for row in mine if row["model"] == name],
                                                   lambda row: row["multiply_adds"]):
            ours.errorbar(x, mean, [[mean - least], [greatest - mean]], color=style(name)["color"],
                          marker=style(name)["marker"], capsize=3 if greatest > least else 0,
                          markerfacecolor="white" if name == IMPOSSIBLE else None)
            if name == IMPOSSIBLE:
                ours.annotate("S/7, left out", (x, mean), xytext=(8, 0), va="center",
                              textcoords="offset points", fontsize=FONT - 1)
    models = {name: (1e9 * gflops, fid) for name, (gflops, _, fid) in TABLE_4.items()}
    for name, point in sorted(models.items(), key=lambda model: model[0][-1], reverse=True):
        size, patch = name.split("/")
        papers.plot(*point, color=COLORS[size], marker=MARKERS[min(int(patch), 7)])  # 8: our 7
    real_line(ours, rows, FINAL_IMAGES)
    laws = power_law(ours, at_the_end(rows, "multiply_adds", "FID")), power_law(papers, models)
    for axes, whose, law in zip((ours, papers), ("MNIST", "the paper"), laws, strict=True):
        finish(axes, f"FID, {FINAL_IMAGES:,} images", xlabel=FLOPS_LABEL, xscale="log")
        axes.set_title(f"{whose}: {law}", fontsize=FONT)
    papers.set_ylabel("Inception FID")
    key(figure, ours.get_legend_handles_labels()[0])
    return figure


def figure9(rows: Rows) -> Figure:
    """FID against training compute. Curves cross where a larger model overtakes a smaller one.

    Pale lines: the longer runs of muon-long.
    """
    mine = found(select(rows, epoch=None))
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    curves(axes, mine, training_compute)
    for name in LONG:
        curve(axes, select(rows, model=name, epoch=None, recipe="muon-long"), training_compute,
              **style(name), alpha=0.5)
    real_line(axes, rows, CURVE_IMAGES)
    finish(axes, xlabel="training compute (multiply-adds)", xscale="log")
    return legend_outside(figure)


def figure10(rows: Rows) -> Figure:
    """FID against sampling compute: each line has 10 to 1000 steps of DDIM."""
    mine = varied(select(rows, sampling_steps=None, seed=0), "sampling_steps")
    figure = new_figure(8, 4.6)
    axes = figure.subplots()
    curves(axes, mine, lambda row: row["multiply_adds"] * row["sampling_steps"])
    real_line(axes, rows, CURVE_IMAGES)
    finish(axes, xlabel="sampling compute per image (multiply-adds)", xscale="log")
    return legend_outside(figure)


def figure12(rows: Rows) -> Figure:
    """Six metrics at the end against flops, S/7 left out."""
    models = at_the_end(rows, "multiply_adds", *METRICS)
    found(list(models))
    figure = new_figure(9, 5.4)
    for axes, (i, metric) in zip(figure.subplots(2, 3, sharex=True).flat,
                                 enumerate(METRICS, 1), strict=True):
        for name in (name for name in LARGE_PATCHES_FIRST if name in models):
            values = models[name]
            axes.plot(values[0], values[i], color=style(name)["color"], linestyle="",
                      marker=style(name)["marker"], label=name)
        real_line(axes, rows, FINAL_IMAGES, metric)
        if len(models) > 4:
            flops, scores = zip(*((values[0], values[i]) for values in models.values()),
                                strict=True)
            axes.set_title(f"correlation {statistics.correlation(logs(flops), scores):.2f}",
                           fontsize=FONT)
        finish(axes, metric, xscale="log", yscale="linear")
    figure.supxlabel(FLOPS_LABEL, fontsize=FONT)
    return legend_outside(figure)


def figure13(rows: Rows) -> Figure:
    """Test loss against steps, and FID against test loss, S/7 left out."""
    mine = found([row for row in select(rows, epoch=None) if row["model"] != IMPOSSIBLE])
    figure = new_figure(9, 4.4)
    left, right = figure.subplots(1, 2)
    curves(left, mine, steps, "test_loss")
    finish(left, "test loss (squared error of eps)", xlabel=STEPS_LABEL)
    for name in FAMILY:
        # Points of one model only, in the order of training
        points = sorted((row["epoch"], row["test_loss"], row["FID"]) for row in mine
                        if row["model"] == name)
        if points:
            _, losses, fids = zip(*points, strict=True)
            right.plot(losses, fids, color=style(name)["color"], marker=style(name)["marker"],
                       linestyle="", markersize=4)
    finish(right, xlabel="test loss (squared error of eps)", xscale="log")
    for axis in (left.yaxis, right.xaxis):  # less than a decade: few of tidy's ticks would be left
        axis.set_major_locator(FixedLocator(LOSSES))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    return legend_outside(figure)
