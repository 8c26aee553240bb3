"""Compare generated digits with real ones: are they the digits asked for, as varied, and not memorised?

    python evaluate.py --sampler ddim --json results.json
"""

from runtime.start import before_torch

if __name__ == "__main__":
    before_torch()

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from config import MNIST_TEST_IMAGES, T
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import add_sampling_options, check_sampling_options, generate, load_sampling_model
from runtime.checkpoint import check_weights, load_checkpoint, save_checkpoint
from runtime.files import check_files, here_or_in_project, write_atomically
from runtime.fused import fused
from runtime.script import exit_status, run_script
from runtime.speed import keep_freed_memory

EPOCHS, BATCH_SIZE = 8, 125  # of the classifier; BATCH_SIZE also for sampling and the NLL bound


class Classifier(nn.Module):
    """A small CNN, (N, 1, 28, 28) in [-1, 1] -> (N, 10) logits; its last hidden layer gives FID's features."""

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


def augmented(images: Tensor) -> Tensor:
    """Images (N, 1, 28, 28), each rotated, scaled and moved at random, by at most 12 degrees, 12% and 2 pixels."""
    N = len(images)
    angle, scale = (torch.rand(N) - 0.5) * 0.42, 1 + (torch.rand(N) - 0.5) * 0.24
    shift = (torch.rand(N, 2, 1) - 0.5) * 4 / 14
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, sin, cos], dim=1).reshape(N, 2, 2)
    grid = F.affine_grid(torch.cat([rows, shift], dim=2).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in from outside is black


def trained_classifier(file: Path, train_set: Digits, epochs: int = EPOCHS) -> Classifier:
    """The classifier in `file`; if there is none, it is trained on real images and saved there. In eval mode.

    Leaves the CPU's random state as it was. CheckpointError if the file is unusable, OSError if it cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier().float().to(train_set.images.device)
        if file.exists():
            weights = load_checkpoint(file, {"classifier": dict})["classifier"]
            check_weights(file, weights, classifier)
            classifier.load_state_dict(weights)
            return classifier.eval()
        if not os.access(file.parent, os.W_OK):  # before minutes of work
            raise OSError(f"{file} cannot be written: copy the data, and name the copy with --data-dir")
        order = torch.Generator().manual_seed(0)
        batches = [index for _ in range(epochs) for index in train_set.batch_indices(BATCH_SIZE, order)]
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=len(batches))
        for index in tqdm(batches, desc="training the classifier", unit="step", mininterval=0.5):
            images, labels = train_set[index]
            optimizer.zero_grad()
            F.cross_entropy(classifier(augmented(images)), labels).backward()
            optimizer.step()
            schedule.step()
    save_checkpoint(file, {"classifier": classifier.state_dict()})
    return classifier.eval()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """function(images) for all (N, 1, 28, 28), 500 at a time, so that 60,000 fit in memory. (N, ...)."""
    return torch.cat([function(part) for part in images.split(500)])


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 28, 28) that are classified as their label (N,)."""
    return (in_batches(classifier, images).argmax(dim=1) == labels).float().mean().item()


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of features (N, D) and (M, D): |m - m'|^2 + tr(C + C' - 2 (C C')^1/2) (Heusel et al. 2017).

    m, C: mean and covariance. Not comparable with Inception FID, nor with that of fewer images, which is higher.
    """
    (m, C), (m_2, C_2) = ((x.mean(dim=0), x.T.cov()) for x in (real.cpu().double(), generated.cpu().double()))
    roots = torch.linalg.eigvals(C @ C_2).real.clamp(min=0).sqrt()  # the eigenvalues of (C C')^1/2
    return ((m - m_2).square().sum() + C.trace() + C_2.trace() - 2 * roots.sum()).item()


def coverage_metrics(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    real: (N, D), generated: (M, D) features. Each has a ball that reaches to its k-th neighbour in its own set.
    Precision: share of generated points in real balls. Recall: share of real points in generated balls.
    Density: real balls around a generated point, over k. Coverage: share of real balls that hold a generated point.
    """
    real_radius, radius = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (real, generated))  # 1st: itself
    distance = torch.cdist(real, generated)  # (N, M)
    in_real, in_generated = (distance < real_radius[:, None]).float(), (distance < radius).float()
    return {"precision": in_real.amax(dim=0).mean().item(), "recall": in_generated.amax(dim=1).mean().item(),
            "density": in_real.sum(dim=0).mean().item() / k, "coverage": in_real.amax(dim=1).mean().item()}


def memorised(images: Tensor, training: Tensor) -> float:
    """The share of images (N, 1, 28, 28) 3 times nearer to one training image than to the next (Yoon et al. 2023)."""
    near = in_batches(lambda x: torch.cdist(x.flatten(1), training.flatten(1)).topk(2, largest=False).values, images)
    return (near[:, 0] < near[:, 1] / 3).float().mean().item()


def distribution_metrics(classifier: Classifier, test_images: Tensor, images: Tensor) -> dict[str, float]:
    """FID, precision, recall, density and coverage of images (N, 1, 28, 28) against the test images."""
    real, generated = (in_batches(classifier.features, some) for some in (test_images, images))
    return {"FID": fid(real, generated), **coverage_metrics(real, generated)}


def evaluate(images: Tensor, labels: Tensor, classifier: Classifier, train_set: Digits, test_set: Digits) -> dict[str, dict]:
    """Every metric: name -> {"generated": its value for the images, "real": the same for real images}.

    images: (N, 1, 28, 28) in [-1, 1]; labels: (N,), as requested. real: test images; N training images for distributions.
    """
    (training, _), (test_images, test_labels) = train_set[:], test_set[:]

    def metrics(classified: Tensor, wanted: Tensor, compared: Tensor) -> dict[str, float]:
        return {"accuracy": accuracy(classifier, classified, wanted),
                **distribution_metrics(classifier, test_images, compared), "memorised": memorised(classified, training)}

    generated = metrics(images, labels, images)
    real = metrics(test_images, test_labels, training[:len(images)])
    return {name: {"generated": generated[name], "real": real[name]} for name in real}


def sample_images(model: DiT, n: int, seed: int, **settings) -> tuple[Tensor, Tensor]:
    """n images (n, 1, 28, 28) in [-1, 1], of the digits 0 to 9 in turn, and their labels (n,).

    settings: those of `generate`. Each batch has a seed of its own, so that no two share their noise.
    """
    labels = torch.arange(n) % model.config.num_classes
    batches = enumerate(tqdm(labels.split(BATCH_SIZE), desc="sampling", unit="batch"))
    images = [generate(model, y, seed=(seed * 10_000 + number) % 2**63, **settings) for number, y in batches]
    border = (model.config.image_size - 28) // 2
    return F.pad(torch.cat(images).clamp(-1, 1), [-border] * 4), labels.to(images[0].device)


@torch.no_grad()
def nll_bound(model: DiT, digits: Digits, seed: int = 0) -> float:
    """Upper bound on -log p(x_0 | y) (DDPM eq. 5) in bits/dim, mean over `digits`."""
    diffusion, network = GaussianDiffusion(), fused(model, frozen=True)
    generator = torch.Generator().manual_seed(seed)
    total, alpha_bar_T = 0.0, diffusion.alpha_bar[-1].item()
    for start in tqdm(range(0, len(digits), BATCH_SIZE), desc="NLL bound", unit="batch"):
        x_0, y = digits[start:start + BATCH_SIZE]
        prior = 0.5 * (alpha_bar_T * (x_0.square() - 1) - math.log(1 - alpha_bar_T))  # KL(q(x_T | x_0) || N(0, I)), in nats
        terms = prior.flatten(1).mean(dim=1) / math.log(2)  # (N,)
        for time in range(T):
            t = torch.full_like(y, time)
            eps = torch.randn(x_0.shape, generator=generator, device="cpu", dtype=x_0.dtype).to(x_0.device)
            x_t = diffusion.q_sample(x_0, t, eps)
            terms = terms + diffusion.vlb_term(network(x_t, t, y), x_0, x_t, t)
        total += terms.sum().item()
    return total / len(digits)


def measure(args: argparse.Namespace) -> None:
    """What the command line asks for. CheckpointError, DataError or OSError with a one-sentence message."""
    data_dir = here_or_in_project(args.data_dir)
    check_files([args.json], [data_dir / "classifier.pth", *data_dir.glob("MNIST/raw/*")])
    model = load_sampling_model(args)
    train_set, test_set = (load_mnist(train, data_dir, args.device) for train in (True, False))
    classifier = trained_classifier(data_dir / "classifier.pth", train_set)
    generated = sample_images(model, args.n, args.seed, sampler=args.sampler, steps=args.steps, eta=args.eta,
                              guidance=args.guidance)
    results = evaluate(*generated, classifier, train_set, test_set)
    if args.bpd:
        some = load_mnist(False, data_dir, args.device, args.bpd, model.config.image_size)
        results["NLL bound, bits/dim"] = {"real": nll_bound(model, some, args.seed)}
    source = f"{args.checkpoint}: {args.n:,} images, {args.described}; real ones from {data_dir}"
    if args.json:
        write_atomically(args.json, lambda path: path.write_text(json.dumps({"source": source, **results}, indent=1)))
    print(source)
    for name, row in results.items():
        print(f"{name:20}", *(f"{kind} {value:8.4f}" for kind, value in row.items()), sep="  ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("evaluate.py", description="Measure the digits of a checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--n", type=int, default=10_000, help="images to sample (default: 10000)")
    add_sampling_options(parser)
    add("--data-dir", type=Path, default=Path("mnist"), help="holds MNIST/raw/ and the classifier (default: mnist)")
    add("--bpd", type=int, nargs="?", const=MNIST_TEST_IMAGES, default=0, metavar="N",
        help="also measure the NLL bound of N test images (no N: of all), with 1000 evaluations each, unguided")
    add("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    args = parser.parse_args(argv)
    check_sampling_options(parser, args, [args.json], n=(100, 20_000), bpd=(0, MNIST_TEST_IMAGES))
    keep_freed_memory()
    return exit_status(parser, lambda: measure(args))


if __name__ == "__main__":
    sys.exit(run_script(main))
