"""What Algorithm 1 leaves out of a run: its progress, its files, how it stops and continues."""

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig
from dataset import Digits
from dit import DiT
from runtime.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from runtime.distributed import Ranks
from runtime.files import check_files, locked, write_atomically
from runtime.pictures import as_bytes, loss_curve, save_picture, show
from runtime.script import TrainingError

# On --resume; "model" is compared field by field.
MAY_CHANGE = {"epochs", "checkpoint_every", "checkpoint", "data_dir", "device", "compile", "model"}
STATE = ("recipe", "schedule", "step", "optimizers", "weights", "ema", "curve", "samples",
         "loss_sum", "seconds", "order", "noise")  # the entries of model.resume.pth
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]  # of terminals and schedulers
CURVE = {"epoch": "d", "step": "d", "train_loss": ".6f", "test_loss": ".6f", "seconds": ".1f"}


class Run(ExitStack):
    """A run of `cfg`. In `with run:`, a stop signal saves it, and no other run writes its files.

    images: size of the training set; generator: the random numbers for t, eps and label dropout;
    schedule: `GaussianDiffusion.schedule`. SettingError if files cannot be written.
    """

    def __init__(self, cfg: TrainConfig, ranks: Ranks, model: DiT, ema: DiT,
                 optimizers: list[torch.optim.Optimizer], generator: torch.Generator, images: int,
                 schedule: list[float]):
        super().__init__()
        self.cfg, self.ranks, self.files, self.schedule = cfg, ranks, RunFiles(cfg), schedule
        self.model, self.ema, self.optimizers, self.generator = model, ema, optimizers, generator
        self.steps_per_epoch = images // cfg.batch_size
        self.total_steps = cfg.epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps done
        self.loss_sum = torch.zeros((), device=generator.device)  # over the current epoch
        self.curve: list[dict] = []  # the rows of loss.csv, one per epoch
        self.samples: list[dict] = []  # the rows of samples.png
        self.order = torch.Generator().manual_seed(cfg.seed)  # of the images
        self.order_at_epoch = self.order.get_state()  # before the current epoch's order was drawn
        self.started = time.monotonic()  # moved back on resume, by the time already spent
        self.signal = self.curve_due = 0

    def __enter__(self) -> "Run":
        weights = self.files.weights
        if self.ranks.leads and not self.enter_context(
                locked(weights.with_name(f".{weights.stem}.lock"))):
            raise OSError(f"another process is writing {weights} or a file next to it: wait until "
                          "it ends, or choose another --checkpoint")
        main = threading.current_thread() is threading.main_thread()
        for number in STOP_SIGNALS if main else ():  # ignored ones, as under nohup, stay so
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before = signal.signal(number, lambda *args: setattr(self, "signal", args[0]))
                self.callback(signal.signal, number, before)
        return self

    def begin(self, resume: bool) -> None:
        """Start, or continue a run of this recipe. CheckpointError or TrainingError if it can't."""
        if self.cfg.batch_size % self.ranks.size:
            raise TrainingError(f"a batch of {self.cfg.batch_size} cannot be shared evenly by "
                                f"{self.ranks.size} processes")
        # torchrun restarts dead processes without --resume.
        resume = self.ranks.any(resume or (self.ranks.restarted and self.files.state.exists()))
        if resume:
            self._restore()
        if self.ranks.leads and resume:
            print(f"resumed at step {self.step} of {self.total_steps}")
        elif self.ranks.leads:
            self.files.keep_other_run()
        self.bar = self.enter_context(tqdm(  # on a terminal
            initial=self.step * self.cfg.batch_size, total=self.total_steps * self.cfg.batch_size,
            unit="img", unit_scale=True, disable=None if self.ranks.leads else True))

    def _restore(self) -> None:
        """Take back what model.resume.pth keeps. CheckpointError if it is not of this recipe."""
        file = self.files.state
        if not file.exists():
            raise CheckpointError(f"there is nothing to resume: no file {file}")
        state = load_checkpoint(file, STATE, self.schedule)
        before = state["recipe"] | state["recipe"]["model"]
        now = asdict(self.cfg) | asdict(self.cfg.model)
        changed = [f"{name} was {before.get(name)!r} and is {value!r}"
                   for name, value in now.items()
                   if name not in MAY_CHANGE and before.get(name) != value]
        if changed:
            raise CheckpointError(f"{file} belongs to another recipe: {', '.join(changed)}")
        load_weights(file, self.model, state["weights"])
        load_weights(file, self.ema, state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # of this recipe and device
            optimizer.load_state_dict(saved | {"param_groups": groups})
        moments = [(value.shape, parameter.shape) for optimizer in self.optimizers
                   for parameter, values in optimizer.state.items() for value in values.values()]
        step, epochs = state["step"], len(state["curve"])  # complete ones
        if any(shape not in (own, ()) for shape, own in moments) or not (
                1 <= step <= self.total_steps and epochs == (step - 1) // self.steps_per_epoch):
            raise CheckpointError(f"{file} does not fit: it is at step {step}, epoch {epochs}, the "
                                  f"run has {self.total_steps} steps")
        self.step, self.curve, self.samples = state["step"], state["curve"], state["samples"]
        self.loss_sum.copy_(state["loss_sum"])
        self.started -= state["seconds"]
        self.order.set_state(state["order"])
        if len(state["noise"]) == len(self.generator.get_state()):  # else of another device
            self.generator.set_state(state["noise"])

    def state(self) -> dict:
        """What model.resume.pth keeps; `_restore` takes it back."""
        return {"recipe": asdict(self.cfg), "schedule": self.schedule, "step": self.step,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "weights": self.model.state_dict(), "ema": self.ema.state_dict(),
                "curve": self.curve, "samples": self.samples, "loss_sum": self.loss_sum,
                "seconds": time.monotonic() - self.started, "order": self.order_at_epoch,
                "noise": self.generator.get_state()}

    def batches(self, data: Digits) -> Iterator[Tensor]:
        """The indices of the batches that remain of the current epoch, in its random order."""
        self.order_at_epoch = self.order.get_state()
        done = self.step - len(self.curve) * self.steps_per_epoch
        yield from islice(data.batch_indices(self.cfg.batch_size, self.order), done, None)

    def end_step(self, loss: Tensor) -> None:
        """Count the step, save when due. Exits after a signal; TrainingError if it diverges."""
        self.step += 1
        self.loss_sum += self.ranks.mean(loss)
        self.bar.update(self.cfg.batch_size)
        stop = self.ranks.any(bool(self.signal))
        if self.step % self.cfg.checkpoint_every == 0 or self.step == self.total_steps or stop:
            self._finite(self.loss_sum + sum(p.detach().sum() for p in self.model.parameters()))
            if self.ranks.leads:
                weights = {name: value.cpu() for name, value in self.ema.state_dict().items()}
                save_checkpoint(self.files.weights, {
                    "model_config": asdict(self.ema.config), "ema": weights, "step": self.step,
                    "recipe": asdict(self.cfg), "schedule": self.schedule})
                save_checkpoint(self.files.state, self.state())
        if stop:
            if self.ranks.leads:
                print(f"stopped at step {self.step} of {self.total_steps}: rerun it with --resume")
            sys.exit(128 + (self.signal or signal.SIGTERM))

    def end_epoch(self, test_loss: float) -> None:
        """Add a row to the log, and at most every 10 s to loss.csv and loss.png."""
        now, last = time.monotonic(), self.step == self.total_steps
        self.curve.append({"epoch": len(self.curve) + 1, "step": self.step,
                           "train_loss": self._finite(self.loss_sum) / self.steps_per_epoch,
                           "test_loss": test_loss, "seconds": now - self.started})
        self.loss_sum.zero_()
        if not self.ranks.leads:
            return
        rows = [[f"{row[name]:{form}}" for name, form in CURVE.items()] for row in self.curve]
        with suppress(OSError):  # a closed terminal, whose SIGHUP saves the run
            line = ", ".join(map(" ".join, zip(CURVE, rows[-1], strict=True)))
            tqdm.write(line, file=sys.stderr)
        if last or now > self.curve_due:  # they take as long as many steps on a GPU
            self.curve_due = now + 10
            text = "\n".join(map(",".join, [CURVE, *rows])) + "\n"
            write_atomically(self.files.csv, lambda path: path.write_text(text))
            weighted = f", min-SNR weights ({self.cfg.min_snr:g})" if self.cfg.min_snr else ""
            ylabel = f"{self.cfg.loss.upper()} loss"
            save_picture(self.files.png, lambda: loss_curve(self.curve, ylabel, weighted))

    def add_samples(self, images: Tensor) -> None:
        """A row of samples.png: images (10, 1, H, W) of the digits 0 to 9."""
        self.samples.append({"epoch": len(self.curve), "images": as_bytes(images.cpu())})
        if self.ranks.leads:
            save_picture(self.files.samples, lambda: show(
                [row["images"] / 127.5 - 1 for row in self.samples],
                labels=[f"epoch {row['epoch']}" for row in self.samples]))

    def _finite(self, loss: Tensor) -> float:
        """The value of a sum with the loss. TrainingError, in every process, if not finite."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss or a weight is {value} at step {self.step}: "
                                f"{self.files.weights} is as last saved; start with a lower --lr")
        return value


class RunFiles:
    """A run's files, all next to model.pth. SettingError if they cannot be written."""

    def __init__(self, cfg: TrainConfig):
        self.all = self._of(Path(cfg.checkpoint))
        self.weights, self.state, self.csv, self.png, self.samples = self.all
        check_files(self.all)

    @staticmethod
    def _of(weights: Path) -> list[Path]:
        stem, prefix = weights.stem, "" if weights.stem == "model" else f"{weights.stem}."
        others = (f"{prefix}{name}" for name in ("loss.csv", "loss.png", "samples.png"))
        return [weights, *map(weights.with_name, (f"{stem}.resume{weights.suffix}", *others))]

    def keep_other_run(self) -> None:
        """Keep another run's files as those of --checkpoint model.old-1.pth, or -2 and so on."""
        there = [path for path in self.all if path.exists()]
        names = (self._of(self.weights.with_stem(f"{self.weights.stem}.old-{number}"))
                 for number in count(1))
        kept = next(files for files in names if not any(path.exists() for path in files))
        for path, name in zip(self.all, kept, strict=True):
            if path in there:  # model.pth is copied, so that there is one at every moment
                (shutil.copy2 if path == self.weights else os.rename)(path, name)
        if there:
            print(f"the files of another run are kept as {kept[0]} and so on")
