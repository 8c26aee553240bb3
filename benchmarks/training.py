"""The time of a training step compared with its roofline (see benchmarks/measure.py).

    python -m benchmarks.training --batch-size 300
    python -m benchmarks.training --batch-size 64 --scaling assets/step_time.png
"""

import argparse
import math
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.measure import about, medians
from config import FAMILY, ModelConfig, TrainConfig
from runtime.pictures import DPI, save_picture, tidy
from runtime.script import pick_device
from runtime.speed import keep_freed_memory

IN_A_ROW = 20  # steps per measurement: as in a run, each finds the caches that the last one left


def training_step(cfg: TrainConfig, fast: bool) -> Callable[[], object]:
    """A call of train.py's own step, taken from a run that ends before its first one."""
    taken, recorded = [], train.recorded

    def take(*arguments, **settings):
        taken.append(recorded(*arguments, **settings))
        raise KeyboardInterrupt

    with (TemporaryDirectory() as folder, patch.object(train, "recorded", take),
          redirect_stderr(StringIO()), suppress(KeyboardInterrupt)):
        train.train(replace(cfg, compile=fast, checkpoint=f"{folder}/model.pth"))
    index = torch.randperm(cfg.limit, device=cfg.device)[:cfg.batch_size]
    return lambda: taken[0](index, cfg.lr, cfg.ema_decay)


def measure(cfg: TrainConfig, rounds: int, kinds: list[str]) -> tuple[dict[str, float], float, int]:
    """Seconds per step of each kind, the roofline in seconds, and the operations per step."""
    steps = {kind: training_step(cfg, fast=kind == "compiled") for kind in kinds}
    # AdamW, so that the operations are the network's: Muon's products are no part of the roofline
    plain_step = training_step(replace(cfg, optimizer="adamw"), fast=False)
    with FlopCounterMode(display=False) as counter:
        plain_step()
    flops = counter.get_total_flops()
    times, rate = medians(torch.device(cfg.device), steps, rounds, IN_A_ROW)
    return times, flops / rate, flops


def times_figure(points: list[tuple[str, int, float, float]]) -> Figure:
    """Time per step against arithmetic, and the roofline.

    points: name, operations, seconds, roofline in seconds.
    """
    figure = Figure(figsize=(6, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names, flops, times, rooflines = zip(*sorted(points, key=lambda point: point[1]), strict=True)
    gflops = [operations / 1e9 for operations in flops]
    axes.plot(gflops, [1000 * time for time in times], "o", label="training step")
    axes.plot(gflops, [1000 * time for time in rooflines], "-", color="grey", label="roofline")
    for name, x, time, after in zip(names, gflops, times, [*gflops[1:], math.inf], strict=True):
        side = -1 if after < 1.2 * x else 1  # close points: the first has its name on its left
        axes.annotate(name, (x, 1000 * time), xytext=(6 * side, 0), textcoords="offset points",
                      fontsize=8, va="center", ha="left" if side == 1 else "right")
    axes.set(xscale="log", yscale="log", xlabel="GFLOP per step", ylabel="ms per step")
    axes.margins(x=0.1, y=0.1)
    axes.legend(loc="upper left")
    tidy(axes, 1)
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Time a training step, and compare with its roofline.", allow_abbrev=False)
    add = parser.add_argument
    for name, default in (("batch-size", 300), ("hidden-size", ModelConfig.hidden_size),
                          ("depth", ModelConfig.depth), ("rounds", 10)):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    add("--device", default="auto")
    add("--scaling", type=Path, metavar="FILE",
        help="measure the models of config.FAMILY instead, and plot their times")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        config = ModelConfig(hidden_size=args.hidden_size, depth=args.depth)
        models = FAMILY if args.scaling else {"": config}
        recipes = {name: TrainConfig(batch_size=args.batch_size, model=model, device=str(device),
                                     limit=4 * args.batch_size) for name, model in models.items()}
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    print(f"{about(device)}, batches of {args.batch_size}")
    kinds, points = ["compiled"] if args.scaling else ["plain", "compiled"], []
    for name, cfg in recipes.items():
        times, roofline, flops = measure(cfg, args.rounds, kinds)
        print(f"{name:4} {flops / 1e9:.2f} GFLOP per step, roofline {1000 * roofline:.1f} ms at "
              f"{flops / roofline / 1e9:.0f} GFLOP/s")
        for kind, time in times.items():
            print(f"     {kind:9} {1000 * time:7.1f} ms per step, "
                  f"{time / roofline:.2f} x roofline", flush=True)
        points.append((name, flops, times["compiled"], roofline))
    if args.scaling:
        save_picture(args.scaling, lambda: times_figure(points))


if __name__ == "__main__":
    main()
