"""Train a DiT on MNIST: DDPM Algorithm 1, with an average of the weights, a loss curve and checkpoints.

    python train.py                  the recipe: 500 epochs of batches of 300
    python train.py --resume         go on after a stop
    python train.py --help           every setting
"""

import argparse
import copy
import csv
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import (
    CheckpointError,
    check_weights,
    check_writable,
    load_checkpoint,
    save_checkpoint,
    weights_of,
    write_atomically,
)
from config import ModelConfig, T, TrainConfig, pick_device
from dataset import DataError, Digits, load_mnist
from diffusion import GaussianDiffusion
from dit import DiT

MAY_CHANGE = {"epochs", "checkpoint", "checkpoint_every", "data_dir", "device"}  # fields of the recipe, at --resume


class TrainingError(Exception):
    """Training cannot go on; the message says why."""


class TrainingStopped(Exception):
    """A signal ended the run, after it was saved."""

    def __init__(self, sentence: str, signal_number: int):
        super().__init__(sentence)
        self.signal_number = signal_number


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
def held_out_loss(model: nn.Module, diffusion: GaussianDiffusion, digits: Digits, kind: str) -> float:
    """Mean loss over `digits`, with the same t and eps for every image at every call: two calls can be compared."""
    generator = torch.Generator().manual_seed(0)
    total, batch_size = 0.0, 250
    for start in range(0, len(digits), batch_size):
        x_0, y = digits[start:start + batch_size]
        t = torch.randint(len(diffusion), (len(y),), generator=generator).to(y.device)
        eps = torch.randn(x_0.shape, generator=generator).to(y.device)
        total += diffusion.loss(model, x_0, y, kind, t=t, eps=eps).item() * len(y)
    return total / len(digits)


class Run:
    """All that changes while a run goes on; `state` is the part of model.resume.pth that `restore` takes back."""

    def __init__(self, cfg: TrainConfig, device: torch.device):
        torch.manual_seed(cfg.seed)  # initial weights, t, eps, dropped labels
        self.model = DiT(cfg.model).to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(self.model, cfg)
        self.shuffle = torch.Generator().manual_seed(cfg.seed)
        self.shuffle_at_epoch = self.shuffle.get_state()  # as it was before it drew the order of the epoch at hand
        self.step = 0  # optimizer steps done
        self.loss_sum = torch.zeros((), device=device)  # over the epoch at hand; reading it waits for the GPU
        self.curve: list[dict] = []  # the rows of loss.csv, one an epoch
        self.earlier_seconds = 0.0  # in the processes before a resume
        self.started = time.monotonic()

    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def state(self) -> dict:
        cuda = self.loss_sum.is_cuda
        return {
            "weights": self.model.state_dict(), "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "loss_sum": self.loss_sum, "curve": self.curve, "seconds": self.seconds(),
            "shuffle": self.shuffle_at_epoch, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if cuda else None,
        }

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.curve, self.earlier_seconds = state["step"], state["curve"], state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["random"])
        if self.loss_sum.is_cuda and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])


def train(cfg: TrainConfig, resume: bool = False) -> DiT:
    """Run the recipe and return the averaged network. Writes the checkpoint, loss.csv and loss.png as it goes.

    A first Ctrl-C or SIGTERM saves the run and raises TrainingStopped. CheckpointError, DataError, OSError or
    TrainingError with a sentence when it cannot start or go on.
    """
    device = pick_device(cfg.device)
    files = RunFiles(cfg, resume)
    train_set = load_mnist(True, cfg.data_dir, device, cfg.limit)
    test_set = load_mnist(False, cfg.data_dir, device, cfg.limit)
    steps_an_epoch = len(train_set) // cfg.batch_size
    if steps_an_epoch == 0:
        raise TrainingError(f"a batch of {cfg.batch_size} is more than the {len(train_set)} training images")
    total_steps = cfg.epochs * steps_an_epoch
    diffusion = GaussianDiffusion(T)
    run = Run(cfg, device)
    if resume:
        run.restore(files.load_state())

    bar = tqdm(total=total_steps * cfg.batch_size, initial=run.step * cfg.batch_size, unit="img", unit_scale=True,
               mininterval=0.5, smoothing=0.05)
    with bar, stop_signals() as stopped:
        for epoch in range(len(run.curve) + 1, cfg.epochs + 1):
            bar.set_description(f"epoch {epoch}/{cfg.epochs}", refresh=False)
            run.shuffle_at_epoch = run.shuffle.get_state()
            done = run.step - (epoch - 1) * steps_an_epoch  # not 0 in an epoch that a stopped run had begun
            for index in islice(train_set.batches(cfg.batch_size, run.shuffle), done, None):
                x_0, y = train_set[index]
                loss = diffusion.loss(run.model, x_0, y, cfg.loss)
                loss.backward()
                for optimizer in run.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(run.step, total_steps, cfg)
                    optimizer.step()
                    optimizer.zero_grad()
                run.step += 1
                update_ema(run.ema, run.model, run.step, cfg.ema_decay)
                run.loss_sum += loss.detach()
                done += 1
                if bar.update(cfg.batch_size):
                    bar.set_postfix(loss=f"{finite(run.loss_sum / done, run.step, cfg):.4f}", refresh=False)
                if run.step % cfg.checkpoint_every == 0 or run.step == total_steps or stopped():
                    finite(run.loss_sum, run.step, cfg)
                    files.save_run(run)
                if stopped():
                    raise TrainingStopped(f"stopped at step {run.step} of {total_steps}; the same command with --resume "
                                          "goes on from there", stopped()[0])
            run.curve.append({
                "epoch": epoch, "step": run.step, "train_loss": finite(run.loss_sum / done, run.step, cfg),
                "test_loss": held_out_loss(run.ema, diffusion, test_set, cfg.loss), "seconds": run.seconds(),
            })
            bar.set_postfix({name: f"{run.curve[-1][name]:.4f}" for name in ("train_loss", "test_loss")})
            run.loss_sum.zero_()
            files.save_curve(run.curve, last=epoch == cfg.epochs)
    return run.ema


def finite(loss: Tensor, step: int, cfg: TrainConfig) -> float:
    """The value of a loss; TrainingError if it is not a finite number."""
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} at step {step} (learning rate up to {cfg.lr:g}); {cfg.checkpoint} is as "
                            "it was saved before: try a lower --lr or a longer --warmup-steps")
    return value


class RunFiles:
    """What a run writes: model.pth, and beside it model.resume.pth, loss.csv and loss.png. OSError if it could not."""

    def __init__(self, cfg: TrainConfig, resume: bool):
        self.cfg = cfg
        self.weights = Path(cfg.checkpoint)
        self.state = self.weights.with_name(f"{self.weights.stem}.resume{self.weights.suffix}")
        self.csv, self.png = self.weights.with_name("loss.csv"), self.weights.with_name("loss.png")
        self.all = (self.weights, self.state, self.csv, self.png)
        self.ours = resume  # whether the files that are there are this run's own
        self.drawn = -math.inf
        for path in self.all:
            check_writable(path)
        if self.state.exists() and not resume:
            tqdm.write(f"{self.state} holds a stopped run: --resume goes on with it; this run is a new one and will "
                       "keep it under another name")

    def load_state(self) -> dict:
        """The content of model.resume.pth. CheckpointError if it is unfit, or its recipe is another one."""
        content = load_checkpoint(self.state, {"recipe": dict, "ema": dict, "weights": dict, "optimizers": list})
        ours, theirs = asdict(self.cfg), content["recipe"]
        changed = [(name, theirs.get(name), ours.get(name)) for name in ours | theirs
                   if name not in MAY_CHANGE | {"model"} and theirs.get(name) != ours.get(name)]
        changed += [(name, theirs["model"].get(name), ours["model"].get(name)) for name in ours["model"] | theirs["model"]
                    if theirs["model"].get(name) != ours["model"].get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before} and is {now}" for name, before, now in changed)
            raise CheckpointError(f"{self.state} belongs to another recipe: {differences}; resume with the options that "
                                  "it was started with, or leave out --resume to start anew")
        if len(content["curve"]) > self.cfg.epochs:
            raise CheckpointError(f"{self.state} has done {len(content['curve'])} epochs already, more than --epochs "
                                  f"{self.cfg.epochs}")
        with torch.device("meta"):
            network = DiT(self.cfg.model)
        check_weights(self.state, content["weights"], network)
        check_weights(self.state, content["ema"], network)
        return content

    def save_run(self, run: Run) -> None:
        """The state first: a crash between the two leaves a model.pth that is older, and both can be loaded."""
        self._keep_what_another_run_made()
        recipe = asdict(self.cfg)
        save_checkpoint(self.state, {**run.state(), "recipe": recipe})
        save_checkpoint(self.weights, weights_of(run.ema, run.step, recipe))

    def save_curve(self, curve: list[dict], last: bool) -> None:
        self._keep_what_another_run_made()
        write_atomically(self.csv, lambda path: write_csv(path, curve))
        if last or time.monotonic() - self.drawn > 10:  # a picture takes as long as many steps on a GPU
            write_atomically(self.png, lambda path: draw_curve(path, curve, self.cfg.loss))
            self.drawn = time.monotonic()

    def _keep_what_another_run_made(self) -> None:
        if self.ours:
            return
        self.ours = True
        present = [path for path in self.all if path.exists()]
        number = 1
        while any(_kept_name(path, number).exists() for path in present):
            number += 1
        for path in present:
            path.rename(_kept_name(path, number))
            tqdm.write(f"{path} is another run's: kept as {_kept_name(path, number)}")


def _kept_name(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.old-{number}{path.suffix}")


def write_csv(path: Path, curve: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, curve[0])
        writer.writeheader()
        for row in curve:
            losses = {name: f"{row[name]:.6f}" for name in ("train_loss", "test_loss")}
            writer.writerow(row | losses | {"seconds": f"{row['seconds']:.1f}"})


def draw_curve(path: Path, curve: list[dict], kind: str) -> None:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("train_loss", "training images, weights on the way"),
                        ("test_loss", "test images, averaged weights, fixed t and noise")):
        axes.plot([row["epoch"] for row in curve], [row[name] for row in curve], ".-", label=label)
    axes.set(xlabel="epoch", ylabel=f"{kind} loss of the noise", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


@contextmanager
def stop_signals() -> Iterator[Callable[[], list[int]]]:
    """Within it, a first Ctrl-C or SIGTERM is only noted, so that the step at hand is finished; a second one acts at once.

    Yields a function that returns the numbers of the signals that came.
    """
    came: list[int] = []

    def note(number, frame):
        came.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        restore()


def add_options(parser: argparse._ArgumentGroup, config_class: type) -> None:
    for f in fields(config_class):
        if "help" in f.metadata:
            parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default, **f.metadata)


def chosen(args: argparse.Namespace, config_class: type) -> dict:
    return {f.name: getattr(args, f.name) for f in fields(config_class) if "help" in f.metadata}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a Diffusion Transformer on MNIST.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="go on with the run that left model.resume.pth")
    add_options(parser.add_argument_group("recipe"), TrainConfig)
    add_options(parser.add_argument_group("network"), ModelConfig)
    args = parser.parse_args(argv)
    try:
        cfg = TrainConfig(model=ModelConfig(**chosen(args, ModelConfig)), **chosen(args, TrainConfig))
        pick_device(cfg.device)
    except ValueError as error:
        parser.error(str(error))
    try:
        train(cfg, resume=args.resume)
    except TrainingStopped as stop:
        print(stop)
        return 128 + stop.signal_number
    except (CheckpointError, DataError, OSError, TrainingError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
