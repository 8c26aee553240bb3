"""Quality against the number of sampling steps, or against the strength of guidance: a picture and a table.

    python -m benchmarks.quality steps assets/steps.png
    python -m benchmarks.quality guidance assets/guidance.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import about
from config import STEPS, pick_device
from dataset import load_mnist
from evaluate import accuracy, draw_images, frechet_distance, in_batches, spread, trained_recogniser
from runtime.checkpoint import load_model
from runtime.speed import keep_freed_memory

STEP_COUNTS = (10, 20, 50, 100, 250, 1000)
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # of guidance
FIGURES = ("accuracy", "Frechet distance", "precision", "coverage")


def draw_steps(axes: dict[str, Axes], rows: list[dict]) -> None:
    for sampler in STEPS:
        of_sampler = [row for row in rows if row["sampler"] == sampler]
        for name, one in axes.items():
            one.plot([row["steps"] for row in of_sampler], [row[name] for row in of_sampler], "o-", label=sampler.upper())
    for one in axes.values():
        one.set(xscale="log", xlabel="sampling steps")


def draw_guidance(axes: dict[str, Axes], rows: list[dict]) -> None:
    for name, one in axes.items():
        one.plot([row["guidance"] for row in rows], [row[name] for row in rows], "o-", label="drawn")
        one.set(xlabel="guidance")


def write(picture: Path, draw: Callable, rows: list[dict], real: dict[str, float]) -> None:
    """The picture, and the table beside it."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = dict(zip(FIGURES, figure.subplots(1, len(FIGURES)), strict=True))
    draw(axes, rows)
    for name, one in axes.items():
        one.axhline(real[name], color="grey", linestyle="--", label="real images")
        one.set(title=name)
        one.grid(alpha=0.3, which="both")
    axes["Frechet distance"].set(yscale="log")
    axes["Frechet distance"].legend(fontsize=8)
    figure.savefig(picture, dpi=90)
    lines = [",".join(rows[0]), *map(line, rows), line({"sampler": "real images", "steps": "", "guidance": ""} | real)]
    picture.with_suffix(".csv").write_text("\n".join(lines) + "\n")


def line(row: dict) -> str:
    return ",".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("what", choices=("steps", "guidance"))
    add("picture", type=Path, help="a .png file; the table goes beside it as .csv")
    add("--n", type=int, default=1000, help="images a point (default: 1000)")
    add("--guidance", type=float, default=1.0, help="for steps (default: 1)")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, default=Path("model.pth"))
    add("--device", default="auto")
    args = parser.parse_args(argv)
    if args.n < 100:
        parser.error("argument --n: must be at least 100")
    keep_freed_memory()
    device = pick_device(args.device)
    train_set, test_set = (load_mnist(train, device=device) for train in (True, False))
    judge = trained_recogniser(Path("mnist") / "recogniser.mnist.pth", train_set)
    model, _ = load_model(args.checkpoint, device)
    test_images = test_set[:][0]
    test_features = in_batches(judge.features, test_images)

    def figures(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        found = spread(test_features, in_batches(judge.features, images))
        found |= {"accuracy": accuracy(judge, images, labels)[0],
                  "Frechet distance": frechet_distance(judge, test_images, images)}
        return {name: found[name] for name in FIGURES}

    if args.what == "steps":
        settings = [{"sampler": sampler, "steps": n, "guidance": args.guidance} for sampler in STEPS
                    for n in STEP_COUNTS]
    else:
        settings = [{"sampler": "ddim", "steps": 50, "guidance": strength} for strength in STRENGTHS]
    real = figures(*train_set[:args.n]) | {"accuracy": accuracy(judge, *test_set[:])[0]}  # it was trained on the former
    rows = []
    print(f"{args.n} images a row, seed {args.seed}, {about(device)}")
    print(*settings[0], *FIGURES, sep=",")
    for setting in settings:
        rows.append(setting | figures(*draw_images(model, args.n, args.seed, **setting, compile=True)))
        print(line(rows[-1]), flush=True)

    write(args.picture, draw_steps if args.what == "steps" else draw_guidance, rows, real)


if __name__ == "__main__":
    main()
