"""How good the digits are: recognised as what was asked for, spread as real digits are, and not copied.

    python evaluate.py --sampler ddim --steps 50 --json results.json

Each figure stands beside that of real images, without which it says little. Needs requirements-dev.txt.
"""

import argparse
import json
import sys
from pathlib import Path

from arguments import check_sampling_options, described, evaluate_parser

if __name__ == "__main__":
    evaluate_parser().parse_args()  # here already, so that --help does not wait for torch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

try:
    from torchmetrics.image.fid import FrechetInceptionDistance
except ModuleNotFoundError as error:
    raise SystemExit("evaluate.py: error: torchmetrics is missing: pip install -r requirements-dev.txt") from error

from config import MNIST_TEST_IMAGES, T
from dataset import DataError, Digits, load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import GAP, check_places, generate, load_drawing_model, show_canvas, tile
from runtime.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_atomically
from runtime.speed import compiled, keep_freed_memory, tabulated
from vlb import bits_per_dimension

EPOCHS, BATCH_SIZE = 8, 125  # of the recogniser; and images drawn at a time
LEAST_IMAGES, MOST_IMAGES = 100, 20_000  # the distances between all of them must fit the memory
WORTH_COMPILING = 100_000  # evaluations of a network whose blocks are not `fused`


class Recogniser(nn.Module):
    """A CNN that reads digits, the judge of the drawn ones. (N, 1, 28, 28) in [-1, 1] -> (N, 10) logits.

    It takes the part that the Inception network, trained on photographs, has for photographs: it says what is seen, and
    its last hidden layer is the space in which distributions of images are compared.
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


def shaken(images: Tensor) -> Tensor:
    """Each image turned by up to 12 degrees, resized by up to 12% and moved by up to 2 pixels. (N, 1, 28, 28), as are they.

    Draws from torch's random state.
    """
    N = len(images)
    angle, scale = (torch.rand(N) - 0.5) * 0.42, 1 + (torch.rand(N) - 0.5) * 0.24
    shift = (torch.rand(N, 2, 1) - 0.5) * 4 / 14
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, sin, cos], dim=1).reshape(N, 2, 2)
    grid = F.affine_grid(torch.cat([rows, shift], dim=2).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in from outside is black


def trained_recogniser(file: Path, train_set: Digits, epochs: int = EPOCHS) -> Recogniser:
    """The recogniser kept in `file`, or a new one, trained on the real training images and kept there. In eval mode.

    It sees no drawn image. Its seed is fixed, and the caller's random state is left as it was (the CPU's). CheckpointError
    if the file is damaged, OSError if it cannot be written.
    """
    device = train_set.images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Recogniser()
        if file.exists():
            judge.load_state_dict(load_checkpoint(file, {"recogniser": dict})["recogniser"])
            return judge.to(device).eval()
        judge.to(device).train()
        shuffle = torch.Generator().manual_seed(0)
        steps = epochs * (len(train_set) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.005, total_steps=steps)
        with tqdm(total=steps, desc="training the recogniser", unit="step", mininterval=0.5) as bar:
            for _ in range(epochs):
                for index in train_set.batches(BATCH_SIZE, shuffle):
                    images, labels = train_set[index]
                    optimizer.zero_grad()
                    F.cross_entropy(judge(shaken(images)), labels).backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    save_checkpoint(file, {"recogniser": judge.state_dict()})
    return judge.eval()


@torch.no_grad()
def in_batches(function, images: Tensor) -> Tensor:
    """function(images) for all (N, 1, 28, 28), 500 at a time, so that 60,000 fit the memory. (N, ...)."""
    return torch.cat([function(part) for part in images.split(500)])


def accuracy(judge: Recogniser, images: Tensor, labels: Tensor) -> tuple[float, list[float]]:
    """The share of images (N, 1, 28, 28) that are recognised as their label (N,); overall, and digit by digit."""
    right = (in_batches(judge, images).argmax(dim=1) == labels).float()
    return right.mean().item(), [right[labels == digit].mean().item() for digit in range(10)]


def frechet_distance(judge: Recogniser, real: Tensor, drawn: Tensor) -> float:
    """Between two sets of images (N, 1, 28, 28), in the features of the judge (Heusel et al. 2017).

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2) with the means and covariances of both. Fewer images give more, for the same
    distribution too: compare only figures of as many images.
    """

    class Features(nn.Module):  # as torchmetrics calls its extractor
        num_features = judge.num_features

        def forward(self, images: Tensor) -> Tensor:
            return judge.features(images).cpu()  # where torchmetrics keeps its sums

    metric = FrechetInceptionDistance(feature=Features()).set_dtype(torch.float64)
    with torch.no_grad():
        for images, is_real in ((real, True), (drawn, False)):
            for part in images.split(500):
                metric.update(part, real=is_real)
    return metric.compute().item()


def spread(real: Tensor, drawn: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of features (N, D), (M, D).

    A ball around each point reaches to its k-th nearest neighbour of the same set. Precision: the share of drawn points
    within a ball of a real one; recall: the other way round. Density: in how many balls of real points a drawn one lies,
    over k. Coverage: the share of balls of real points that hold a drawn one.
    """
    real_radius, drawn_radius = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (real, drawn))  # itself is the 1st
    distance = torch.cdist(real, drawn)  # (real, drawn)
    in_real, in_drawn = distance < real_radius[:, None], distance < drawn_radius[None, :]
    return {
        "precision": in_real.any(dim=0).float().mean().item(),
        "recall": in_drawn.any(dim=1).float().mean().item(),
        "density": in_real.sum(dim=0).float().mean().item() / k,
        "coverage": in_real.any(dim=1).float().mean().item(),
    }


def nearest_two(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, 2) to the nearest and the second nearest training image, and their numbers (N, 2).

    Euclidean, of the pixels. images: (N, 1, 28, 28); training: (M, 1, 28, 28).
    """
    training = training.flatten(1)
    near = [torch.cdist(part.flatten(1), training).topk(2, largest=False) for part in images.split(500)]
    return torch.cat([part.values for part in near]), torch.cat([part.indices for part in near])


def copied_share(images: Tensor, training: Tensor) -> float:
    """The share of images that are 3 times nearer to one training image than to the next, as a copy of it would be."""
    nearest, second = nearest_two(images, training)[0].unbind(dim=1)
    return (nearest < second / 3).float().mean().item()


def evaluate(images: Tensor, labels: Tensor, judge: Recogniser, train_set: Digits, test_set: Digits) -> dict[str, dict]:
    """Every figure: name -> {"drawn": its value for the images, "real": the same for real images}.

    images: (N, 1, 28, 28) in [-1, 1]; labels: (N,), what was asked for. Both kinds are compared with the test images, and
    the real ones are the first N training images, but for accuracy and copies, where these would find themselves: there
    the test images are the real ones.
    """
    n = len(images)
    test_images, test_labels = test_set[:]
    training = train_set[:][0]
    drawn, real, also_real = (in_batches(judge.features, x) for x in (images, test_images, training[:n]))
    share, each = accuracy(judge, images, labels)
    real_share, real_each = accuracy(judge, test_images, test_labels)
    results = {"accuracy": {"drawn": share, "real": real_share}}
    results |= {f"accuracy of {digit}": {"drawn": each[digit], "real": real_each[digit]} for digit in range(10)}
    results["Frechet distance"] = {"drawn": frechet_distance(judge, test_images, images),
                                   "real": frechet_distance(judge, test_images, training[:n])}
    drawn_spread, real_spread = spread(real, drawn), spread(real, also_real)
    results |= {name: {"drawn": drawn_spread[name], "real": real_spread[name]} for name in drawn_spread}
    results["copies"] = {"drawn": copied_share(images, training), "real": copied_share(test_images, training)}
    return results


def draw_neighbours(path: Path, images: Tensor, labels: Tensor, training: Tensor) -> None:
    """A row for each digit asked for: two drawn images, each beside the three training images nearest to it."""
    chosen = torch.cat([torch.where(labels == digit)[0][:2] for digit in range(10)])
    training_flat = training.flatten(1)
    order = torch.cdist(images[chosen].flatten(1), training_flat).topk(3, largest=False).indices
    rows = torch.cat([images[chosen][:, None], training[order]], dim=1)  # (20, 4, 1, 28, 28)
    figure, axes = show_canvas(tile(rows.flatten(0, 1).cpu(), columns=8), left=0, top=22)
    side = images.shape[-1]
    axes.set_xticks([i * (side + GAP) + side / 2 for i in range(8)], labels=["drawn", "1st", "2nd", "3rd"] * 2)
    figure.savefig(path)


def draw_images(model: DiT, n: int, seed: int, **settings) -> tuple[Tensor, Tensor]:
    """n images (n, 1, 28, 28) in [-1, 1], as many of each digit as of any other, and their labels (n,).

    settings: those of `generate`. Each BATCH_SIZE of them has a seed of its own, which follows from `seed`.
    """
    labels = torch.arange(n) % model.config.num_classes
    images = []
    with tqdm(total=n, desc="drawing", unit="img", mininterval=0.5) as bar:
        for number, part in enumerate(labels.split(BATCH_SIZE)):
            images.append(generate(model, part, seed=(seed * 10_000 + number) % 2**63, **settings))
            bar.update(len(part))
    border = (model.config.image_size - 28) // 2
    return F.pad(torch.cat(images).clamp(-1, 1), [-border] * 4), labels.to(images[0].device)


@torch.no_grad()
def bound(model: DiT, digits: Digits, seed: int) -> float:
    """The variational bound of real images under the model, a mean over `digits` in bits a dimension."""
    diffusion, device = GaussianDiffusion(T), digits.images.device
    network = tabulated(model, diffusion.timesteps, torch.arange(model.config.num_classes, device=device))
    size = min(BATCH_SIZE, len(digits))
    if len(digits) * T >= WORTH_COMPILING:
        x_0, y = digits[:size]
        network = compiled(network, x_0, torch.zeros_like(y), y)
    generator, total = torch.Generator(device).manual_seed(seed), 0.0
    for start in tqdm(range(0, len(digits), size), desc="bound", unit="batch"):
        x_0, y = digits[start:start + size]
        total += bits_per_dimension(diffusion, network, x_0, y, generator).sum().item()
    return total / len(digits)


def load_images(path: Path, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """What --save-images wrote: images, labels, and the name of the data set. CheckpointError if it is something else."""
    content = load_checkpoint(path, {"images": Tensor, "labels": Tensor})
    images, labels, dataset = content["images"], content["labels"], content.get("dataset", "mnist")
    fits = (images.shape == (len(labels), 1, 28, 28) and images.is_floating_point() and images.isfinite().all()
            and LEAST_IMAGES <= len(labels) <= MOST_IMAGES and labels.dtype == torch.int64
            and labels.unique().tolist() == list(range(10)))
    if not fits:
        raise CheckpointError(f"{path} does not hold {LEAST_IMAGES} to {MOST_IMAGES} images (N, 1, 28, 28) and their labels "
                              "(N,), each digit among them")
    return images.float().clamp(-1, 1).to(device), labels.to(device), dataset


def print_table(results: dict[str, dict]) -> None:
    """What `evaluate` returned, a row a figure."""
    print(f"{'':18}{'drawn':>10}{'real':>10}")
    for name, row in results.items():
        print(f"{name:18}" + "".join(f"{row[kind]:10.4f}" if kind in row else f"{'':10}" for kind in ("drawn", "real")))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked before any work is done; exits with a sentence where it is wrong."""
    parser = evaluate_parser()
    args = parser.parse_args(argv)
    check_sampling_options(parser, args)
    if not LEAST_IMAGES <= args.n <= MOST_IMAGES:
        parser.error(f"argument --n: must lie in [{LEAST_IMAGES}, {MOST_IMAGES}], not {args.n}")
    if not 0 <= args.bpd <= MNIST_TEST_IMAGES:
        parser.error(f"argument --bpd: must lie in [1, {MNIST_TEST_IMAGES}], not {args.bpd}")
    if args.neighbours and args.neighbours.suffix.lower() != ".png":
        parser.error(f"argument --neighbours: {args.neighbours} must end in .png")
    check_places(parser, args, args.json, args.neighbours, args.save_images)
    return args


def measure(args: argparse.Namespace) -> None:
    """Draw or load, measure, and write what was asked for. CheckpointError, DataError or OSError with a sentence."""
    if args.bpd or not args.images:
        model, info = load_drawing_model(args)
        dataset = info["recipe"].get("dataset", "mnist")
    if args.images:
        images, labels, drawn = load_images(args.images, args.device)
        if args.bpd and drawn != dataset:
            raise CheckpointError(f"{args.images} holds images of {drawn}, and {args.checkpoint} was trained on {dataset}")
        dataset = drawn
    train_set, test_set = (load_mnist(train, args.data_dir, args.device, dataset=dataset) for train in (True, False))
    judge = trained_recogniser(Path(args.data_dir) / f"recogniser.{dataset}.pth", train_set)
    if not args.images:
        images, labels = draw_images(model, args.n, args.seed, sampler=args.sampler, steps=args.steps, eta=args.eta,
                                     guidance=args.guidance, compile=args.n * args.steps >= WORTH_COMPILING)
    if args.save_images:
        save_checkpoint(args.save_images, {"images": images.cpu(), "labels": labels.cpu(), "dataset": dataset})
    results = evaluate(images, labels, judge, train_set, test_set)
    if args.bpd:
        some = load_mnist(False, args.data_dir, args.device, args.bpd, dataset, model.config.image_size)
        results["bits a dimension"] = {"real": bound(model, some, args.seed)}
    source = f"{args.images or args.checkpoint}: {len(images):,} images" + ("" if args.images else f", {described(args)}")
    print(source)
    print_table(results)
    if args.json:
        text = json.dumps({"source": source, **results}, indent=1)
        write_atomically(args.json, lambda path: path.write_text(text))
    if args.neighbours:
        write_atomically(args.neighbours, lambda path: draw_neighbours(path, images, labels, train_set[:][0]))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    keep_freed_memory()
    try:
        measure(args)
    except (CheckpointError, DataError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
