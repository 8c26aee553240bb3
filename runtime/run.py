"""What Algorithm 1 leaves out of a run: its progress, its files, how it stops and continues."""

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ModelConfig, TrainConfig
from dataset import Digits
from dit import DiT
from runtime.checkpoint import CheckpointError, load_checkpoint, matched, save_checkpoint
from runtime.distributed import Ranks
from runtime.files import check_files, lock, remove_leftovers, write_atomically
from runtime.pictures import as_bytes, loss_curve, save_picture, show
from runtime.script import Stopped, TrainingError

LOCAL = {"checkpoint", "data_dir", "device", "compile"}  # may differ between processes
MAY_CHANGE = LOCAL | {"epochs", "checkpoint_every", "model"}  # on --resume; model: field by field
STATE = {"recipe": dict, "step": int, "curve": list, "samples": list, "noise": Tensor}
NOISE_BYTES = (5056, 16, 36, 44)  # of a generator's state: of a CPU, CUDA, Apple before and now
STOP_SIGNALS = [getattr(signal, name)  # of terminals and schedulers
                for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
                if hasattr(signal, name)]
CURVE = {"epoch": "d", "step": "d", "train_loss": ".6f", "test_loss": ".6f", "seconds": ".1f"}


class Run(ExitStack):
    """A run of `cfg`. Within `with run:`, no other run writes its files.

    There, a first stop signal saves the run and ends it; in a thread, signals are the caller's.
    images: size of the training set; generator: the random numbers for t, eps and label dropout;
    schedule: `GaussianDiffusion.schedule`. OSError if the files could not be written.
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
        self.signal, self.csv_due, self.png_due = 0, 0.0, 0.0

    def __enter__(self) -> "Run":
        if self.ranks.leads:
            self.enter_context(lock(self.files.weights))
            remove_leftovers(self.files.all)
        for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            # nohup, for one, ignores SIGHUP
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame) -> None:
        """Lets the current step finish. A second signal changes nothing: torchrun sends two."""
        self.signal = self.signal or number

    def begin(self, resume: bool) -> None:
        """Start, or continue a run of this recipe. CheckpointError or TrainingError if it can't."""
        recipe = {name: value for name, value in asdict(self.cfg).items() if name not in LOCAL}
        if not self.ranks.same([recipe, self.schedule]):
            raise TrainingError("the processes of this run have different options")
        if self.cfg.batch_size % self.ranks.size:
            raise TrainingError(f"a batch of {self.cfg.batch_size} cannot be shared evenly by "
                                f"{self.ranks.size} processes")
        # torchrun restarts dead processes without --resume.
        if self.ranks.any(resume or (self.ranks.restarted and self.files.state.exists())):
            self._continue()
        elif self.ranks.leads:
            self.files.keep_other_run()
        self.bar = self.enter_context(tqdm(  # on a terminal
            initial=self.step * self.cfg.batch_size, total=self.total_steps * self.cfg.batch_size,
            unit="img", unit_scale=True, mininterval=0.5, smoothing=0.05,
            disable=None if self.ranks.leads else True))

    def _continue(self) -> None:
        try:
            state = self._load_state()
            self._restore(state)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.files.state} does not fit this run: {error}") from error
        if not self.ranks.same([self.step, self.model.state_dict()]):
            raise TrainingError("the processes of this run found different states")
        if self.ranks.leads:
            self._save_weights()  # after a crash, they may be older than the state
            print(f"resumed at step {self.step} of {self.total_steps} (--epochs {self.cfg.epochs}, "
                  f"before {state['recipe'].get('epochs')})")

    def _load_state(self) -> dict:
        """The content of model.resume.pth. CheckpointError if there is none of this recipe."""
        if not self.files.state.exists():
            raise CheckpointError(f"there is nothing to resume: no file {self.files.state}")
        state = load_checkpoint(self.files.state, STATE, self.schedule)
        defaults = asdict(TrainConfig()) | asdict(ModelConfig())  # of options newer than the file
        before = defaults | state["recipe"] | state["recipe"]["model"]
        now = asdict(self.cfg) | asdict(self.cfg.model)
        changed = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
                   for name in now | before
                   if name not in MAY_CHANGE and before.get(name) != now.get(name)]
        if changed:
            raise CheckpointError(f"{self.files.state} belongs to another recipe: "
                                  f"{', '.join(changed)}; resume with the options that it was "
                                  "started with, or leave out --resume to start again")
        return state

    def state(self) -> dict:
        """What model.resume.pth keeps; `_restore` takes it back."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        for group in [group for optimizer in optimizers for group in optimizer["param_groups"]]:
            for name in ("lr", "foreach", "fused", "capturable"):  # of the step or the device
                group.pop(name, None)
        return {"recipe": asdict(self.cfg), "schedule": self.schedule, "optimizers": optimizers,
                "weights": self.model.state_dict(), "ema": self.ema.state_dict(), "step": self.step,
                "curve": self.curve, "samples": self.samples, "loss_sum": self.loss_sum,
                "seconds": time.monotonic() - self.started, "order": self.order_at_epoch,
                "noise": self.generator.get_state()}

    def _restore(self, state: dict) -> None:
        """Take back a `state()`. An exception if not all of it fits this run."""
        step, epochs, noise = state["step"], len(state["curve"]), state["noise"]
        if not 1 <= step <= self.total_steps or epochs != (step - 1) // self.steps_per_epoch:
            raise ValueError(f"step {step}, after {epochs} epochs, is not one of its "
                             f"{self.total_steps} steps")
        if noise.dtype != torch.uint8 or noise.ndim != 1 or len(noise) not in NOISE_BYTES:
            raise ValueError("noise is not the state of a generator")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()  # so that it has all the tensors that it needs
            optimizer.zero_grad()
        side = self.cfg.model.image_size
        images = torch.zeros(self.cfg.model.num_classes, 1, side, side, dtype=torch.uint8)
        expected = self.state() | {
            "curve": [{"epoch": n, "step": n * self.steps_per_epoch, "train_loss": 0.0,
                       "test_loss": 0.0, "seconds": 0.0} for n in range(1, epochs + 1)],
            "samples": [row | {"images": images} for row in state["samples"]]}
        checked = expected.keys() - {"recipe", "schedule", "step", "noise"}
        pairs = list(matched(self.files.state, {name: expected[name] for name in checked},
                             {name: state[name] for name in checked}))
        for own, saved in pairs:
            own.copy_(saved)
        self.step, self.curve, self.samples = step, state["curve"], state["samples"]
        self.started -= state["seconds"]
        self.order.set_state(self.order_at_epoch)
        self.generator.manual_seed((self.cfg.seed + step) % 2**32)
        if len(noise) == len(self.generator.get_state()):  # else of another kind of device
            self.generator.set_state(noise)

    def epochs(self) -> Iterator[int]:
        """The epochs that remain, counted from 1."""
        for epoch in range(len(self.curve) + 1, self.cfg.epochs + 1):
            self.bar.set_description(f"epoch {epoch}/{self.cfg.epochs}", refresh=False)
            yield epoch

    def batches(self, data: Digits) -> Iterator[Tensor]:
        """The indices of the batches that remain of the current epoch, in its random order."""
        self.order_at_epoch = self.order.get_state()
        done = self.step - len(self.curve) * self.steps_per_epoch
        yield from islice(data.batch_indices(self.cfg.batch_size, self.order), done, None)

    def end_step(self, loss: Tensor) -> None:
        """Count the step, save when due. Stopped after a signal, TrainingError if it diverges."""
        self.step += 1
        self.loss_sum += self.ranks.mean(loss)
        if self.bar.update(self.cfg.batch_size):  # true twice a second at most: a GPU has to wait
            mean = self.loss_sum.item() / (self.step - len(self.curve) * self.steps_per_epoch)
            self.bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        stop = self.ranks.any(bool(self.signal))
        if self.step % self.cfg.checkpoint_every == 0 or self.step == self.total_steps or stop:
            self._finite(self.loss_sum + sum(p.detach().sum() for p in self.model.parameters()))
            if self.ranks.leads:
                # The state first: a crash leaves an older model.pth, which is replaced on resume.
                save_checkpoint(self.files.state, self.state())
                self._save_weights()
        if stop:
            raise Stopped(f"stopped at step {self.step} of {self.total_steps}; the same command "
                          "with --resume continues", self.signal or signal.SIGTERM)

    def _save_weights(self) -> None:
        weights = {name: value.cpu() for name, value in self.ema.state_dict().items()}
        save_checkpoint(self.files.weights, {
            "model_config": asdict(self.ema.config), "ema": weights, "step": self.step,
            "recipe": asdict(self.cfg), "schedule": self.schedule})
        self._save_csv()

    def _save_csv(self) -> None:
        lines = [",".join(format(row[name], form) for name, form in CURVE.items())
                 for row in self.curve]
        text = "\n".join([",".join(CURVE), *lines, ""])
        write_atomically(self.files.csv, lambda path: path.write_text(text))

    def end_epoch(self, test_loss: float) -> None:
        """Add a row to loss.csv and a point to loss.png."""
        now, last = time.monotonic(), self.step == self.total_steps
        row = {"epoch": len(self.curve) + 1, "step": self.step,
               "train_loss": self._finite(self.loss_sum) / self.steps_per_epoch,
               "test_loss": test_loss, "seconds": now - self.started}
        self.curve.append(row)
        self.loss_sum.zero_()
        self.bar.set_postfix({name: f"{row[name]:.4f}" for name in ("train_loss", "test_loss")})
        if self.bar.disable and self.ranks.leads:  # a line in a log file
            print(", ".join(f"{name} {row[name]:{form}}" for name, form in CURVE.items()),
                  file=sys.stderr, flush=True)
        # Not after every epoch: they take as long as many steps on a GPU.
        if self.ranks.leads and (last or now > self.csv_due):
            self.csv_due = now + 1
            self._save_csv()
        if self.ranks.leads and (last or now > self.png_due):
            self.png_due = now + 10
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
        """The value of a sum with the loss. TrainingError, in every process, if it is NaN."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss or a weight is {value} at step {self.step}; "
                                f"{self.cfg.checkpoint} is left as last saved. Try a learning rate "
                                f"below {self.cfg.lr:g}")
        return value


class RunFiles:
    """model.pth; next to it model.resume.pth, loss.csv, loss.png and samples.png.

    Those of digits.pth are digits.resume.pth, digits.loss.csv and so on. OSError if they could not
    be written.
    """

    def __init__(self, cfg: TrainConfig):
        self.all = self._of(Path(cfg.checkpoint))
        self.weights, self.state, self.csv, self.png, self.samples = self.all
        check_files(self.all)

    @staticmethod
    def _of(weights: Path) -> list[Path]:
        stem, prefix = weights.stem, "" if weights.stem == "model" else f"{weights.stem}."
        names = f"{stem}.resume{weights.suffix}", *(f"{prefix}{name}" for name in (
            "loss.csv", "loss.png", "samples.png"))
        return [weights, *(weights.with_name(name) for name in names)]

    def keep_other_run(self) -> None:
        """Keep another run's files as those of --checkpoint model.old-1.pth, or -2 and so on."""
        there = [path.exists() for path in self.all]
        names = (self._of(self.weights.with_stem(f"{self.weights.stem}.old-{number}"))
                 for number in count(1))
        kept = next(files for files in names if not any(path.exists() for path in files))
        for path, name in zip(self.all, kept, strict=True):
            if path.exists():  # model.pth is copied, so that there is one at every moment
                (shutil.copy2 if path == self.weights else os.rename)(path, name)
        if any(there):
            continues = f"; --resume --checkpoint {kept[0]} continues it" if there[1] else ""
            print(f"{self.weights} and the files next to it are another run's: kept as {kept[0]} "
                  f"and so on{continues}")
