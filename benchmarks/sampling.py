"""The time of a sampling step compared with its roofline (see benchmarks/measure.py).

    python -m benchmarks.sampling                   ten digits, as inference.py samples them
    python -m benchmarks.sampling --batch-size 125  as evaluate.py samples thousands
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import about, medians
from config import ModelConfig
from diffusion import GaussianDiffusion, guided
from dit import DiT
from inference import generate
from runtime.script import pick_device
from runtime.speed import keep_freed_memory

STEPS = 100  # per measurement


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Time a sampling step, and compare with its roofline.", allow_abbrev=False)
    add = parser.add_argument
    for name, default in (("batch-size", 10), ("hidden-size", ModelConfig.hidden_size),
                          ("depth", ModelConfig.depth), ("rounds", 5)):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    add("--guidance", type=float, default=1.0, help="(default: 1)")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        config = ModelConfig(hidden_size=args.hidden_size, depth=args.depth)
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    print(about(device))
    model = DiT(config).to(device).eval().requires_grad_(False)
    y = torch.arange(args.batch_size, device=device) % config.num_classes
    x_T = torch.randn(len(y), 1, 28, 28, device=device)
    diffusion = GaussianDiffusion(device=device)
    network = guided(model, args.guidance, null_class=config.num_classes)

    def plain() -> None:
        """The sampler with the network as it stands in dit.py."""
        diffusion.sample(network, x_T, y, sampler="ddim", steps=STEPS)

    def fast() -> None:
        generate(model, y, sampler="ddim", steps=STEPS, guidance=args.guidance, diffusion=diffusion)

    with FlopCounterMode(display=False) as counter:
        network(x_T, torch.zeros_like(y), y)
    flops = counter.get_total_flops()
    times, rate = medians(device, {"plain": plain, "generate": fast}, args.rounds)
    print(f"{len(y)} images, guidance {args.guidance:g}: {flops / 1e9:.3f} GFLOP per step, "
          f"roofline {1000 * flops / rate:.2f} ms at {rate / 1e9:.0f} GFLOP/s")
    for name, time in times.items():
        print(f"{name:9} {1000 * time / STEPS:7.2f} ms per step, "
              f"{time * rate / flops / STEPS:.2f} x roofline")


if __name__ == "__main__":
    main()
