"""Compare generated digits with real ones: are they correct, as diverse, and new?

    python evaluate.py --sampler ddim --guidance 1 1.25 1.5 2 --json results.json
"""

from runtime.start import before_torch

if __name__ == "__main__":  # it sets what torch reads when it is imported
    before_torch()

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import GUIDANCE, MNIST_TEST_IMAGES, SEEDS, T, require
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion, noise
from dit import DiT
from inference import add_sampling_options, generate, open_checkpoint
from runtime.checkpoint import CheckpointError, load_checkpoint, load_weights
from runtime.files import PROJECT, here_or_in_project, write_atomically
from runtime.fused import fused
from runtime.script import exit_status
from runtime.speed import keep_freed_memory, records

CLASSIFIER = PROJECT / "mnist" / "classifier.pth"
BATCH_SIZE = 125  # for sampling and the NLL bound
AT_ONCE = 20  # batches that a GPU takes together, each with its own noise


class Classifier(nn.Module):
    """A small CNN, (N, 1, 28, 28) in [-1, 1] -> (N, 10) logits; see experiments/classifier.py."""

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 1), (64, 64, 2), (64, 64, 1)):
            convolution = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU()))
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def features(self, images: Tensor) -> Tensor:
        """The input of the last layer. (N, 1, 28, 28) in [-1, 1] -> (N, 128), nonnegative."""
        return self.hidden(self.convolutions(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(images), 0.3, self.training))


def load_classifier(device: str | torch.device = "cpu") -> Classifier:
    """The included classifier in eval mode. CheckpointError if its file is missing or damaged."""
    classifier = Classifier()
    try:
        weights = load_checkpoint(CLASSIFIER, ["classifier"])["classifier"]
        load_weights(CLASSIFIER, classifier, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; `git checkout -- mnist/classifier.pth` helps") from error
    return classifier.to(device).eval()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """function(images) for (N, 1, 28, 28), 500 at a time, so that 60,000 fit in memory."""
    return torch.cat([function(part) for part in images.split(500)])


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 28, 28) that are classified as their label (N,)."""
    return (in_batches(classifier, images).argmax(dim=1) == labels).float().mean().item()


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of features (N, D) and (M, D) (Heusel et al. 2017).

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2) with means m, m' and covariances C, C'. Fewer images have
    a higher FID. Not Inception's FID. ValueError for a single image or values not finite.
    """
    sets = real.cpu().double(), generated.cpu().double()
    (m, C), (m_2, C_2) = ((x.mean(dim=0), x.T.cov()) for x in sets)
    if not (C @ C_2).isfinite().all():  # one image has no covariance; on nan, LAPACK crashes
        raise ValueError("FID needs at least two images, and features that are finite numbers")
    roots = torch.linalg.eigvals(C @ C_2).real.clamp(min=0).sqrt()  # the eigenvalues of (C C')^1/2
    return ((m - m_2).square().sum() + C.trace() + C_2.trace() - 2 * roots.sum()).item()


def coverage_metrics(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    real: (N, D), generated: (M, D) features. Each point has a ball that reaches to its k-th
    neighbour in its own set. k is 5 for all four, as in the second paper; the first has 3.
    Precision: share of generated points in real balls. Recall: share of real points in generated
    balls. Density: real balls around a generated point, over k. Coverage: share of real balls that
    hold a generated point. ValueError unless N > k and M > k.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"more than k = {k} points are needed, not {len(real)}, {len(generated)}")
    real, generated = (x - real.mean(dim=0) for x in (real, generated))  # else cdist is inexact
    near_r, near_g = (torch.cdist(x, x).topk(k + 1, largest=False)[0] for x in (real, generated))
    # Radii are (N, 1), for rows, and (M,), for columns; a point is its own nearest neighbour.
    distance = torch.cdist(real, generated)  # (N, M)
    in_real, in_generated = (distance < near_r[:, k:]).float(), (distance < near_g[:, k]).float()
    values = {"precision": in_real.amax(dim=0), "recall": in_generated.amax(dim=1),
              "density": in_real.sum(dim=0) / k, "coverage": in_real.amax(dim=1)}
    return {name: value.mean().item() for name, value in values.items()}


def memorised(images: Tensor, training: Tensor) -> dict[str, float]:
    """How far images (N, 1, 28, 28) are from the nearest training image, in L2 distance.

    memorised: the share less than 1/3 as far from the nearest as from the second nearest (Yoon et
    al. 2023): copies with little noise, not shifted ones. nearest: the median distance.
    """
    near, other = in_batches(lambda x: torch.cdist(x.flatten(1), training.flatten(1))
                             .topk(2, largest=False)[0], images).T
    return {"memorised": (near < other / 3).float().mean().item(), "nearest": near.median().item()}


def distribution_metrics(classifier: Classifier, test: Tensor, images: Tensor) -> dict[str, float]:
    """FID, precision, recall, density and coverage of images (N, 1, 28, 28) against test images."""
    real, generated = (in_batches(classifier.features, some) for some in (test, images))
    return {"FID": fid(real, generated), **coverage_metrics(real, generated)}


def evaluate(images: Tensor, labels: Tensor, classifier: Classifier, train_set: Digits,
             test_set: Digits) -> dict[str, float]:
    """All metrics of images (N, 1, 28, 28) in [-1, 1] that were requested as labels (N,)."""
    return {"accuracy": accuracy(classifier, images, labels),
            **distribution_metrics(classifier, test_set[:][0], images),
            **memorised(images, train_set[:][0])}


def balanced(digits: Digits, labels: Tensor) -> Tensor:
    """The first images (N, 1, 28, 28) of each digit, as many of each as labels (N,) has."""
    index = [(digits.labels == digit).nonzero()[:n, 0] for digit, n in enumerate(labels.bincount())]
    return digits[torch.cat(index)][0]


def sample_images(model: DiT, n: int, seed: int, **settings) -> tuple[Tensor, Tensor]:
    """n images (n, 1, 28, 28) in [-1, 1], of the digits 0 to 9 in turn, and their labels (n,).

    settings: those of `generate`. Seeds below 17 million share no noise up to n = 23,000: the seeds
    of their batches begin at least 186 apart.
    """
    labels = torch.arange(n) % model.config.num_classes
    at_once = AT_ONCE if records(model.pos_embed.device) and n % BATCH_SIZE == 0 else 1
    images = torch.cat([
        generate(model, y, seed=[(seed * 10_000_019 + group * at_once + i) % 2**32
                                 for i in range(-(-len(y) // BATCH_SIZE))], **settings)
        for group, y in enumerate(tqdm(labels.split(BATCH_SIZE * at_once), desc="sampling"))])
    return F.pad(images, [(28 - images.shape[-1]) // 2] * 4), labels.to(images.device)


@torch.no_grad()
def nll_bound(model: DiT, digits: Digits, diffusion: GaussianDiffusion, seed: int = 0) -> float:
    """Upper bound on -log p(x_0 | y) (DDPM eq. 5) in bits/dim, mean over `digits`."""
    eps_model = diffusion.as_eps(fused(model, frozen=True), model.config.predicts)
    generator = torch.Generator().manual_seed(seed)
    total, alpha_bar_T = 0.0, diffusion.alpha_bar[-1].item()
    for start in tqdm(range(0, len(digits), BATCH_SIZE), desc="NLL bound", unit="batch"):
        x_0, y = digits[start:start + BATCH_SIZE]
        prior = 0.5 * (alpha_bar_T * (x_0.square() - 1) - math.log(1 - alpha_bar_T))
        terms = prior.flatten(1).mean(dim=1) / math.log(2)  # (N,): KL(q(x_T | x_0) || N(0, I))
        for time in range(T):
            t = torch.full_like(y, time)
            x_t = diffusion.q_sample(x_0, t, noise(x_0.shape, generator).to(x_0))
            terms = terms + diffusion.vlb_term(eps_model(x_t, t, y), x_0, x_t, t, clip=True)
        total += terms.sum().item()
    return total / len(digits)


def measure(args: argparse.Namespace) -> None:
    """What the command line asks for. CheckpointError, DataError, OSError or SettingError."""
    for name, least, most in (("n", 100, 20_000), ("bpd", 0, MNIST_TEST_IMAGES), ("seed", *SEEDS)):
        value = getattr(args, name)
        require(least <= value <= most, f"{name} must lie in [{least}, {most}], not {value}")
    folder = here_or_in_project(args.data_dir)
    require(not args.json or args.json.suffix == ".json", f"{args.json} must end in .json")
    model, diffusion = open_checkpoint(args, [args.json])
    classifier = load_classifier(args.device)
    train_set, test_set = (load_mnist(training, folder, args.device) for training in (True, False))
    rows = {"source": f"{args.checkpoint}: {args.n:,} images, {args.sampler}, {args.steps} steps, "
                      f"eta {args.eta:g}, seed {args.seed}"}
    for guidance in args.guidance:
        samples = sample_images(model, args.n, args.seed, sampler=args.sampler, eta=args.eta,
                                steps=args.steps, guidance=guidance, diffusion=diffusion)
        rows[f"guidance {guidance:g}"] = evaluate(*samples, classifier, train_set, test_set)
    test_images, real = test_set[:][0], balanced(train_set, samples[1])
    rows["real"] = {"accuracy": accuracy(classifier, *test_set[:]),
                    **distribution_metrics(classifier, test_images, real),
                    **memorised(test_images[:args.n], train_set[:][0])}
    if args.bpd:
        some = load_mnist(False, folder, args.device, args.bpd, model.config.image_size)
        rows["real"]["bits/dim"] = nll_bound(model, some, diffusion, args.seed)
    if args.json:
        write_atomically(args.json, lambda path: path.write_text(json.dumps(rows, indent=1)))
    print(rows.pop("source"), " " * 13 + "".join(f"{name:>10}" for name in rows["real"]), sep="\n")
    for name, row in rows.items():
        print(f"{name:13}" + "".join(f"{value:10.4f}" for value in row.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("evaluate.py", description="Measure a checkpoint's digits.",
                                     allow_abbrev=False,
                                     conflict_handler="resolve")  # --guidance: several here
    add = parser.add_argument
    add("--n", type=int, default=10_000, help="images to sample (default: 10000)")
    add_sampling_options(parser)
    add("--guidance", type=float, nargs="+", default=[GUIDANCE], metavar="S",
        help=f"one strength or several; 1 turns guidance off (default: {GUIDANCE:g})")
    add("--data-dir", type=Path, default=Path("mnist"), help="holds MNIST/raw/ (default: mnist)")
    add("--bpd", type=int, nargs="?", const=MNIST_TEST_IMAGES, default=0, metavar="N",
        help="also the NLL bound of N test images (no N: all), unguided, 1000 evaluations each")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args(argv)
    keep_freed_memory()
    return exit_status(parser, lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
