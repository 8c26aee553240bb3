"""Is it L1's early steps that cost variety? Two networks share the steps of sampling.

    python -m experiments.median L1.pth MSE.pth [--guidance 1 1.5 2]

L1 learns a pixel's median, which at large t has too little ink. If that is why digits vary less,
early steps of the squared error bring recall back, and late ones do not. Each chain samples 10,000
digits in 50 steps of DDIM; what results/median.json holds already is not repeated.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from config import STEPS
from dataset import load_mnist
from diffusion import GaussianDiffusion, Model, guided, noise
from dit import DiT
from evaluate import BATCH_SIZE, accuracy, distribution_metrics, load_classifier
from experiments.drawing import FONT, found, new_figure
from runtime.checkpoint import load_model
from runtime.files import write_atomically
from runtime.fused import fused
from runtime.pictures import tidy
from runtime.script import exit_status
from runtime.speed import keep_freed_memory

TABLE = Path(__file__).with_name("results") / "median.json"
BOUNDARY = 600  # early steps have t >= 600
CHAINS = {  # early, late: the loss that trained each network; how the line is drawn
    ("l1", "l1"): {"color": "#D55E00", "marker": "s"},
    ("mse", "l1"): {"color": "#009E73", "marker": "^"},
    ("l1", "mse"): {"color": "#CC79A7", "marker": "v"},
    ("mse", "mse"): {"color": "#0072B2", "marker": "o"}}
NAMES = {"l1": "L1", "mse": "squared error"}


def relay(early: Model, late: Model) -> Model:
    """`early` for t >= BOUNDARY, `late` below."""
    return lambda x_t, t, y: (early if t[0] >= BOUNDARY else late)(x_t, t, y)


def sample(early: DiT, late: DiT, guidance: float, n: int) -> tuple[Tensor, Tensor]:
    """n images (n, 1, 28, 28) and labels (n,), from the noise of `evaluate.sample_images`."""
    diffusion = GaussianDiffusion()
    network = relay(*(guided(diffusion.as_eps(fused(model, frozen=True), model.config.predicts),
                             guidance, model.config.num_classes) for model in (early, late)))
    labels, images = torch.arange(n) % 10, []
    for seed, y in enumerate(tqdm(labels.split(BATCH_SIZE), desc="sampling", unit="batch")):
        x_T = noise((len(y), 1, 28, 28), torch.Generator().manual_seed(seed))
        images.append(diffusion.sample(network, x_T, y, sampler="ddim", steps=STEPS["ddim"]))
    return torch.cat(images).clamp(-1, 1), labels


def measure(models: dict[str, DiT], strengths: list[float], table: Path, n: int = 10_000) -> None:
    """A row for each chain and strength that the table lacks."""
    classifier, (test_images, _) = load_classifier(), load_mnist(False)[:]
    rows = json.loads(table.read_text()) if table.exists() else []
    for guidance, (early, late) in product(strengths, CHAINS):
        setting = {"early": early, "late": late, "guidance": guidance}
        if any(setting.items() <= row.items() for row in rows):
            continue
        images, labels = sample(models[early], models[late], guidance, n)
        rows.append(setting | {"accuracy": accuracy(classifier, images, labels),
                               **distribution_metrics(classifier, test_images, images)})
        print(rows[-1], flush=True)
        write_atomically(table, lambda path: path.write_text(json.dumps(rows, indent=1)))


def median(table: Path) -> Figure:
    """Recall against precision of the four chains, over the strengths of guidance."""
    rows = found(json.loads(table.read_text()) if table.exists() else [])
    figure = new_figure(6, 4.2)
    axes = figure.subplots()
    for (early, late), line in CHAINS.items():
        some = sorted((r for r in rows if (r["early"], r["late"]) == (early, late)),
                      key=lambda r: r["guidance"])
        switch = "" if early == late else f", {NAMES[late]} below t = {BOUNDARY}"
        axes.plot([r["precision"] for r in some], [r["recall"] for r in some], **line,
                  label=NAMES[early] + switch)
        for r in some:  # off the other lines
            axes.annotate(f"{r['guidance']:g}", (r["precision"], r["recall"]), fontsize=FONT - 2,
                          xytext=(5, 4) if early == "l1" else (-4, -13),
                          textcoords="offset points")
    axes.set(xlabel="precision", ylabel="recall")
    tidy(axes, 1, 2, 5)
    axes.legend(fontsize=FONT - 1)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("experiments.median", allow_abbrev=False,
                                     description=__doc__.splitlines()[0])
    parser.add_argument("l1", type=Path, help="a checkpoint of train.py --loss l1")
    parser.add_argument("mse", type=Path, help="one of the same run with --loss mse")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0], metavar="S")
    args = parser.parse_args(argv)
    keep_freed_memory()

    def work() -> None:
        models = {loss: load_model(getattr(args, loss), "cpu")[0] for loss in NAMES}
        measure(models, args.guidance, TABLE)

    return exit_status(parser, work)


if __name__ == "__main__":
    sys.exit(main())
