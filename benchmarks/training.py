"""The time of a training step beside its floor, the arithmetic at the rate of a large matrix product in the same run.

    python -m benchmarks.training --batch-size 300
    python -m benchmarks.training --batch-size 64 --scaling assets/scaling.png
"""

import argparse
import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.measure import IN_A_ROW, about, arithmetic, medians
from config import ModelConfig, T, TrainConfig, pick_device
from diffusion import GaussianDiffusion
from dit import DiT
from runtime.speed import compiled, keep_freed_memory, pieces
from train import add_gradients, make_optimizers, precision, update_ema

FAMILY = [(32, 2, 4), (64, 3, 7), (64, 3, 4), (64, 6, 4), (128, 3, 4), (128, 6, 4), (64, 3, 2)]  # width, depth, patch


def training_step(cfg: TrainConfig, device: torch.device, fast: bool):
    """One step of train.py without its bookkeeping, as a call; and the forward and backward pass alone."""
    torch.manual_seed(0)
    model = DiT(cfg.model).to(device)
    ema, optimizers, diffusion = copy.deepcopy(model), make_optimizers(model, cfg), GaussianDiffusion(T)
    parameters, averages = list(model.parameters()), list(ema.parameters())
    images = torch.randint(0, 256, (cfg.batch_size, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (cfg.batch_size,), device=device)
    with precision(cfg, device):
        example = pieces(model, images / 127.5 - 1, torch.zeros_like(labels), labels)[0]
        network = compiled(model, *example) if fast else model

    def gradients():
        x_0 = images.float() / 127.5 - 1
        t, eps = diffusion.draw_t_and_eps(x_0)
        add_gradients(network, ema, diffusion, [x_0, model.y_embedder.drop(labels), t, eps], cfg)

    def step():
        gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(averages, parameters, 1, cfg.ema_decay)

    return step, gradients


def measure(cfg: TrainConfig, device: torch.device, rounds: int, kinds: list[str]):
    """Seconds a step of each kind, the floor in seconds, and the arithmetic."""
    steps = {kind: training_step(cfg, device, fast=kind == "compiled") for kind in kinds}
    flops = arithmetic(training_step(cfg, device, fast=False)[1])
    times, rate = medians(device, {kind: step for kind, (step, _) in steps.items()}, rounds, IN_A_ROW)
    return times, flops / rate, flops


def draw_scaling(path: Path, points: list[tuple[str, int, float, float]]) -> None:
    """Time against arithmetic, and the floor."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = sorted(points, key=lambda point: point[1])
    flops = [point[1] / 1e9 for point in points]
    axes.plot(flops, [1000 * point[2] for point in points], "o", label="training step")
    axes.plot(flops, [1000 * point[3] for point in points], "-", color="grey", label="floor: arithmetic at sgemm's rate")
    for name, operations, time, _ in points:
        axes.annotate(name, (operations / 1e9, 1000 * time), xytext=(0, 6), textcoords="offset points", fontsize=8,
                      ha="center")
    axes.set(xscale="log", yscale="log", xlabel="arithmetic of a step, GFLOP", ylabel="time of a step, ms")
    axes.margins(x=0.1, y=0.1)
    axes.legend(loc="upper left", title="width, depth, patch size: above the points")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    for name, default in (("batch-size", 300), ("hidden-size", 64), ("depth", 3), ("patch-size", 4), ("rounds", 10)):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="auto")
    add("--scaling", type=Path, metavar="FILE", help="measure networks of several sizes, and draw this picture")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)

        def recipe(hidden_size: int, depth: int, patch_size: int) -> TrainConfig:
            return TrainConfig(batch_size=args.batch_size, optimizer=args.optimizer, precision=args.precision,
                               model=ModelConfig(hidden_size=hidden_size, depth=depth, patch_size=patch_size))

        cfg = recipe(args.hidden_size, args.depth, args.patch_size)
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    print(about(device))
    if not args.scaling:
        times, floor, flops = measure(cfg, device, args.rounds, ["plain", "compiled"])
        print(f"batch {args.batch_size}: {flops / 1e9:.2f} GFLOP a step, floor {1000 * floor:.1f} ms at "
              f"{flops / floor / 1e9:.0f} GFLOP/s")
        for kind, time in times.items():
            print(f"{kind:9} {1000 * time:7.1f} ms a step, {args.batch_size / time:6.0f} images/s, "
                  f"{time / floor:.2f} x floor")
        return
    points = []
    for width, depth, patch in FAMILY:
        times, floor, flops = measure(recipe(width, depth, patch), device, args.rounds, ["compiled"])
        name, time = f"{width}, {depth}, {patch}", times["compiled"]
        points.append((name, flops, time, floor))
        print(f"{name:10} {flops / 1e9:7.2f} GFLOP {1000 * time:8.1f} ms {time / floor:5.2f} x floor", flush=True)
    draw_scaling(args.scaling, points)


if __name__ == "__main__":
    main()
