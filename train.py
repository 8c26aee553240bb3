"""Train a DiT on MNIST: DDPM Algorithm 1, with an average of the weights, a loss curve and checkpoints.

    python train.py                  the recipe, 500 epochs
    python train.py --help           every setting of it
"""

import argparse
import copy
import csv
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import check_writable, save_checkpoint, write_atomically
from config import ModelConfig, T, TrainConfig, pick_device
from dataset import DataError, Digits, load_mnist
from diffusion import GaussianDiffusion
from dit import DiT

CURVE_FIELDS = ("epoch", "step", "train_loss", "test_loss", "seconds")


class TrainingError(Exception):
    """Training cannot go on; the message says at which step and why."""


def learning_rate(step: int, total_steps: int, cfg: TrainConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up times the schedule."""
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / total_steps)) if cfg.lr_schedule == "cosine" else 1.0
    return cfg.lr * warmup * decay


def make_optimizers(model: DiT, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW without weight decay for all parameters; or Muon for the blocks' matrices and AdamW for the others."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if cfg.optimizer == "muon" else []
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=cfg.lr, weight_decay=0.0, fused=True)]
    if matrices:  # Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema <- d ema + (1 - d) model for the parameters, after `step` steps. The ramp of d forgets the first weights."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


@torch.no_grad()
def test_loss(model: nn.Module, diffusion: GaussianDiffusion, digits: Digits, kind: str, batch_size: int = 250) -> float:
    """Mean loss over `digits`, with the same t and eps for every image at every call: two calls can be compared."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for start in range(0, len(digits), batch_size):
        x_0, y = digits[start:start + batch_size]
        t = torch.randint(len(diffusion), (len(y),), generator=generator).to(y.device)
        eps = torch.randn(x_0.shape, generator=generator).to(y.device)
        total += diffusion.loss(model, x_0, y, kind, t=t, eps=eps).item() * len(y)
    return total / len(digits)


def train(cfg: TrainConfig) -> DiT:
    """Run the recipe and return the averaged network. Writes the checkpoint, loss.csv and loss.png as it goes.

    Ctrl-C ends the run early, after saving. DataError, OSError or TrainingError with a sentence when it cannot go on.
    """
    device = pick_device(cfg.device)
    files = RunFiles(cfg)
    train_set = load_mnist(True, cfg.data_dir, device, cfg.limit)
    test_set = load_mnist(False, cfg.data_dir, device, cfg.limit)
    if cfg.batch_size > len(train_set):
        raise TrainingError(f"a batch of {cfg.batch_size} is more than the {len(train_set)} training images")

    torch.manual_seed(cfg.seed)
    shuffle = torch.Generator().manual_seed(cfg.seed)
    diffusion = GaussianDiffusion(T)
    model = DiT(cfg.model).to(device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, cfg)
    total_steps = cfg.epochs * (len(train_set) // cfg.batch_size)
    step, curve, started = 0, [], time.monotonic()

    bar = tqdm(total=total_steps * cfg.batch_size, unit="img", unit_scale=True, mininterval=0.5, smoothing=0.05)
    with bar, stop_signal() as stopped:
        for epoch in range(1, cfg.epochs + 1):
            bar.set_description(f"epoch {epoch}/{cfg.epochs}", refresh=False)
            loss_sum = torch.zeros((), device=device)  # stays on the device: reading it waits for the GPU
            for batch, index in enumerate(train_set.batches(cfg.batch_size, shuffle), start=1):
                lr = learning_rate(step, total_steps, cfg)
                x_0, y = train_set[index]
                loss = diffusion.loss(model, x_0, y, cfg.loss)
                loss.backward()
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1
                update_ema(ema, model, step, cfg.ema_decay)
                loss_sum += loss.detach()
                if bar.update(cfg.batch_size):
                    bar.set_postfix(loss=f"{finite(loss_sum / batch, step, cfg):.4f}", refresh=False)
                if step % cfg.checkpoint_every == 0 or step == total_steps or stopped():
                    finite(loss_sum, step, cfg)
                    files.save_weights(ema, step)
                if stopped():
                    bar.write(f"stopped at step {step}; the weights are in {cfg.checkpoint}")
                    return ema
            train_loss = finite(loss_sum / batch, step, cfg)
            seconds = time.monotonic() - started
            curve.append((epoch, step, train_loss, test_loss(ema, diffusion, test_set, cfg.loss), seconds))
            files.save_curve(curve, last=epoch == cfg.epochs)
    return ema


def finite(loss: Tensor, step: int, cfg: TrainConfig) -> float:
    """The value of a loss; TrainingError if it is not a finite number."""
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} at step {step} (learning rate up to {cfg.lr}); {cfg.checkpoint} keeps "
                            "what it held before: try a lower --lr or a longer --warmup-steps")
    return value


class RunFiles:
    """What a run writes: the checkpoint, and loss.csv and loss.png beside it. OSError if it could not."""

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.weights = Path(cfg.checkpoint)
        self.csv, self.png = self.weights.with_name("loss.csv"), self.weights.with_name("loss.png")
        self.others_kept = False
        self.drawn = -math.inf
        for path in (self.weights, self.csv, self.png):
            check_writable(path)

    def save_weights(self, ema: DiT, step: int) -> None:
        self._keep_what_another_run_made()
        save_checkpoint(self.weights, ema, step, self.cfg)

    def save_curve(self, curve: list[tuple], last: bool) -> None:
        self._keep_what_another_run_made()
        write_atomically(self.csv, lambda path: write_csv(path, curve))
        if last or time.monotonic() - self.drawn > 10:  # a picture takes as long as many steps on a GPU
            write_atomically(self.png, lambda path: draw_curve(path, curve, self.cfg.loss))
            self.drawn = time.monotonic()

    def _keep_what_another_run_made(self) -> None:
        if self.others_kept:
            return
        self.others_kept = True
        present = [path for path in (self.weights, self.csv, self.png) if path.exists()]
        number = 1
        while any(_aside(path, number).exists() for path in present):
            number += 1
        for path in present:
            path.rename(_aside(path, number))
            tqdm.write(f"{path} is another run's: kept as {_aside(path, number)}")


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.old-{number}{path.suffix}")


def write_csv(path: Path, curve: list[tuple]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CURVE_FIELDS)
        for epoch, step, train_loss, held_out, seconds in curve:
            writer.writerow((epoch, step, f"{train_loss:.6f}", f"{held_out:.6f}", f"{seconds:.1f}"))


def draw_curve(path: Path, curve: list[tuple], kind: str) -> None:
    epochs, _, train_losses, test_losses, _ = zip(*curve, strict=True)
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    axes.plot(epochs, train_losses, ".-", label="training images, weights on the way")
    axes.plot(epochs, test_losses, ".-", label="test images, averaged weights, fixed t and noise")
    axes.set(xlabel="epoch", ylabel=f"{kind} loss of the noise", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


@contextmanager
def stop_signal() -> Iterator:
    """Within it, a first Ctrl-C only makes stopped() true, so that the step at hand is finished; a second one interrupts."""
    pressed = []

    def note(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def add_options(parser: argparse._ArgumentGroup, config_class: type) -> None:
    for f in fields(config_class):
        if "help" in f.metadata:
            parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default, **f.metadata)


def chosen(args: argparse.Namespace, config_class: type) -> dict:
    return {f.name: getattr(args, f.name) for f in fields(config_class) if "help" in f.metadata}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a Diffusion Transformer on MNIST.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_options(parser.add_argument_group("recipe"), TrainConfig)
    add_options(parser.add_argument_group("network"), ModelConfig)
    args = parser.parse_args(argv)
    try:
        cfg = TrainConfig(model=ModelConfig(**chosen(args, ModelConfig)), **chosen(args, TrainConfig))
        pick_device(cfg.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        train(cfg)
    except (DataError, OSError, TrainingError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
