"""Train a DiT on MNIST: DDPM Algorithm 1, with an average of the weights, a loss curve and checkpoints.

    python train.py                                   the recipe: 500 epochs of batches of 300
    python train.py --resume                          go on after a stop
    torchrun --standalone --nproc-per-node 4 --max-restarts 3 train.py
                                                      every batch shared by 4 processes
    python train.py --help                            every setting
"""

import copy
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice

from arguments import chosen, parse_train_args, train_parser

if __name__ == "__main__":
    train_parser().parse_args()  # here already, so that --help does not wait for torch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import ModelConfig, T, TrainConfig, pick_device
from dataset import DataError, Digits, load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from runtime.checkpoint import CheckpointError, load_model
from runtime.distributed import Ranks, joined_ranks
from runtime.run import RunFiles
from runtime.speed import compiled, keep_freed_memory, pieces

HELD_OUT_BATCH = 250  # test images at a time
NO_SHAPE = {"class_dropout_prob", "label_init_std", "time_init_std"}  # in which networks of one shape may differ
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as CUDA, the CPU and Windows say it


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
def update_ema(averages: list[Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """average <- d average + (1 - d) parameter, after `step` steps. The ramp of d forgets the first weights."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(averages, parameters, 1 - d)


def add_gradients(network: nn.Module, averaged: nn.Module, diffusion: GaussianDiffusion, batch: list[Tensor],
                  cfg: TrainConfig) -> Tensor:
    """The loss of a batch (x_0, y, t, eps), after its gradients have been added to the parameters'."""
    total = torch.zeros((), device=batch[0].device)
    parts = pieces(network, *batch)
    for part in parts:
        with precision(cfg, total.device):
            target = None
            if cfg.learn_guidance != 1:
                target = diffusion.guided_target(averaged, *part, cfg.learn_guidance, null_class=cfg.model.num_classes)
            loss = diffusion.loss(network, *part, cfg.loss, cfg.min_snr, target) / len(parts)
        loss.backward()
        total += loss.detach()
    return total


def precision(cfg: TrainConfig, device: torch.device) -> torch.autocast:
    """A context in which the network's matrix products are taken in the precision of the recipe."""
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


@torch.no_grad()
def held_out_loss(model: nn.Module, diffusion: GaussianDiffusion, digits: Digits, kind: str) -> float:
    """Mean loss over `digits`, with the same t and eps for every image at every call: two calls can be compared."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for start in range(0, len(digits), HELD_OUT_BATCH):
        x_0, y = digits[start:start + HELD_OUT_BATCH]
        t, eps = (drawn.to(y.device) for drawn in diffusion.draw_t_and_eps(x_0.cpu(), generator))
        total += diffusion.loss(model, x_0, y, t, eps, kind).item() * len(y)
    return total / len(digits)


class Run:
    """All that changes while a run goes on. `state` is what model.resume.pth keeps of it, `restore` takes it back."""

    def __init__(self, cfg: TrainConfig, device: torch.device):
        torch.manual_seed(cfg.seed)  # initial weights, t, eps, dropped labels
        self.model = DiT(cfg.model).to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters, self.averages = list(self.model.parameters()), list(self.ema.parameters())
        self.optimizers = make_optimizers(self.model, cfg)
        self.shuffle = torch.Generator().manual_seed(cfg.seed)
        self.shuffle_at_epoch = self.shuffle.get_state()  # as it was before it drew the order of the epoch at hand
        self.step = 0  # optimizer steps done
        self.earlier_steps = 0  # of the run whose weights this one started from
        self.loss_sum = torch.zeros((), device=device)  # over the epoch at hand; reading it waits for the GPU
        self.curve: list[dict] = []  # the rows of loss.csv, one an epoch
        self.earlier_seconds = 0.0  # in the processes before a resume
        self.started = time.monotonic()

    def start_from(self, path: str) -> None:
        """Begin with the averaged weights of a checkpoint of the same network, and go on with their average."""
        given, info = load_model(path)
        there, here = asdict(given.config), asdict(self.model.config)
        differences = ", ".join(f"{name} is {there[name]} there and {here[name]} here" for name in here
                                if there[name] != here[name] and name not in NO_SHAPE)
        if differences:
            raise CheckpointError(f"{path} is of another network: {differences}")
        for network in (self.model, self.ema):
            network.load_state_dict(given.state_dict())
        self.earlier_steps = info["step"]

    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def state(self) -> dict:
        device = self.loss_sum.device
        return {
            "weights": self.model.state_dict(), "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "earlier_steps": self.earlier_steps, "loss_sum": self.loss_sum, "curve": self.curve,
            "seconds": self.seconds(),
            "shuffle": self.shuffle_at_epoch, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.curve, self.earlier_seconds = state["step"], state["curve"], state["seconds"]
        self.earlier_steps = state.get("earlier_steps", 0)  # an older state has none
        self.loss_sum.copy_(state["loss_sum"])
        self.shuffle.set_state(state["shuffle"])
        torch.set_rng_state(state["random"])
        if self.loss_sum.is_cuda and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.loss_sum.device)


def compiled_networks(run: Run, cfg: TrainConfig, share: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]
                      ) -> tuple[nn.Module, nn.Module]:
    """The network and its average, compiled for the batches that they will see; as they are where that does not work.

    share, held_out: (x_0, y) of the size of this process's share of a batch, and of a batch of `held_out_loss`.
    """
    x_0, y = share
    piece = pieces(run.model, x_0, torch.zeros_like(y), y)[0]
    with precision(cfg, y.device):
        network = compiled(run.model, *piece)
    if network is run.model:
        return run.model, run.ema
    x_0, y = held_out
    with torch.no_grad():
        averaged = compiled(run.ema, x_0, torch.zeros_like(y), y)
        if cfg.learn_guidance != 1:
            with precision(cfg, y.device):  # `guided_target` shows it a piece twice over, in the precision of training
                averaged(*(torch.cat([values, values]) for values in piece))
    return network, averaged


def train(cfg: TrainConfig, resume: bool = False, ranks: Ranks | None = None) -> DiT:
    """Run the recipe and return the averaged network. Writes the checkpoint, loss.csv and loss.png as it goes.

    A first Ctrl-C or SIGTERM saves the run and raises TrainingStopped. CheckpointError, DataError, OSError or
    TrainingError with a sentence when it cannot start or go on.
    """
    ranks = ranks or Ranks()
    if cfg.batch_size % ranks.size:
        raise TrainingError(f"a batch of {cfg.batch_size} cannot be shared evenly by {ranks.size} processes")
    keep_freed_memory()
    device = pick_device(cfg.device, ranks.local_rank)
    files = RunFiles(cfg)
    # A state that torchrun's restart finds is this run's: the start of the run set any other aside.
    resume = ranks.any(resume or (ranks.restarted and files.state.exists()))
    with ranks.leader_first():  # who unpacks the archives
        train_set, test_set = (load_mnist(split, cfg.data_dir, device, cfg.limit, cfg.dataset, cfg.model.image_size)
                               for split in (True, False))
    steps_an_epoch = len(train_set) // cfg.batch_size
    total_steps = cfg.epochs * steps_an_epoch
    diffusion = GaussianDiffusion(T)
    run = Run(cfg, device)
    if resume:
        run.restore(files.load_state())
        files.start_again(run.curve)
        if run.step > total_steps:
            raise TrainingError(f"{files.state} is at step {run.step}, and {cfg.epochs} epochs end at step {total_steps}")
        if ranks.leads:
            files.save_weights(run.ema, run.step)  # a crash may have come between the state and these
            tqdm.write(f"resumed at step {run.step} of {total_steps}")
    else:
        if cfg.start_from:
            run.start_from(cfg.start_from)
        if ranks.leads:
            files.start_anew()
    network, averaged = run.model, run.ema
    if cfg.compile:
        network, averaged = compiled_networks(run, cfg, train_set[:cfg.batch_size // ranks.size], test_set[:HELD_OUT_BATCH])
    network = ranks.wrap(network)

    bar = tqdm(total=total_steps * cfg.batch_size, initial=run.step * cfg.batch_size, unit="img", unit_scale=True,
               mininterval=0.5, smoothing=0.05, disable=not ranks.leads)
    with bar, stop_signals() as signals:
        for epoch in range(len(run.curve) + 1, cfg.epochs + 1):
            bar.set_description(f"epoch {epoch}/{cfg.epochs}", refresh=False)
            # An epoch that a stopped run had begun goes on after its first `done` batches, in the order drawn then.
            run.shuffle_at_epoch = run.shuffle.get_state()
            done = run.step - (epoch - 1) * steps_an_epoch
            for index in islice(train_set.batches(cfg.batch_size, run.shuffle), done, None):
                # DDPM Algorithm 1, with the dropped labels of CFG Algorithm 1
                x_0, y = train_set[index]
                t, eps = diffusion.draw_t_and_eps(x_0)
                y = run.model.y_embedder.drop(y)
                loss = add_gradients(network, averaged, diffusion, ranks.share(x_0, y, t, eps), cfg)
                for optimizer in run.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(run.step, total_steps, cfg)
                    optimizer.step()
                    optimizer.zero_grad()
                run.step += 1
                update_ema(run.averages, run.parameters, run.earlier_steps + run.step, cfg.ema_decay)
                run.loss_sum += ranks.mean(loss)
                done += 1

                if bar.update(cfg.batch_size):  # true when it is drawn anew, twice a second at most
                    bar.set_postfix(loss=f"{finite(run.loss_sum / done, run.step, cfg):.4f}", refresh=False)
                stop = ranks.any(bool(signals))
                if run.step % cfg.checkpoint_every == 0 or run.step == total_steps or stop:
                    finite(run.loss_sum + sum(p.detach().sum() for p in run.model.parameters()), run.step, cfg)
                    if ranks.leads:
                        files.save_run(run.state(), run.ema, run.step)
                if stop:
                    raise TrainingStopped(f"stopped at step {run.step} of {total_steps}; the same command with --resume "
                                          "goes on from there", signals[0] if signals else signal.SIGTERM)
            run.curve.append({
                "epoch": epoch, "step": run.step, "train_loss": finite(run.loss_sum / done, run.step, cfg),
                "test_loss": held_out_loss(averaged, diffusion, test_set, cfg.loss), "seconds": run.seconds(),
            })
            bar.set_postfix({name: f"{run.curve[-1][name]:.4f}" for name in ("train_loss", "test_loss")})
            run.loss_sum.zero_()
            if ranks.leads:
                files.save_curve(run.curve, last=epoch == cfg.epochs)
    return run.ema


def finite(loss: Tensor, step: int, cfg: TrainConfig) -> float:
    """The value of a loss, or of a sum that holds one; TrainingError if it is not a finite number."""
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss or a weight is {value} at step {step} (learning rate up to {cfg.lr:g}); "
                            f"{cfg.checkpoint} is as it was saved before: try a lower --lr or a longer --warmup-steps")
    return value


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it, a first Ctrl-C or SIGTERM is only noted, so that the step at hand is finished; a second one acts at once.

    Yields the list that the signals' numbers are put in.
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
        yield came
    finally:
        restore()


def main(argv: list[str] | None = None) -> int:
    parser = train_parser()
    args = parse_train_args(parser, argv)
    try:
        cfg = TrainConfig(model=ModelConfig(**chosen(args, ModelConfig)), **chosen(args, TrainConfig))
        device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", "0")))
        RunFiles(cfg)  # what could not be written or used is said now, as a mistake in the arguments
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        with joined_ranks(device) as ranks:
            train(cfg, args.resume, ranks)
    except TrainingStopped as stop:
        print(stop)
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # before the first step, or a second one
        return 128 + signal.SIGINT
    except (CheckpointError, DataError, OSError, TrainingError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        print(f"train.py: error: out of memory with batches of {cfg.batch_size} images and this network; try a smaller "
              "--batch-size", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
