"""Sample digits from a checkpoint: reverse diffusion from noise (DDPM Algorithm 2), step by step in inference.png.

    python inference.py                                      one image of each digit, 1000 steps of DDPM
    python inference.py --sampler ddim --digits 3 7 --per-digit 4 --gif digits.gif
    python inference.py --sampler ddim --columns 1 --per-digit 20      a sheet of 200 digits
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, ends without a traceback

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import GUIDANCE, STEPS, T, pick_device
from diffusion import GaussianDiffusion, guided
from dit import DiT
from runtime.checkpoint import CheckpointError, load_model
from runtime.fused import fused
from runtime.pictures import GAP, LARGEST_SIDE, ZOOM, save_animation, save_picture, show
from runtime.script import check_files, exit_status, positive_int, run_script
from runtime.speed import keep_freed_memory

COLUMNS, FRAMES = 11, 31  # of inference.png and of the animation, by default


def generate(model: DiT, labels: Tensor | Sequence[int], *, sampler: str = "ddpm", steps: int | None = None,
             eta: float = 0.0, guidance: float = GUIDANCE, seed: int = 0,
             on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Sample one image per label. labels: (N,) ints in [0, num_classes]; returns (N, C, H, W) in [-1, 1].

    sampler, steps: "ddpm" (1000 by default) or "ddim" (50); eta: of ddim, in [0, 1]; guidance: 1 is none; on_step(t, x_t):
    see `GaussianDiffusion.ddpm_sample`. ValueError for what is out of range.
    """
    config, device = model.config, model.pos_embed.device
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point() or labels.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"labels must be whole numbers (N,), not {labels.dtype} {tuple(labels.shape)}")
    if not ((labels >= 0) & (labels <= config.num_classes)).all():
        raise ValueError(f"labels must lie in [0, {config.num_classes}], not {labels.tolist()}")
    if sampler not in STEPS:
        raise ValueError(f"sampler must be one of {', '.join(STEPS)}, not {sampler!r}")
    if eta and sampler != "ddim":
        raise ValueError("eta goes with the sampler ddim")
    labels = labels.long().to(device)
    network = guided(fused(model, frozen=True), guidance, null_class=config.num_classes)
    diffusion, generator = GaussianDiffusion(T), torch.Generator(device).manual_seed(seed)
    sample = diffusion.ddpm_sample if sampler == "ddpm" else partial(diffusion.ddim_sample, eta=eta)
    x_T = torch.randn(len(labels), config.in_channels, config.image_size, config.image_size, generator=generator,
                      device=device, dtype=model.pos_embed.dtype)
    return sample(network, x_T.shape, labels, steps=STEPS[sampler] if steps is None else steps, generator=generator, x_T=x_T,
                  on_step=on_step)


class Snapshots:
    """An `on_step` that keeps `count` of the `total` images on the way, from the noise to the final sample.

    Denser towards the end, where the digit takes shape: the i-th at the time T (1 - i / (count - 1))^1.5.
    """

    def __init__(self, total: int, count: int):
        self.wanted = {round((total - 1) * (1 - (1 - i / max(count - 1, 1)) ** 1.5)) for i in range(count)} | {total - 1}
        if count == 1:
            self.wanted = {total - 1}
        self.seen = 0
        self.times: list[int] = []
        self.images: list[Tensor] = []

    def __call__(self, t: int, x_t: Tensor) -> None:
        if self.seen in self.wanted:
            self.times.append(t)
            self.images.append(x_t.cpu())
        self.seen += 1


def load_sampling_model(args: argparse.Namespace) -> tuple[DiT, dict]:
    """The network of the command line and the other entries of its checkpoint. CheckpointError if it cannot sample so."""
    model, info = load_model(args.checkpoint, args.device)
    config = model.config
    if config.in_channels != 1 or config.num_classes != 10 or config.image_size < 28:
        raise CheckpointError(f"{args.checkpoint} is of a network for other images than MNIST's")
    if config.class_dropout_prob == 0 and args.guidance != 1:
        raise CheckpointError(f"{args.checkpoint} was trained without dropped labels, so it has no null class to guide "
                              "with: use --guidance 1")
    print(f"{args.checkpoint}: EMA model after {info['step']:,} training steps, on {args.device}")
    return model, info


def sample_pictures(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the command line asks for. CheckpointError or OSError with a sentence."""
    model, _ = load_sampling_model(args)
    labels = torch.tensor(args.digits).repeat_interleave(args.per_digit)
    beside = args.per_digit if args.per_digit > 1 else len(labels)  # images in a row of the animation
    sides = [len(args.digits), args.per_digit] if args.columns == 1 else [len(labels), args.columns]
    sides += [beside, len(labels) // beside] * bool(args.gif)
    if max(sides) * (model.config.image_size + GAP) * ZOOM > LARGEST_SIDE:
        parser.error(f"a picture of so many images would be more than {LARGEST_SIDE:,} pixels wide or high")
    print(f"{described(args)} in the convention eps(null) + s (eps(digit) - eps(null)), where 1 is none")
    grid, frames = Snapshots(args.steps + 1, args.columns), Snapshots(args.steps + 1, FRAMES)
    with tqdm(total=args.steps, unit="step", mininterval=0.5) as bar:

        def on_step(t: int, x_t: Tensor) -> None:
            grid(t, x_t)
            frames(t, x_t)
            bar.update(grid.seen > 1)  # the first call shows the noise, before any step

        images = generate(model, labels, sampler=args.sampler, steps=args.steps, eta=args.eta, guidance=args.guidance,
                          seed=args.seed, on_step=on_step).cpu()
    if args.columns == 1:
        rows, columns, names = images.split(args.per_digit), [], map(str, args.digits)
    else:  # from the noise on the left to the final sample on the right
        rows, columns, names = torch.stack(grid.images, dim=1), [f"t={t}" for t in grid.times], map(str, labels.tolist())
    save_picture(args.output, lambda: show(rows, columns, list(names)))
    print(f"wrote {args.output}")
    if args.gif:
        save_animation(args.gif, [images.split(beside) for images in frames.images], [f"t = {t}" for t in frames.times])
        print(f"wrote {args.gif}")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, and where the weights come from."""
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--sampler", choices=tuple(STEPS), default="ddpm", help=f"ancestral sampling, or DDIM {default}")
    add("--steps", type=positive_int,
        help=f"sampling steps, at most {T} (default: {', '.join(f'{n} for {name}' for name, n in STEPS.items())})")
    add("--eta", type=float, default=0.0, help=f"noise of ddim, from 0, none, to 1, as much as ddpm {default}")
    add("--guidance", type=float, metavar="S", default=GUIDANCE, help="strength of eps(null) + S (eps(digit) - eps(null)): "
        f"1 is none; more makes digits more typical and less varied {default}")
    add("--seed", type=int, default=0, help=f"of the noise {default}")
    add("--checkpoint", type=Path, default=Path("model.pth"), help=f"the weights {default}")
    add("--device", default="auto", help=f"cpu, cuda, mps, ...; auto is a GPU when there is one {default}")


def check_sampling_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a sentence if one of them is out of its range; fill in the steps and the device."""
    if [] in vars(args).values():
        parser.error("an option lacks its value")  # argparse reads --steps=-- as an empty list
    args.steps = STEPS[args.sampler] if args.steps is None else args.steps
    for name, least, most in (("steps", 1, T), ("eta", 0, 1), ("guidance", 0, 100), ("seed", 0, 2**63 - 1)):
        if not least <= getattr(args, name) <= most:
            parser.error(f"argument --{name}: must lie in [{least}, {most}], not {getattr(args, name)}")
    if args.eta and args.sampler != "ddim":
        parser.error("argument --eta: goes with --sampler ddim")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")


def described(args: argparse.Namespace) -> str:
    """How the digits are sampled, in words."""
    eta = f", eta {args.eta:g}" if args.sampler == "ddim" else ""
    return f"{args.sampler}, {args.steps} steps{eta}, seed {args.seed}, guidance {args.guidance:g}"


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked before any work is done; exits with a sentence where it is wrong."""
    add = parser.add_argument
    add("--digits", type=int, nargs="+", metavar="D", default=list(range(10)), help="a row each (default: 0 to 9)")
    add("--per-digit", type=positive_int, default=1, metavar="N", help="images of each digit (default: %(default)s)")
    add("--columns", type=positive_int, default=COLUMNS, metavar="N",
        help="times to show; 1 gives a sheet of final digits, a row of --per-digit each (default: %(default)s)")
    add_sampling_options(parser)
    add("--output", type=Path, default=Path("inference.png"), help="the picture (default: %(default)s)")
    add("--gif", type=Path, metavar="FILE", help="write an animation of the denoising too")
    args = parser.parse_args(argv)
    check_sampling_options(parser, args)
    if not all(0 <= digit < 10 for digit in args.digits):
        parser.error(f"argument --digits: must lie in [0, 9], not {args.digits}")
    for path, name, suffixes in ((args.output, "output", (".png", ".jpg", ".pdf", ".svg")), (args.gif, "gif", (".gif",))):
        if path and path.suffix.lower() not in suffixes:
            parser.error(f"argument --{name}: {path} must end in {' or '.join(suffixes)}")
    try:
        check_files([args.output, args.gif], inputs=[args.checkpoint])
    except OSError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("inference.py", description="Sample digits from a trained DiT.", allow_abbrev=False)
    args = parse_args(parser, argv)
    keep_freed_memory()
    return exit_status(parser, lambda: sample_pictures(parser, args))


if __name__ == "__main__":
    sys.exit(run_script(main))
