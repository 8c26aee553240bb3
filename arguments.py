"""The command lines of the three scripts.

Nothing here imports torch, which takes seconds: --help, and most mistakes, are answered at once.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from config import GUIDANCE, MNIST_TEST_IMAGES, PAPER, STEPS, ModelConfig, T, TrainConfig


def train_parser() -> argparse.ArgumentParser:
    """`train.py`: an option for each field of the two configs that has a help text, its default and type the field's.

    --model is left out of the result unless it is given: it is no field, but sets the defaults of others.
    """
    parser = argparse.ArgumentParser(description="Train a Diffusion Transformer on MNIST.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on with the run that left model.resume.pth")
    for title, config_class in (("recipe", TrainConfig), ("network", ModelConfig)):
        group = parser.add_argument_group(title)
        for f in fields(config_class):
            if "help" in f.metadata:
                # An action of its own, as --compile and --no-compile have, takes no type.
                typed = {} if "action" in f.metadata else {"type": type(f.default)}
                group.add_argument("--" + f.name.replace("_", "-"), default=f.default, **typed, **f.metadata)
    group.add_argument("--model", choices=tuple(PAPER), metavar="NAME", default=argparse.SUPPRESS,
                       help=f"take what this group leaves open from one of the paper's models: {', '.join(PAPER)}")
    return parser


def parse_train_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """What the command line says; with --model, what it leaves open is the named model's."""
    named = getattr(parser.parse_args(argv), "model", None)
    if named:
        parser.set_defaults(**{f.name: getattr(PAPER[named], f.name) for f in fields(ModelConfig) if "help" in f.metadata})
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace, config_class: type) -> dict:
    """The fields of a config that are options, with the values of the command line."""
    return {f.name: getattr(args, f.name) for f in fields(config_class) if "help" in f.metadata}


def inference_parser() -> argparse.ArgumentParser:
    """`inference.py`: what to draw, how, and where to."""
    parser = argparse.ArgumentParser(description="Draw digits with a trained DiT.", allow_abbrev=False)
    add = parser.add_argument
    add("--digits", type=int, nargs="+", metavar="D", default=list(range(10)), help="a row each (default: 0 to 9)")
    add("--per-digit", type=positive_int, default=1, metavar="N", help="images of each digit (default: %(default)s)")
    add_sampling_options(parser)
    add("--output", type=Path, default=Path("inference.png"), help="the picture (default: %(default)s)")
    add("--gif", type=Path, metavar="FILE", help="write an animation of the denoising too")
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    """`evaluate.py`: what to measure, and which files to keep."""
    parser = argparse.ArgumentParser(description="Measure how good the digits of a checkpoint are.", allow_abbrev=False)
    add = parser.add_argument
    add("--n", type=positive_int, default=10_000, help="images to draw (default: 10000)")
    add_sampling_options(parser)
    add("--data-dir", default="mnist", help="folder that holds MNIST/raw/; the recogniser is kept there (default: mnist)")
    add("--bpd", type=positive_int, nargs="?", const=MNIST_TEST_IMAGES, default=0, metavar="N",
        help="measure the variational bound of N test images too, of all unless told, given their labels and without "
        "guidance, in bits a pixel: 1000 evaluations an image")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    add("--neighbours", type=Path, metavar="FILE", help="draw some digits beside their nearest training images")
    add("--save-images", type=Path, metavar="FILE", help="keep the drawn images and their labels")
    add("--images", type=Path, metavar="FILE", help="measure such a file, and draw nothing")
    return parser


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`, and where the weights come from."""
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--sampler", choices=tuple(STEPS), default="ddpm", help=f"ancestral sampling, or DDIM {default}")
    add("--steps", type=positive_int,
        help=f"sampling steps, at most {T} (default: {', '.join(f'{n} for {name}' for name, n in STEPS.items())})")
    add("--eta", type=float, default=0.0, help=f"noise of ddim, from 0, none, to 1, as much as ddpm {default}")
    add("--guidance", type=float, metavar="S", help="strength of eps(null) + S (eps(digit) - eps(null)): 1 is none, more "
        f"makes digits more typical and less varied (default: 1 for weights that learned guidance, else {GUIDANCE:g})")
    add("--seed", type=int, default=0, help=f"of the noise {default}")
    add("--checkpoint", type=Path, default=Path("model.pth"), help=f"the weights {default}")
    add("--device", default="auto", help=f"cpu, cuda, mps, ...; auto is a GPU when there is one {default}")


def check_sampling_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a sentence if one of them is out of its range; fill in the steps."""
    if [] in vars(args).values():
        parser.error("an option lacks its value")  # argparse reads --steps=-- as an empty list
    if args.steps is None:
        args.steps = STEPS[args.sampler]
    if args.steps > T:
        parser.error(f"argument --steps: must lie in [1, {T}], not {args.steps}")
    if not 0 <= args.eta <= 1:
        parser.error(f"argument --eta: must lie in [0, 1], not {args.eta}")
    if args.eta and args.sampler != "ddim":
        parser.error("argument --eta: goes with --sampler ddim")
    if args.guidance is not None and not 0 <= args.guidance <= 100:
        parser.error(f"argument --guidance: must lie in [0, 100], not {args.guidance}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: must lie in [0, 2^63), not {args.seed}")
    if args.checkpoint.is_dir():
        parser.error(f"argument --checkpoint: {args.checkpoint} is a folder, where a file is meant")


def described(args: argparse.Namespace) -> str:
    """How the digits are drawn, in words."""
    eta = f", eta {args.eta:g}" if args.sampler == "ddim" else ""
    return f"{args.sampler}, {args.steps} steps{eta}, seed {args.seed}, guidance {args.guidance:g}"


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
