"""The time of a training step compared with its roofline (see benchmarks/measure.py).

    python -m benchmarks.training --batch-size 300
    python -m benchmarks.training --batch-size 64 --scaling assets/step_time.png
"""

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.measure import about, medians
from config import FAMILY, ModelConfig, TrainConfig
from dataset import Digits
from diffusion import GaussianDiffusion
from dit import DiT
from runtime.flops import arithmetic
from runtime.pictures import DPI, save_picture, tidy
from runtime.script import pick_device
from runtime.speed import compiled, keep_freed_memory
from train import make_optimizers, update_ema

IN_A_ROW = 20  # steps per measurement: as in a training run, each finds the caches as the one before it left them


def training_step(cfg: TrainConfig, device: torch.device, fast: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """The loop of train.py without its bookkeeping, as a call; and its forward and backward pass alone."""
    torch.manual_seed(0)
    model = DiT(cfg.model).to(device)
    ema, optimizers, diffusion = copy.deepcopy(model), make_optimizers(model, cfg), GaussianDiffusion()
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (4 * cfg.batch_size, 1, 28, 28), dtype=torch.uint8, device=device)
    data = Digits(images, torch.arange(len(images), device=device) % 10)
    index = torch.randperm(len(data), device=device)[:cfg.batch_size]
    network = compiled(model, cfg.batch_size) if fast else model

    def gradients() -> None:
        x_0, y = data[index]
        t, eps = diffusion.draw_t_and_eps(x_0, generator)
        y = model.y_embedder.drop(y, generator)
        diffusion.loss(network, x_0, y, t, eps, cfg.loss, cfg.min_snr).backward()

    def step() -> None:
        gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(ema, model, cfg.ema_decay)

    return step, gradients


def measure(cfg: TrainConfig, device: torch.device, rounds: int, kinds: list[str]) -> tuple[dict[str, float], float, int]:
    """Seconds per step of each kind, the roofline in seconds, and the operations per step."""
    steps = {kind: training_step(cfg, device, fast=kind == "compiled")[0] for kind in kinds}
    flops = arithmetic(training_step(cfg, device, fast=False)[1])
    times, rate = medians(device, steps, rounds, IN_A_ROW)
    return times, flops / rate, flops


def step_time(points: list[tuple[str, int, float, float]]) -> Figure:
    """Time per step against arithmetic, and the roofline. points: name, operations, seconds, roofline in seconds."""
    figure = Figure(figsize=(6, 4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    names, flops, times, rooflines = zip(*sorted(points, key=lambda point: point[1]), strict=True)
    gflops = [operations / 1e9 for operations in flops]
    axes.plot(gflops, [1000 * time for time in times], "o", label="training step")
    axes.plot(gflops, [1000 * time for time in rooflines], "-", color="grey", label="roofline")
    for name, x, time, after in zip(names, gflops, times, [*gflops[1:], math.inf], strict=True):
        side = -1 if after < 1.2 * x else 1  # of two close points, the first has its name on its left
        axes.annotate(name, (x, 1000 * time), xytext=(6 * side, 0), textcoords="offset points", fontsize=8, va="center",
                      ha="left" if side == 1 else "right")
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
    for name, default in (("batch-size", 300), ("hidden-size", ModelConfig.hidden_size), ("depth", ModelConfig.depth),
                          ("patch-size", ModelConfig.patch_size), ("rounds", 10)):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    add("--device", default="auto")
    add("--scaling", type=Path, metavar="FILE", help="measure the models of config.FAMILY instead, and plot their times")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        config = ModelConfig(hidden_size=args.hidden_size, depth=args.depth, patch_size=args.patch_size)
        models = FAMILY if args.scaling else {"": config}
        recipes = {name: TrainConfig(batch_size=args.batch_size, model=model) for name, model in models.items()}
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    print(f"{about(device)}, batches of {args.batch_size}")
    points = []
    for name, cfg in recipes.items():
        times, roofline, flops = measure(cfg, device, args.rounds, ["compiled"] if args.scaling else ["plain", "compiled"])
        print(f"{name:4} {flops / 1e9:.2f} GFLOP per step, roofline {1000 * roofline:.1f} ms at "
              f"{flops / roofline / 1e9:.0f} GFLOP/s")
        for kind, time in times.items():
            print(f"     {kind:9} {1000 * time:7.1f} ms per step, {time / roofline:.2f} x roofline", flush=True)
        points.append((name, flops, times["compiled"], roofline))
    if args.scaling:
        save_picture(args.scaling, lambda: step_time(points))


if __name__ == "__main__":
    main()
