"""Sample digits from a checkpoint: reverse diffusion (DDPM Algorithm 2), step by step in inference.png.

    python inference.py                                      one image of each digit, 1000 steps of DDPM
    python inference.py --sampler ddim --digits 3 7 --per-digit 4 --gif digits.gif
    python inference.py --sampler ddim --columns 1 --per-digit 20      a sheet of 200 digits
"""

from runtime.start import before_torch

if __name__ == "__main__":
    before_torch()

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import GUIDANCE, SEEDS, STEPS, T
from diffusion import GaussianDiffusion, guided, noise
from dit import DiT
from runtime.checkpoint import CheckpointError, load_model
from runtime.files import check_files, here_or_in_project
from runtime.fused import fused
from runtime.pictures import denser_at_the_end, fits, save_animation, save_picture, show
from runtime.script import exit_status, pick_device, run_script
from runtime.speed import keep_freed_memory, recorded


def generate(model: DiT, labels: Tensor | Sequence[int], *, sampler: str = "ddpm", steps: int | None = None,
             eta: float = 0.0, guidance: float = GUIDANCE, seed: int | Sequence[int] = 0,
             diffusion: GaussianDiffusion | None = None, on_step: Callable[[int, Tensor], None] = lambda t, x_t: None) -> Tensor:
    """One image per label. labels: (N,) ints in [0, num_classes]; returns (N, C, H, W) in [-1, 1].

    sampler, steps: "ddpm" (1000 by default) or "ddim" (50); eta: noise of ddim, in [0, 1];
    guidance: 1 turns it off; seed: one, or several, each for as many of the images;
    on_step(t, x_t): see `GaussianDiffusion.sample`.
    ValueError if one is out of range, FloatingPointError if the result is not finite.
    """
    config, device = model.config, model.pos_embed.device
    diffusion = diffusion or GaussianDiffusion(device=device)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    for one in seeds:
        steps = check_settings(sampler, steps, eta, guidance, one)
    if guidance != 1 and config.class_dropout_prob == 0:
        raise ValueError("the network was trained without a null class: guidance must be 1")
    y = as_labels(labels, config.num_classes).to(device)
    if len(y) % len(seeds):
        raise ValueError(f"{len(y)} images cannot be shared evenly by {len(seeds)} seeds")
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    network = guided(diffusion.as_eps(fused(model, frozen=True), config.predicts), guidance, null_class=config.num_classes)
    network = recorded(network, device)  # on a GPU, as one CUDA graph
    x_T = noise((len(y), config.in_channels, config.image_size, config.image_size), generators)  # DDPM Algorithm 2, line 1
    x_0 = diffusion.sample(network, x_T.to(model.pos_embed), y, sampler=sampler, steps=steps, eta=eta,
                           generator=generators, on_step=on_step)
    if not x_0.isfinite().all():
        raise FloatingPointError("the network's output is not finite, so there is nothing to show")
    return x_0


def check_settings(sampler: str, steps: int | None, eta: float, guidance: float, seed: int) -> int:
    """The number of steps. ValueError if one of the settings of `generate` is out of range."""
    if sampler not in STEPS:
        raise ValueError(f"sampler must be one of {', '.join(STEPS)}, not {sampler!r}")
    steps = STEPS[sampler] if steps is None else steps
    ranges = {"steps": (steps, 1, T), "eta": (eta, 0, 1), "guidance": (guidance, 0, 100), "seed": (seed, *SEEDS)}
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in [{least}, {most}], not {value}")
    if eta and sampler != "ddim":
        raise ValueError("eta needs the sampler ddim")
    return steps


def as_labels(labels: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """(N,) int64. ValueError unless they are integers in [0, num_classes]."""
    with suppress(TypeError, ValueError, RuntimeError):
        y = torch.as_tensor(labels, device="cpu")
        torch.iinfo(y.dtype)  # an error for floats and bools
        if y.ndim == 1 and len(y) and set(y.tolist()) <= set(range(num_classes + 1)):
            return y.long()
    raise ValueError(f"labels must be integers in [0, {num_classes}], one per image")


def sample_pictures(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the command line asks for. CheckpointError or OSError with a one-sentence message."""
    diffusion = GaussianDiffusion(device=args.device)
    model = load_sampling_model(args, diffusion)
    print(f"{args.described}, with eps_hat = eps(null) + guidance (eps(digit) - eps(null))")
    y = torch.tensor(args.digits).repeat_interleave(args.per_digit)
    per_row = args.per_digit if args.per_digit > 1 else len(y)  # in the animation
    sizes = [(len(y), args.columns) if args.columns > 1 else (len(args.digits), args.per_digit),
             *([(len(y) // per_row, per_row)] if args.gif else [])]
    if not all(fits(*size, model.config.image_size) for size in sizes):
        parser.error("the picture is too large: try fewer --digits, --per-digit or --columns")
    all_times = [*(diffusion.respaced(args.steps).timesteps.flip(0) + 1).tolist(), 0]
    times = denser_at_the_end(all_times, args.columns)
    frames = denser_at_the_end(all_times, 31) if args.gif else []
    kept = {}  # t -> x_t
    with tqdm(total=args.steps, unit="step", mininterval=0.5) as bar:

        def on_step(t: int, x_t: Tensor) -> None:
            bar.update(int(t < T))  # the first call shows the noise, before any step
            if t in times or t in frames:
                kept[t] = x_t.cpu()

        generate(model, y, sampler=args.sampler, steps=args.steps, eta=args.eta,
                 guidance=args.guidance, seed=args.seed, diffusion=diffusion, on_step=on_step)
    rows, columns, names = kept[0].split(args.per_digit), [], args.digits
    if args.columns > 1:
        rows, columns, names = torch.stack([kept[t] for t in times], 1), [f"t={t}" for t in times], y.tolist()
    save_picture(args.output, lambda: show(rows, columns, [str(digit) for digit in names]))
    print(f"wrote {args.output}")
    if args.gif:
        save_animation(args.gif, [kept[t].split(per_row) for t in frames], [f"t = {t}" for t in frames])
        print(f"wrote {args.gif}")


# The command line

def load_sampling_model(args: argparse.Namespace, diffusion: GaussianDiffusion) -> DiT:
    """The network of the command line. CheckpointError if it cannot sample what is asked for."""
    model, info = load_model(args.checkpoint, args.device, diffusion)
    config = model.config
    if (config.in_channels, config.num_classes) != (1, 10) or config.image_size < 28 or config.image_size % 2:
        raise CheckpointError(f"{args.checkpoint} is not of a network for MNIST images")
    if config.class_dropout_prob == 0 and args.guidance != 1:
        raise CheckpointError(f"{args.checkpoint} was trained without a null class: use --guidance 1")
    print(f"{args.checkpoint}: EMA model after {info['step']:,} training steps, on {args.device}")
    return model


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, and where the weights come from."""
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--sampler", choices=tuple(STEPS), default="ddpm", help=f"ancestral sampling, or DDIM {default}")
    usual = ", ".join(f"{steps} for {sampler}" for sampler, steps in STEPS.items())
    add("--steps", type=int, help=f"at most {T} (default: {usual})")
    add("--eta", type=float, default=0.0, help=f"noise of ddim: 0 is none, 1 as much as ddpm {default}")
    add("--guidance", type=float, default=GUIDANCE, metavar="S", help=f"strength; 1 turns it off {default}")
    add("--seed", type=int, default=0, help=f"random seed of the noise {default}")
    add("--checkpoint", type=Path, default=Path("model.pth"), help=f"the weights {default}")
    add("--device", default="auto", help=f"cpu, cuda, mps, ...; auto is a GPU if there is one {default}")


def check_sampling_options(parser: argparse.ArgumentParser, args: argparse.Namespace,
                           outputs: Sequence[Path | None], **ranges: tuple[float, float]) -> None:
    """Exit with an error message if an option or a file cannot be used. Fills in the steps, the device and `described`."""
    for name, (least, most) in ranges.items():
        if not least <= getattr(args, name) <= most:
            option = name.replace("_", "-")
            parser.error(f"argument --{option}: must lie in [{least}, {most}], not {getattr(args, name)}")
    try:
        args.steps = check_settings(args.sampler, args.steps, args.eta, args.guidance, args.seed)
    except ValueError as error:
        parser.error(str(error))
    sampler = args.sampler if args.sampler == "ddpm" else f"{args.sampler}, eta {args.eta:g}"
    args.described = f"{sampler}, {args.steps} steps, guidance {args.guidance:g}, seed {args.seed}"
    args.checkpoint = here_or_in_project(args.checkpoint)
    try:
        check_files(outputs, [args.checkpoint])
        args.device = pick_device(args.device)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("inference.py", description="Sample digits from a trained DiT.", allow_abbrev=False)
    add = parser.add_argument
    add("--digits", type=int, nargs="+", choices=range(10), metavar="D", default=range(10),
        help="default: 0 to 9")
    add("--per-digit", type=int, default=1, metavar="N", help="images of each digit (default: %(default)s)")
    add("--columns", type=int, default=11, metavar="N",
        help="times to show; 1: only the final digits, --per-digit in a row (default: %(default)s)")
    add_sampling_options(parser)
    add("--output", type=Path, default=Path("inference.png"), help="the picture (default: %(default)s)")
    add("--gif", type=Path, metavar="FILE", help="write an animation of the denoising too")
    args = parser.parse_args(argv)
    for path, suffixes in ((args.output, (".png", ".jpg", ".pdf", ".svg")), (args.gif, (".gif",))):
        if path and path.suffix.lower() not in suffixes:
            parser.error(f"{path} must end in {' or '.join(suffixes)}")
    check_sampling_options(parser, args, [args.output, args.gif], per_digit=(1, 10_000), columns=(1, T + 1))
    keep_freed_memory()
    return exit_status(parser, lambda: sample_pictures(parser, args))


if __name__ == "__main__":
    sys.exit(run_script(main))
