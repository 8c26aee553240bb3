"""Sample digits from a checkpoint: reverse diffusion (DDPM Algorithm 2), shown in inference.png.

    python inference.py                                one image of each digit, 1000 steps of DDPM
    python inference.py --sampler ddim --digits 3 7 --per-digit 4 --gif digits.gif
"""

from runtime.start import before_torch

if __name__ == "__main__":  # it sets what torch reads when it is imported
    before_torch()

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import GUIDANCE, SEEDS, STEPS, T, require
from diffusion import GaussianDiffusion, guided, noise
from dit import DiT
from runtime.checkpoint import CheckpointError, load_model
from runtime.files import check_files, here_or_in_project
from runtime.fused import fused
from runtime.pictures import denser_at_the_end, save_animation, save_picture, show
from runtime.script import exit_status, pick_device
from runtime.speed import keep_freed_memory, recorded


def generate(model: DiT, labels: Tensor | Sequence[int], *, sampler: str = "ddpm",
             steps: int | None = None, eta: float = 0.0, guidance: float = GUIDANCE,
             seed: int | Sequence[int] = 0, diffusion: GaussianDiffusion | None = None,
             on_step: Callable[[int, Tensor], None] = lambda t, x_t: None) -> Tensor:
    """One image per label: (N, C, H, W) in [-1, 1]. labels: (N,) ints in [0, num_classes].

    sampler, steps: "ddpm" (1000 by default) or "ddim" (50); eta: noise of ddim, in [0, 1];
    guidance: 1 turns it off; seed: one, or several for equal shares of the images;
    on_step(t, x_t): see `GaussianDiffusion.sample`.
    SettingError (a ValueError) if one is out of range, FloatingPointError if the result is nan.
    """
    config, device, null_class = model.config, model.pos_embed.device, model.config.num_classes
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    y = torch.as_tensor(labels, device="cpu")
    require(y.ndim == 1 and all(label in range(null_class + 1) for label in y.tolist()),
            f"labels must be integers in [0, {null_class}], one per image")
    require(sampler in STEPS, f"sampler must be one of {', '.join(STEPS)}, not {sampler!r}")
    steps = STEPS[sampler] if steps is None else steps
    for name, value, least, most in (("eta", eta, 0, 1), ("guidance", guidance, 0, 100),
                                     *(("seed", one, *SEEDS) for one in seeds)):
        require(least <= value <= most, f"{name} must lie in [{least}, {most}], not {value}")
    require(eta == 0 or sampler == "ddim", "eta needs the sampler ddim")
    require(guidance == 1 or config.class_dropout_prob > 0,
            "the network was trained without a null class: guidance must be 1")
    require(len(y) % len(seeds) == 0, f"{len(y)} images cannot be shared by {len(seeds)} seeds")
    diffusion = diffusion or GaussianDiffusion(device=device)
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    eps_model = diffusion.as_eps(fused(model, frozen=True), config.predicts)  # C++ on a CPU
    guided_model = recorded(guided(eps_model, guidance, null_class), device)  # CUDA graph on a GPU
    shape = len(y), config.in_channels, config.image_size, config.image_size
    x_T = noise(shape, generators).to(model.pos_embed)  # DDPM Algorithm 2, line 1
    x_0 = diffusion.sample(guided_model, x_T, y.long().to(device), sampler=sampler, steps=steps,
                           eta=eta, generator=generators, on_step=on_step)
    if not x_0.isfinite().all():
        raise FloatingPointError("the network's output is not finite, so there is nothing to show")
    return x_0


# The command line

def sample_pictures(args: argparse.Namespace) -> None:
    """What the command line asks for. CheckpointError, OSError or SettingError if it cannot be."""
    model, diffusion = open_checkpoint(args, [args.output, args.gif])
    print(f"{args.sampler}, {args.steps} steps, eta {args.eta:g}, seed {args.seed}, eps_hat = "
          f"eps(null) + {args.guidance:g} (eps(digit) - eps(null))")
    count = len(args.digits) * args.per_digit
    require(1 <= count <= 1000 and args.per_digit <= 500 and 1 <= args.columns <= 20_000 // count,
            f"a picture holds 1 to 1000 digits (500 of each) and 1 to 20,000 images, not {count} "
            f"digits at {args.columns} times: see --per-digit and --columns")
    y = torch.tensor(args.digits).repeat_interleave(args.per_digit)
    all_times = [*reversed((diffusion.respaced(args.steps).timesteps + 1).tolist()), 0]
    times = denser_at_the_end(all_times, args.columns)  # of the picture's columns
    frames = denser_at_the_end(all_times, 31) if args.gif else []  # of the animation
    kept = {}  # t -> x_t
    with tqdm(total=args.steps, unit="step", mininterval=0.5) as bar:

        def on_step(t: int, x_t: Tensor) -> None:
            bar.update(int(t < T))  # the first call shows the noise, before any step
            if t in times or t in frames:
                kept[t] = x_t.cpu()

        generate(model, y, sampler=args.sampler, steps=args.steps, eta=args.eta,
                 guidance=args.guidance, seed=args.seed, diffusion=diffusion, on_step=on_step)
    rows, columns, names = kept[0].split(args.per_digit), [], args.digits  # a row per digit
    if args.columns > 1:  # a row per image, from noise to clean
        rows, names = torch.stack([kept[t] for t in times], dim=1), y.tolist()
        columns = [f"t={t}" for t in times]
    save_picture(args.output, lambda: show(rows, columns, [str(digit) for digit in names]))
    print(f"wrote {args.output}")
    if args.gif:
        per_row = args.per_digit if args.per_digit > 1 else count
        save_animation(args.gif, [kept[t].split(per_row) for t in frames],
                       [f"t = {t}" for t in frames])
        print(f"wrote {args.gif}")


def open_checkpoint(args: argparse.Namespace, outputs: Sequence[Path | None]
                    ) -> tuple[DiT, GaussianDiffusion]:
    """The network of the command line. Fills in the steps, the device and the path.

    CheckpointError unless it is one for MNIST, SettingError for places that cannot be written.
    """
    args.steps = STEPS[args.sampler] if args.steps is None else args.steps
    args.device = pick_device(args.device)
    args.checkpoint = here_or_in_project(args.checkpoint)
    check_files(outputs)
    diffusion = GaussianDiffusion(device=args.device)
    model, info = load_model(args.checkpoint, args.device)
    c = model.config
    if (c.in_channels, c.num_classes) != (1, 10) or c.image_size < 28 or c.image_size % 2:
        raise CheckpointError(f"{args.checkpoint} is not of a network for MNIST images")
    print(f"{args.checkpoint}: EMA model after {info['step']:,} training steps, on {args.device}")
    return model, diffusion


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, and where the weights come from; evaluate.py has them too."""
    add, default = parser.add_argument, "(default: %(default)s)"
    usual = ", ".join(f"{steps} for {sampler}" for sampler, steps in STEPS.items())
    add("--sampler", choices=tuple(STEPS), default="ddpm", help=f"ddim needs fewer steps {default}")
    add("--steps", type=int, help=f"at most {T} (default: {usual})")
    add("--eta", type=float, default=0.0, help=f"noise of ddim; 1: as much as ddpm's {default}")
    add("--guidance", type=float, default=GUIDANCE, help=f"strength; 1 turns it off {default}")
    add("--seed", type=int, default=0, help=f"random seed of the noise {default}")
    add("--checkpoint", type=Path, default=Path("model.pth"), help=f"the weights {default}")
    add("--device", default="auto", help=f"cpu, cuda, mps; auto: a GPU if there is one {default}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("inference.py", allow_abbrev=False,
                                     description="Sample digits from a trained DiT.")
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--digits", type=int, nargs="+", choices=range(10), default=range(10), metavar="D",
        help="default: 0 to 9")
    add("--per-digit", type=int, default=1, help=f"images of each digit {default}")
    add("--columns", type=int, default=11, help=f"times to show; 1: final digits only {default}")
    add_sampling_options(parser)
    add("--output", type=Path, default=Path("inference.png"), help=f"the picture {default}")
    add("--gif", type=Path, help="also write an animation of the denoising")
    args = parser.parse_args(argv)
    for path, suffixes in ((args.output, (".png", ".jpg", ".pdf", ".svg")), (args.gif, (".gif",))):
        if path and path.suffix.lower() not in suffixes:
            parser.error(f"{path} must end in {' or '.join(suffixes)}")
    keep_freed_memory()
    return exit_status(parser, lambda: sample_pictures(args))


if __name__ == "__main__":
    sys.exit(main())
