"""Draw digits from a checkpoint: reverse diffusion from pure noise, shown step by step in inference.png.

    python inference.py                                      one image a digit, 1000 steps of DDPM
    python inference.py --sampler ddim --steps 50 --digits 3 7 --per-digit 4 --gif digits.gif
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from arguments import check_sampling_options, described, inference_parser

if __name__ == "__main__":
    inference_parser().parse_args()  # here already, so that --help does not wait for torch

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from config import GUIDANCE, STEPS, T, pick_device
from diffusion import GaussianDiffusion, guided
from dit import DiT
from runtime.checkpoint import CheckpointError, check_writable, load_model, write_atomically
from runtime.speed import compiled, keep_freed_memory, tabulated

COLUMNS = 11  # of inference.png: t = 1000, 900, ..., 0
MAX_ROWS = 500  # of inference.png: about the height that picture viewers bear
FRAMES = 31  # of the animation
GAP, ZOOM = 2, 2  # pixels between two images; screen pixels a pixel


def generate(model: DiT, labels: Tensor, *, sampler: str = "ddpm", steps: int | None = None, eta: float = 0.0,
             guidance: float = 1.0, seed: int = 0, on_step: Callable[[int, Tensor], None] | None = None,
             compile: bool = False) -> Tensor:
    """Draw one image a label. labels: (N,) ints in [0, num_classes]; returns (N, C, H, W) in [-1, 1].

    sampler, steps: "ddpm" (1000 unless given) or "ddim" (50); eta: of ddim; guidance: 1 is none, and suits weights that
    learned it; 1.5 suits others; on_step(t, x_t): see `GaussianDiffusion.ddpm_sample`; compile: torch.compile where the
    blocks are not `fused`, as on a GPU, worth its half minute for thousands of images. ValueError for what is out of range.
    """
    config, device = model.config, model.pos_embed.device
    if not ((labels >= 0) & (labels <= config.num_classes)).all():
        raise ValueError(f"labels must lie in [0, {config.num_classes}], not {labels.tolist()}")
    if sampler not in STEPS:
        raise ValueError(f"sampler must be one of {', '.join(STEPS)}, not {sampler!r}")
    if eta and sampler != "ddim":
        raise ValueError("eta goes with the sampler ddim")
    steps, labels = STEPS[sampler] if steps is None else steps, labels.to(device)
    diffusion = GaussianDiffusion(T)
    sample = diffusion.ddpm_sample if sampler == "ddpm" else partial(diffusion.ddim_sample, eta=eta)
    network = tabulated(model, diffusion.respaced(steps).timesteps, labels)
    shape = (len(labels), config.in_channels, config.image_size, config.image_size)
    if compile:
        batch_size = len(labels) * (1 if guidance in (0, 1) else 2)
        x_t, t, y = torch.zeros(batch_size, *shape[1:], device=device), *torch.zeros(2, batch_size, device=device).long()
        with torch.no_grad():
            network = compiled(network, x_t, t, y)
    return sample(guided(network, guidance, null_class=config.num_classes), shape, labels, steps=steps,
                  generator=torch.Generator(device).manual_seed(seed), on_step=on_step)


class Snapshots:
    """An `on_step` that keeps `count` of the `total` images on the way, evenly spaced, the first and the last included."""

    def __init__(self, total: int, count: int):
        count = min(count, total)
        self.wanted = {round(i * (total - 1) / max(count - 1, 1)) for i in range(count)}
        self.seen = 0
        self.times: list[int] = []
        self.images: list[Tensor] = []

    def __call__(self, t: int, x_t: Tensor) -> None:
        if self.seen in self.wanted:
            self.times.append(t)
            self.images.append(x_t.cpu())
        self.seen += 1


def tile(images: Tensor, columns: int) -> Tensor:
    """(rows * columns, 1, H, W) -> (rows * (H + GAP), columns * (W + GAP)), row by row, white between the images."""
    _, _, H, W = images.shape
    padded = torch.nn.functional.pad(images[:, 0].clamp(-1, 1), (0, GAP, 0, GAP), value=1.0)
    return padded.reshape(-1, columns, H + GAP, W + GAP).transpose(1, 2).reshape(-1, columns * (W + GAP))


def show_canvas(canvas: Tensor, left: int, top: int) -> tuple[Figure, Axes]:
    """A figure of the canvas at ZOOM x ZOOM screen pixels a pixel (sharp, and small as a file), with margins in pixels."""
    height, width = (ZOOM * side for side in canvas.shape)
    figure = Figure(figsize=((left + width) / 100, (top + height) / 100), dpi=100)
    FigureCanvasAgg(figure)  # what the animation is drawn on
    axes = figure.add_axes((left / (left + width), 0, width / (left + width), height / (top + height)))
    axes.imshow(canvas.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
    axes.set(xticks=[], yticks=[])
    return figure, axes


def draw_grid(path: Path, labels: list[int], times: list[int], snapshots: list[Tensor]) -> None:
    """A row a label, a column a time, from the noise on the left to the final sample on the right."""
    columns, side = len(times), snapshots[0].shape[-1]
    figure, axes = show_canvas(tile(torch.stack(snapshots, dim=1).flatten(0, 1), columns), left=22, top=22)
    axes.set_yticks([i * (side + GAP) + side / 2 for i in range(len(labels))], labels=[str(label) for label in labels])
    axes.set_xticks([i * (side + GAP) + side / 2 for i in range(columns)], labels=[f"t={times[0]}", *map(str, times[1:])])
    figure.savefig(path)


def draw_animation(path: Path, columns: int, times: list[int], snapshots: list[Tensor]) -> None:
    """The denoising as a GIF, `columns` images in a row, with a pause on the final samples."""
    canvases = [tile(images, columns) for images in snapshots]
    canvases = [((canvas + 1) * 3.5).round() / 3.5 - 1 for canvas in canvases]  # 8 greys: noise compresses badly
    figure, axes = show_canvas(canvases[0], left=0, top=22)
    picture, title = axes.images[0], axes.set_title("", fontsize=9)

    def show(frame: int) -> list[Artist]:
        picture.set_data(canvases[frame].numpy())
        title.set_text(f"t = {times[frame]}")
        return [picture, title]

    frames = [*range(len(times)), *[len(times) - 1] * 20]
    FuncAnimation(figure, show, frames=frames).save(path, writer=PillowWriter(fps=8))


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = inference_parser()
    args = parser.parse_args(argv)
    check_sampling_options(parser, args)
    if len(args.digits) * args.per_digit > MAX_ROWS:
        parser.error(f"a picture has at most {MAX_ROWS} rows, not {len(args.digits)} digits x {args.per_digit}")
    if args.output.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        parser.error(f"argument --output: {args.output} must end in .png, .jpg, .pdf or .svg")
    if args.gif and args.gif.suffix.lower() != ".gif":
        parser.error(f"argument --gif: {args.gif} must end in .gif")
    check_places(parser, args, args.output, args.gif)
    return parser, args


def check_places(parser: argparse.ArgumentParser, args: argparse.Namespace, *files: Path | None) -> None:
    """Exit with a sentence if one of the files could not be written or there is no such device; turn its name into it."""
    for path in filter(None, files):
        if path.absolute() == args.checkpoint.absolute():
            parser.error(f"{path} is the checkpoint: choose another place")
        try:
            check_writable(path)
        except OSError as error:
            parser.error(str(error))
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")


def load_drawing_model(args: argparse.Namespace) -> tuple[DiT, dict]:
    """The network of the command line and the other entries of its checkpoint; fills in the guidance that suits it.

    CheckpointError if it cannot draw so.
    """
    model, info = load_model(args.checkpoint, args.device)
    config = model.config
    if config.in_channels != 1 or config.num_classes != 10 or config.image_size < 28:
        raise CheckpointError(f"{args.checkpoint} is of a network for other images than MNIST's")
    if args.guidance is None:
        args.guidance = GUIDANCE if config.class_dropout_prob and info["recipe"].get("learn_guidance", 1) == 1 else 1.0
    if config.class_dropout_prob == 0 and args.guidance != 1:
        raise CheckpointError(f"{args.checkpoint} was trained without dropped labels, so that there is nothing to guide "
                              "with: use --guidance 1")
    return model, info


def draw(model: DiT, info: dict, args: argparse.Namespace) -> None:
    begun = f" from {info['recipe']['start_from']}" if info["recipe"].get("start_from") else ""
    print(f"{args.checkpoint}: EMA weights after {info['step']:,} training steps{begun}, on {args.device}")
    print(f"{described(args)} in the convention eps(null) + s (eps(digit) - eps(null)), where 1 is none")
    labels = torch.tensor(args.digits).repeat_interleave(args.per_digit)
    columns, frames = Snapshots(args.steps + 1, COLUMNS), Snapshots(args.steps + 1, FRAMES)
    with tqdm(total=args.steps, unit="step", mininterval=0.5) as bar:

        def on_step(t: int, x_t: Tensor) -> None:
            columns(t, x_t)
            frames(t, x_t)
            bar.update(columns.seen > 1)  # the first call shows the noise, before any step

        generate(model, labels, sampler=args.sampler, steps=args.steps, eta=args.eta, guidance=args.guidance,
                 seed=args.seed, on_step=on_step)
    write_atomically(args.output, lambda path: draw_grid(path, labels.tolist(), columns.times, columns.images))
    print(f"wrote {args.output}")
    if args.gif:
        in_a_row = args.per_digit if args.per_digit > 1 else len(args.digits)
        write_atomically(args.gif, lambda path: draw_animation(path, in_a_row, frames.times, frames.images))
        print(f"wrote {args.gif}")


def main(argv: list[str] | None = None) -> int:
    parser, args = parse_args(argv)
    keep_freed_memory()
    try:
        model, info = load_drawing_model(args)
        for digit in args.digits:
            if not 0 <= digit < model.config.num_classes:
                parser.error(f"argument --digits: must lie in [0, {model.config.num_classes}), not {digit}")
        draw(model, info, args)
    except (CheckpointError, OSError) as error:
        print(f"inference.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
