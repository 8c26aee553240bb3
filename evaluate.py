"""How good the digits are: classified as what was asked for, distributed as real digits are, and not memorised.

    python evaluate.py --sampler ddim --json results.json

Each figure stands next to that of real images, without which it says little. Needs requirements-dev.txt.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, ends without a traceback

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

try:
    from torchmetrics.image.fid import FrechetInceptionDistance
except ModuleNotFoundError as error:
    raise SystemExit("evaluate.py: error: torchmetrics is missing: pip install -r requirements-dev.txt") from error

from config import MNIST_TEST_IMAGES, T
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion, gaussian_kl
from dit import DiT
from inference import add_sampling_options, check_sampling_options, described, generate, load_sampling_model
from runtime.checkpoint import check_writable, load_checkpoint, save_checkpoint, write_atomically
from runtime.fused import fused
from runtime.script import check_files, exit_status, positive_int, run_script
from runtime.speed import keep_freed_memory

EPOCHS, BATCH_SIZE = 8, 125  # of the classifier; and images sampled at a time
LEAST_IMAGES, MOST_IMAGES = 100, 20_000  # the distances between all of them must fit the memory


class Classifier(nn.Module):
    """A small CNN. (N, 1, 28, 28) in [-1, 1] -> (N, 10) logits.

    It does for digits what the Inception network does for photographs: it says what is seen, and its last hidden layer is
    the feature space in which distributions of images are compared.
    """

    def __init__(self):
        super().__init__()
        self.num_features = 128

        def convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
                                 nn.BatchNorm2d(channels_out), nn.ReLU())

        self.convolutions = nn.Sequential(convolution(1, 16, 1), convolution(16, 32, 2), convolution(32, 64, 1),
                                          convolution(64, 64, 2), convolution(64, 64, 1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(64 * 7 * 7, self.num_features), nn.BatchNorm1d(self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer reads. (N, 1, 28, 28) in [-1, 1] -> (N, 128), none negative."""
        return self.hidden(self.convolutions(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(images), 0.3, self.training))


def augmented(images: Tensor) -> Tensor:
    """Each image rotated by up to 12 degrees, resized by up to 12% and moved by up to 2 pixels. (N, 1, 28, 28) -> the same.

    Draws from torch's random state.
    """
    N = len(images)
    angle, scale = (torch.rand(N) - 0.5) * 0.42, 1 + (torch.rand(N) - 0.5) * 0.24
    shift = (torch.rand(N, 2, 1) - 0.5) * 4 / 14
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, sin, cos], dim=1).reshape(N, 2, 2)
    grid = F.affine_grid(torch.cat([rows, shift], dim=2).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in from outside is black


def trained_classifier(file: Path, train_set: Digits, epochs: int = EPOCHS) -> Classifier:
    """The classifier kept in `file`, or a new one, trained on the real training images and kept there. In eval mode.

    It sees no generated image. Its seed is fixed, and the caller's random state is left as it was (the CPU's).
    CheckpointError if the file is damaged, OSError if it cannot be written.
    """
    device = train_set.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier()
        if file.exists():
            classifier.load_state_dict(load_checkpoint(file, {"classifier": dict})["classifier"])
            return classifier.to(device).eval()
        check_writable(file)  # before minutes of work
        classifier.to(device).train()
        order = torch.Generator().manual_seed(0)
        steps = epochs * (len(train_set) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
        with tqdm(total=steps, desc="training the classifier", unit="step", mininterval=0.5) as bar:
            for _ in range(epochs):
                for index in train_set.batches(BATCH_SIZE, order):
                    images, labels = train_set[index]
                    optimizer.zero_grad()
                    F.cross_entropy(classifier(augmented(images)), labels).backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    save_checkpoint(file, {"classifier": classifier.state_dict()})
    return classifier.eval()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """function(images) for all (N, 1, 28, 28), 500 at a time, so that 60,000 fit the memory. (N, ...)."""
    return torch.cat([function(part) for part in images.split(500)])


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The share of images (N, 1, 28, 28) that are classified as their label (N,): of all, and of the worst digit."""
    right = (in_batches(classifier, images).argmax(dim=1) == labels).float()
    return right.mean().item(), min(right[labels == digit].mean().item() for digit in range(10))


def fid(classifier: Classifier, real: Tensor, generated: Tensor) -> float:
    """Frechet distance of two sets of images (N, 1, 28, 28), in the features of the classifier (Heusel et al. 2017).

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2) with the means and covariances of both. Not comparable with FID in Inception's
    features. Fewer images give more, for the same distribution too: compare only figures of as many images.
    """

    class Features(nn.Module):  # as torchmetrics calls its extractor
        num_features = classifier.num_features

        def forward(self, images: Tensor) -> Tensor:
            return classifier.features(images).cpu()  # where torchmetrics keeps its sums

    metric = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    with torch.no_grad():
        for images, is_real in ((real, True), (generated, False)):
            for part in images.split(500):
                metric.update(part, real=is_real)
    return metric.compute().item()


def coverage_figures(real: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, D), (M, D).

    A ball around each point reaches to its k-th nearest neighbour of the same set. Precision: the share of generated points
    within a ball of a real one; recall: the other way round. Density: in how many balls of real points a generated one
    lies, over k. Coverage: the share of balls of real points that hold a generated one.
    """
    real_radius, radius = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (real, generated))  # itself is the 1st
    distance = torch.cdist(real, generated)  # (real, generated)
    in_real, in_generated = distance < real_radius[:, None], distance < radius[None, :]
    return {
        "precision": in_real.any(dim=0).float().mean().item(),
        "recall": in_generated.any(dim=1).float().mean().item(),
        "density": in_real.sum(dim=0).float().mean().item() / k,
        "coverage": in_real.any(dim=1).float().mean().item(),
    }


def memorised(images: Tensor, training: Tensor) -> float:
    """The share of images 3 times nearer to one training image than to the next, as a memorised one would be.

    Euclidean, of the pixels. images: (N, 1, 28, 28); training: (M, 1, 28, 28).
    """
    training = training.flatten(1)
    near = torch.cat([torch.cdist(part.flatten(1), training).topk(2, largest=False).values for part in images.split(500)])
    return (near[:, 0] < near[:, 1] / 3).float().mean().item()


def evaluate(images: Tensor, labels: Tensor, classifier: Classifier, train_set: Digits, test_set: Digits) -> dict[str, dict]:
    """Every figure: name -> {"generated": its value for the images, "real": the same for real images}.

    images: (N, 1, 28, 28) in [-1, 1]; labels: (N,), what was asked for. Both kinds are compared with the test images, and
    the real ones are the first N training images; for accuracy and memorised ones, where these would find themselves, the
    test images.
    """
    test_images, test_labels = test_set[:]
    training = train_set[:][0]
    results = {}
    for kind, some in (("generated", images), ("real", training[:len(images)])):
        of_test = (test_images, test_labels) if kind == "real" else (images, labels)
        values = dict(zip(("accuracy", "worst digit"), accuracy(classifier, *of_test), strict=True))
        values["FID"] = fid(classifier, test_images, some)
        values |= coverage_figures(*(in_batches(classifier.features, x) for x in (test_images, some)))
        values["memorised"] = memorised(of_test[0], training)
        for name, value in values.items():
            results.setdefault(name, {})[kind] = value
    return results


def sample_images(model: DiT, n: int, seed: int, **settings) -> tuple[Tensor, Tensor]:
    """n images (n, 1, 28, 28) in [-1, 1], as many of each digit as of any other, and their labels (n,).

    settings: those of `generate`. Each BATCH_SIZE of them has a seed of its own, which follows from `seed`.
    """
    labels = torch.arange(n) % model.config.num_classes
    images = []
    with tqdm(total=n, desc="sampling", unit="img", mininterval=0.5) as bar:
        for number, part in enumerate(labels.split(BATCH_SIZE)):
            images.append(generate(model, part, seed=(seed * 10_000 + number) % 2**63, **settings))
            bar.update(len(part))
    border = (model.config.image_size - 28) // 2
    return F.pad(torch.cat(images).clamp(-1, 1), [-border] * 4), labels.to(images[0].device)


@torch.no_grad()
def nll_bound(model: DiT, digits: Digits, seed: int = 0) -> float:
    """The bound of -log p(x_0 | y) (DDPM eq. 5), a mean over `digits` in bits/dim: the prior's term and those of all t."""
    diffusion, network, device = GaussianDiffusion(T), fused(model, frozen=True), digits.images.device
    generator, zero = torch.Generator(device).manual_seed(seed), torch.zeros((), device=device)
    prior_log_variance = (1 - diffusion.alpha_bar[-1]).log().to(zero)
    total = 0.0
    for start in tqdm(range(0, len(digits), BATCH_SIZE), desc="NLL bound", unit="batch"):
        x_0, y = digits[start:start + BATCH_SIZE]
        prior_mean = diffusion.q_sample(x_0, torch.full_like(y, T - 1), torch.zeros_like(x_0))
        total += gaussian_kl(prior_mean, prior_log_variance, zero, zero).mean(dim=(1, 2, 3)).sum().item() / math.log(2)
        for time in range(T):
            t, eps = torch.full_like(y, time), torch.randn(x_0.shape, generator=generator, device=device)
            x_t = diffusion.q_sample(x_0, t, eps)
            total += diffusion.vlb_term(network(x_t, t, y), x_0, x_t, t).sum().item()
    return total / len(digits)


def measure(args: argparse.Namespace) -> None:
    """Sample, measure, and write what was asked for. CheckpointError, DataError or OSError with a sentence."""
    model, _ = load_sampling_model(args)
    train_set, test_set = (load_mnist(train, args.data_dir, args.device) for train in (True, False))
    classifier = trained_classifier(Path(args.data_dir) / "classifier.pth", train_set)
    images, labels = sample_images(model, args.n, args.seed, sampler=args.sampler, steps=args.steps, eta=args.eta,
                                   guidance=args.guidance)
    results = evaluate(images, labels, classifier, train_set, test_set)
    if args.bpd:
        some = load_mnist(False, args.data_dir, args.device, args.bpd, model.config.image_size)
        results["NLL bound, bits/dim"] = {"real": nll_bound(model, some, args.seed)}
    source = f"{args.checkpoint}: {args.n:,} images, {described(args)}"
    if args.json:
        text = json.dumps({"source": source, **results}, indent=1)
        write_atomically(args.json, lambda path: path.write_text(text))
    print(f"{source}\n{'':20}{'generated':>10}{'real':>10}")
    for name, row in results.items():
        print(f"{name:20}" + "".join(f"{row[kind]:10.4f}" if kind in row else f"{'':10}" for kind in ("generated", "real")))


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked before any work is done; exits with a sentence where it is wrong."""
    add = parser.add_argument
    add("--n", type=positive_int, default=10_000, help="images to sample (default: 10000)")
    add_sampling_options(parser)
    add("--data-dir", default="mnist", help="directory that holds MNIST/raw/; the classifier is kept there (default: mnist)")
    add("--bpd", type=positive_int, nargs="?", const=MNIST_TEST_IMAGES, default=0, metavar="N",
        help="measure the NLL bound of N test images too, of all by default, given their labels and without guidance: 1000 "
        "evaluations per image")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    check_sampling_options(parser, args)
    for name, least, most in (("n", LEAST_IMAGES, MOST_IMAGES), ("bpd", 0, MNIST_TEST_IMAGES)):
        if not least <= getattr(args, name) <= most:
            parser.error(f"argument --{name}: must lie in [{max(least, 1)}, {most}], not {getattr(args, name)}")
    try:
        check_files([args.json], inputs=[args.checkpoint])
    except OSError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("evaluate.py", description="Measure how good the digits of a checkpoint are.",
                                     allow_abbrev=False)
    args = parse_args(parser, argv)
    keep_freed_memory()
    return exit_status(parser, lambda: measure(args))


if __name__ == "__main__":
    sys.exit(run_script(main))
