"""Train a DiT on MNIST: DDPM Algorithm 1, with an EMA of the weights. Writes model.pth.

    python train.py --epochs 5 --loss mse --batch-size 64 --predicts x_0      5 minutes: 99.5% right
    python train.py                  the defaults, 500 epochs, 6 hours: 99.6% (see README.md)
    python train.py --resume         continues after a stop
    torchrun --standalone --nproc-per-node 4 --max-restarts 3 train.py       in four processes
"""

from runtime.start import before_torch

if __name__ == "__main__":  # it sets what torch reads when it is imported
    before_torch()

import argparse
import copy
import math
import sys
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from config import FAMILY, GUIDANCE, PAPER, ModelConfig, TrainConfig
from dataset import Digits, load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from inference import generate
from muon import Muon
from runtime.distributed import Ranks, joined_ranks
from runtime.files import here_or_in_project
from runtime.run import Run
from runtime.script import exit_status, pick_device
from runtime.speed import compiled, keep_freed_memory, recorded, records

HELD_OUT_BATCH = 250  # test images at a time
SAMPLE_STEPS = 25  # of DDIM, for samples.png


def learning_rate(step: int, cfg: TrainConfig, total_steps: int) -> float:
    """The rate of step 0, 1, ...: half a cosine from cfg.lr to 0, or cfg.lr throughout."""
    if cfg.lr_schedule == "constant":
        return cfg.lr
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def make_optimizers(model: DiT, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for the rest, or AdamW for all; no weight decay."""
    muon = cfg.optimizer == "muon"
    matrices = [p for p in model.blocks.parameters() if muon and p.ndim == 2]
    others = [p for p in model.parameters() if p not in set(matrices)]  # a set: by identity
    optimizers = [torch.optim.AdamW(others, lr=cfg.lr, weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=cfg.lr))
    return optimizers


def ema_decay(step: int, cfg: TrainConfig) -> float:
    """The EMA's decay after `step` steps: small at first, 0.9999 only after 90,000 steps."""
    return min(cfg.ema_decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float | Tensor) -> None:
    """ema <- decay ema + (1 - decay) model, for each parameter; buffers do not change."""
    means, values = list(ema.parameters()), list(model.parameters())
    differences = torch._foreach_sub(values, means)
    torch._foreach_mul_(differences, 1 - decay)
    torch._foreach_add_(means, differences)


def held_out(diffusion: GaussianDiffusion, digits: Digits) -> list[list[Tensor]]:
    """Batches (x_0, y, t, eps) of all `digits`, with the same t and eps on every device."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, len(digits), HELD_OUT_BATCH):
        x_0, y = digits[start:start + HELD_OUT_BATCH]
        t, eps = diffusion.draw_t_and_eps(x_0.cpu(), generator)
        batches.append([x_0, y, t.to(y.device), eps.to(y.device)])
    # A GPU takes them all at once.
    return [[*map(torch.cat, zip(*batches, strict=True))]] if records(y.device) else batches


@torch.no_grad()
def held_out_loss(model: nn.Module, diffusion: GaussianDiffusion, batches: list[list[Tensor]],
                  kind: str) -> float:
    """Mean loss over the images of `batches`, without min-SNR weights."""
    total = sum(diffusion.loss(model, *batch, kind) * len(batch[0]) for batch in batches)
    return (total / sum(len(x_0) for x_0, *_ in batches)).item()  # the one wait for a GPU


def sample_digits(ema: DiT, diffusion: GaussianDiffusion) -> Tensor:
    """One sample of each digit, (10, 1, H, W), from the same noise at every call."""
    guidance = GUIDANCE if ema.config.class_dropout_prob else 1.0
    return generate(ema, range(ema.config.num_classes), sampler="ddim", steps=SAMPLE_STEPS,
                    guidance=guidance, diffusion=diffusion)


def samples_due(epoch: int, epochs: int) -> bool:
    """After 1, 2, 5, 10, 20, 50, ... epochs and after the last."""
    return epoch == epochs or str(epoch).rstrip("0") in ("1", "2", "5")


def train(cfg: TrainConfig, resume: bool = False, ranks: Ranks | None = None) -> DiT:
    """Run the recipe and return the EMA model. Writes the checkpoint, loss.csv and the pictures.

    A stop signal, such as Ctrl-C, saves the run and exits. CheckpointError, DataError,
    OSError, SettingError or TrainingError with one sentence when it cannot start or continue.
    """
    ranks = ranks or Ranks()
    keep_freed_memory()
    device = pick_device(cfg.device)
    data_dir = here_or_in_project(cfg.data_dir)
    train_set, test_set = (load_mnist(training, data_dir, device, cfg.limit, cfg.model.image_size)
                           for training in (True, False))
    diffusion = GaussianDiffusion(device=device)
    test_batches = held_out(diffusion, test_set)
    torch.manual_seed(cfg.seed)  # the initial weights
    model = DiT(cfg.model).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, cfg)
    generator = torch.Generator(device).manual_seed(cfg.seed)  # of t, eps and dropped labels
    with Run(cfg, ranks, model, ema, optimizers, generator, len(train_set),
             diffusion.schedule) as run:
        run.begin(resume)
        fast = compiled if cfg.compile else lambda network, batch_size: network
        network = ranks.wrap(fast(model, cfg.batch_size // ranks.size))
        eps_model = diffusion.as_eps(network, cfg.model.predicts)
        fast_ema = diffusion.as_eps(fast(ema, len(test_batches[0][0])), cfg.model.predicts)

        def step(x_0: Tensor, y: Tensor, lr: float | Tensor, decay: float | Tensor) -> Tensor:
            """DDPM Algorithm 1, lines 3 to 5, for a batch (line 2). Returns the loss."""
            t, eps = diffusion.draw_t_and_eps(x_0, generator)  # lines 3 and 4
            y = model.y_embedder.drop(y, generator)  # CFG Algorithm 1, line 3
            x_0, y, t, eps = ranks.share(x_0, y, t, eps)  # all of it, if there is one process
            loss = diffusion.loss(eps_model, x_0, y, t, eps, cfg.loss, cfg.min_snr)
            loss.backward()  # line 5
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group.update(lr=lr, capturable=isinstance(lr, Tensor))  # for a CUDA graph
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, model, decay)
            return loss.detach()

        # On a GPU, this is one CUDA graph.
        step_at = recorded(lambda index, *rates: step(*train_set[index], *rates), device, generator,
                           after_failure=model.zero_grad)
        for epoch in range(len(run.curve) + 1, cfg.epochs + 1):
            for index in run.batches(train_set):
                rates = learning_rate(run.step, cfg, run.total_steps), ema_decay(run.step + 1, cfg)
                run.end_step(step_at(index, *rates))
            run.end_epoch(held_out_loss(fast_ema, diffusion, test_batches, cfg.loss))
            if samples_due(epoch, cfg.epochs):
                run.add_samples(sample_digits(ema, diffusion))
    return ema


# The command line

def configure(model: str = "", **given) -> TrainConfig:
    """TrainConfig from fields of both configs. model: of FAMILY or PAPER. SettingError if wrong."""
    network = (FAMILY | PAPER)[model] if model else ModelConfig()  # PAPER's keep 32 x 32 pixels
    network = replace(network, in_channels=1, num_classes=10)
    of_network = {f.name: given.pop(f.name) for f in fields(ModelConfig) if f.name in given}
    return TrainConfig(model=replace(network, **of_network), **given)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("train.py", description="Train a Diffusion Transformer.",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help="continue a stopped run")
    for title, settings in (("recipe", TrainConfig), ("network", ModelConfig)):
        group = parser.add_argument_group(title)
        for f in fields(settings):
            if "help" in f.metadata:
                group.add_argument("--" + f.name.replace("_", "-"), **f.metadata)
    group.add_argument("--model", choices=FAMILY | PAPER, metavar="NAME",
                       help=f"other defaults for this group: {', '.join(FAMILY | PAPER)}")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", False)

    def work() -> None:
        cfg = configure(**given)
        with joined_ranks(pick_device(cfg.device), one_gpu=":" in cfg.device) as ranks:
            train(cfg, resume, ranks)
            if ranks.leads:
                print(f"wrote {cfg.checkpoint}, and next to it the loss curve and the samples")

    return exit_status(parser, work)


if __name__ == "__main__":
    sys.exit(main())
