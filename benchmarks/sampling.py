"""The time of a sampling step beside its floor, the arithmetic at the rate of a large matrix product in the same run.

    python -m benchmarks.sampling                   ten digits, as inference.py draws them
    python -m benchmarks.sampling --batch-size 125  as evaluate.py draws thousands; on a GPU, with --compile
"""

import argparse

import torch

from benchmarks.measure import about, arithmetic, medians
from config import ModelConfig, T, pick_device
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from runtime.speed import keep_freed_memory

STEPS = 100  # in a measurement; the preparation for all of them is counted


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    for name, default in (("batch-size", 10), ("hidden-size", 64), ("depth", 3), ("patch-size", 4), ("rounds", 5)):
        add(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    add("--guidance", type=float, default=1.0, help="(default: 1)")
    add("--compile", action="store_true")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        config = ModelConfig(hidden_size=args.hidden_size, depth=args.depth, patch_size=args.patch_size)
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    print(about(device))
    model = DiT(config).to(device).eval()
    labels = torch.arange(args.batch_size, device=device) % config.num_classes
    evaluated = len(labels) * (1 if args.guidance in (0, 1) else 2)
    images, zeros = torch.randn(evaluated, 1, 28, 28, device=device), torch.zeros(evaluated, dtype=torch.long, device=device)

    def plain_loop():
        """The sampler with the network as it stands in dit.py."""
        GaussianDiffusion(T).ddim_sample(lambda x_t, t, y: model(images, zeros, zeros)[:len(x_t)], (len(labels), 1, 28, 28),
                                         labels, steps=STEPS)

    def fast_loop():
        generate(model, labels, sampler="ddim", steps=STEPS, guidance=args.guidance, compile=args.compile)

    flops = arithmetic(lambda: model(images, zeros, zeros))
    times, rate = medians(device, {"plain": plain_loop, "generate": fast_loop}, args.rounds)
    floor = flops / rate
    print(f"{args.batch_size} images, guidance {args.guidance:g}: {flops / 1e9:.3f} GFLOP a step, "
          f"floor {1000 * floor:.2f} ms at {rate / 1e9:.0f} GFLOP/s")
    for name, time in times.items():
        print(f"{name:9} {1000 * time / STEPS:7.2f} ms a step, {args.batch_size * STEPS / time:6.0f} image steps/s, "
              f"{time / STEPS / floor:.2f} x floor")


if __name__ == "__main__":
    main()
