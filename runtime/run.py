"""What Algorithm 1 leaves out of a run: its progress, its files, how it stops and continues."""

import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
from runtime.checkpoint import (
    CheckpointError,
    check_like,
    check_schedule,
    checksum,
    load_checkpoint,
    printable,
    save_checkpoint,
)
from runtime.distributed import Ranks
from runtime.files import check_files, lock, remove_leftovers, write_atomically
from runtime.pictures import as_bytes, loss_curve, save_picture, show
from runtime.script import Stopped, TrainingError

# What processes of one run may have differently; and what --resume may change. "model" is in the
# latter because the fields of the network are compared one by one.
OF_A_MACHINE = {"checkpoint", "data_dir", "device", "compile"}
MAY_CHANGE = OF_A_MACHINE | {"epochs", "checkpoint_every", "model"}
STATE = {"recipe": dict, "weights": dict, "ema": dict, "optimizers": list, "step": int,
         "curve": list, "samples": list, "seconds": float, "loss_sum": Tensor, "order": Tensor,
         "noise": Tensor, "threads": int}
NOISE_BYTES = {5056, 16, 36, 44}  # of a generator's state: a CPU's, CUDA's, Apple's before, now
STOP_SIGNALS = [number for name in ("INT", "TERM", "HUP", "USR1", "USR2", "XCPU")
                if (number := getattr(signal, f"SIG{name}", None))]  # of terminals and schedulers
CURVE = {"epoch": "d", "step": "d", "train_loss": ".6f", "test_loss": ".6f", "seconds": ".1f"}


class Run:
    """A run of `cfg`. Within `with run:`, no other run writes its files.

    There, a first stop signal saves the run and ends it, unless it trains in a thread.
    images: size of the training set; generator: the random numbers for t, eps and label dropout;
    schedule: see `GaussianDiffusion.schedule`. OSError if the files could not be written.
    """

    def __init__(self, cfg: TrainConfig, ranks: Ranks, model: DiT, ema: DiT,
                 optimizers: list[torch.optim.Optimizer], generator: torch.Generator, images: int,
                 schedule: list[float]):
        self.cfg, self.ranks, self.files, self.schedule = cfg, ranks, RunFiles(cfg), schedule
        self.model, self.ema, self.optimizers = model, ema, optimizers
        self.generator = generator
        self.steps_per_epoch = images // cfg.batch_size
        self.total_steps = cfg.epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps done
        # Over the current epoch; reading it waits for the GPU.
        self.loss_sum = torch.zeros((), device=generator.device)
        self.curve: list[dict] = []  # the rows of loss.csv, one per epoch
        self.samples: list[dict] = []  # the rows of samples.png
        self.order = torch.Generator().manual_seed(cfg.seed)  # of the images
        self.order_at_epoch = self.order.get_state()  # before the current epoch's order was drawn
        self.started = time.monotonic()  # moved back on resume, by the time already spent
        self.signal, self.signal_time = 0, 0.0

    def __enter__(self) -> "Run":
        self.exit = ExitStack()
        if self.ranks.leads:
            self.exit.enter_context(lock(self.files.weights))
            remove_leftovers(self.files.all)
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in STOP_SIGNALS:
                # nohup, for one, ignores SIGHUP
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self.exit.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *exception) -> None:
        self.exit.close()

    def _note(self, number: int, frame) -> None:
        """Lets the current step finish. A second Ctrl-C acts at once.

        But not within 2 s: torchrun and timeout send two.
        """
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.signal_time > 2:
            raise KeyboardInterrupt

    def begin(self, resume: bool) -> None:
        """Start, or continue a run of the same recipe. CheckpointError, TrainingError if it can't.

        torchrun restarts dead processes without --resume. A state from another launch is not
        continued: this one may have died before it set that aside.
        """
        recipe = {name: item for name, item in asdict(self.cfg).items() if name not in OF_A_MACHINE}
        if not self.ranks.same(checksum([recipe, self.schedule])):
            raise TrainingError("the processes of this run have different options: start all of "
                                "them with the same")
        if self.ranks.any(resume or (self.ranks.restarted
                                     and self.files.holds_state_of(self.ranks.launch))):
            self._continue()
        elif self.ranks.leads:
            self.files.keep_other_run()
        self.bar = self.exit.enter_context(tqdm(
            initial=self.step * self.cfg.batch_size, total=self.total_steps * self.cfg.batch_size,
            unit="img", unit_scale=True, mininterval=0.5, smoothing=0.05,
            disable=None if self.ranks.leads else True))  # None: shown on a terminal only

    def _continue(self) -> None:
        """Take back the state of model.resume.pth; all of it is checked before a file changes."""
        try:
            state = self.files.load_state(self.schedule)
            self._check(state)
            self._restore(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:
            raise CheckpointError(f"{self.files.state} does not fit this run: "
                                  f"{printable(error)}") from error
        if not self.ranks.same(checksum([self.step, self.model.state_dict()])):
            raise TrainingError("the processes of this run found different states: they need one "
                                "directory")
        if self.ranks.leads:
            self._save_weights()  # after a crash, this and the curve may be older than the state
            if self.curve:
                self.files.save_curve(self.curve)
            print(f"resumed at step {self.step} of {self.total_steps}")
            epochs = state["recipe"].get("epochs", self.cfg.epochs)
            if epochs != self.cfg.epochs and self.cfg.lr_schedule == "cosine":
                print(f"the cosine now spans {self.cfg.epochs} epochs instead of {epochs}: the "
                      "learning rate jumps")
            if state["threads"] != torch.get_num_threads():
                print(f"with {torch.get_num_threads()} threads instead of {state['threads']}: sums "
                      "are taken in another order, so the last bits may differ")

    def state(self) -> dict:
        """What model.resume.pth keeps; `_restore` takes it back."""
        return {"recipe": asdict(self.cfg), "schedule": self.schedule,
                "weights": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step, "curve": self.curve, "samples": self.samples,
                "seconds": time.monotonic() - self.started, "loss_sum": self.loss_sum,
                "order": self.order_at_epoch, "noise": self.generator.get_state(),
                "threads": torch.get_num_threads(), "launch": self.ranks.launch}

    def _check(self, state: dict) -> None:
        """An exception unless all that `_restore` takes fits this run."""
        step, epochs, noise = state["step"], len(state["curve"]), state["noise"]
        if step > self.total_steps:
            raise ValueError(f"it is at step {step}, and {self.cfg.epochs} epochs end at step "
                             f"{self.total_steps}")
        ends = [(n, n * self.steps_per_epoch) for n in range(1, epochs + 1)]
        if (step < 1 or (step - 1) // self.steps_per_epoch != epochs
                or ends != [(row["epoch"], row["step"]) for row in state["curve"]]):
            raise ValueError(f"its curve of {epochs} epochs does not lead to step {step}")
        if noise.dtype != torch.uint8 or noise.ndim != 1 or len(noise) not in NOISE_BYTES:
            raise ValueError("noise is not the state of a random number generator")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()  # gives it the state that it will have; all is overwritten later
            optimizer.zero_grad()
        own, config = self.state(), self.cfg.model
        for built, saved in zip(own["optimizers"], state["optimizers"], strict=True):
            if settings(built) != settings(saved):
                raise ValueError("its optimizers have other settings")
            if any(entry.get("step", step) != step for entry in saved["state"].values()):
                raise ValueError(f"its optimizers are not at step {step}")
            check_like(built["state"], saved["state"], "optimizer")
        row = {"epoch": 1, "step": 1, "train_loss": 0.0, "test_loss": 0.0, "seconds": 0.0}
        images = torch.zeros(config.num_classes, config.in_channels, config.image_size,
                             config.image_size, dtype=torch.uint8)
        own["curve"] = [row] * epochs
        own["samples"] = [{"epoch": 1, "images": images}] * len(state["samples"])
        for name in ("weights", "ema", "curve", "samples", "seconds", "loss_sum", "order"):
            check_like(own[name], state[name], name)

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for index, entry in optimizer.state_dict()["state"].items():  # as `_check` filled it
                for name, value in entry.items():
                    value.copy_(saved["state"][index][name])
        self.step, self.curve, self.samples = state["step"], state["curve"], state["samples"]
        self.started -= state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.order.set_state(state["order"])
        self.generator.manual_seed((self.cfg.seed + self.step) % 2**32)
        if len(state["noise"]) == len(self.generator.get_state()):  # else of another kind of device
            self.generator.set_state(state["noise"])

    def epochs(self) -> Iterator[int]:
        """The epochs that remain, counted from 1."""
        for epoch in range(len(self.curve) + 1, self.cfg.epochs + 1):
            self.bar.set_description(f"epoch {epoch}/{self.cfg.epochs}", refresh=False)
            yield epoch

    def batches(self, data: Digits) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x_0, y) that remain of the current epoch, in its random order."""
        self.order_at_epoch = self.order.get_state()
        indices = data.batch_indices(self.cfg.batch_size, self.order)
        for index in islice(indices, self._steps_of_epoch(), None):
            yield data[index]

    def _steps_of_epoch(self) -> int:
        """How many steps of the current epoch are done."""
        return self.step - len(self.curve) * self.steps_per_epoch

    def end_step(self, loss: Tensor) -> None:
        """Count the step, show the mean loss, save when due.

        Stopped after a signal, TrainingError if training diverges.
        """
        self.step += 1
        self.loss_sum += self.ranks.mean(loss)
        if self.bar.update(self.cfg.batch_size):  # true twice a second at most, when it is shown
            loss_so_far = self.loss_sum.item() / self._steps_of_epoch()
            self.bar.set_postfix(loss=f"{loss_so_far:.4f}", refresh=False)
        stop = self.ranks.any(bool(self.signal))
        if self.step % self.cfg.checkpoint_every == 0 or self.step == self.total_steps or stop:
            self._finite(self.loss_sum + sum(p.detach().sum() for p in self.model.parameters()))
            if self.ranks.leads:
                # The state first: a crash leaves an older model.pth, which is replaced on resume.
                save_checkpoint(self.files.state, self.state())
                self._save_weights()
                if self.curve:
                    self.files.save_csv(self.curve)
        if stop:
            raise Stopped(f"stopped at step {self.step} of {self.total_steps}; the same command "
                          "with --resume continues", self.signal or signal.SIGTERM)

    def _save_weights(self) -> None:
        weights = {name: value.cpu() for name, value in self.ema.state_dict().items()}  # load anywhere
        save_checkpoint(self.files.weights, {
            "model_config": asdict(self.ema.config), "ema": weights, "step": self.step,
            "recipe": asdict(self.cfg), "schedule": self.schedule})

    def end_epoch(self, test_loss: float) -> None:
        """Add a row to loss.csv and a point to loss.png."""
        row = {"epoch": len(self.curve) + 1, "step": self.step,
               "train_loss": self._finite(self.loss_sum) / self.steps_per_epoch,
               "test_loss": test_loss, "seconds": time.monotonic() - self.started}
        self.curve.append(row)
        self.loss_sum.zero_()
        losses = {name: f"{row[name]:.4f}" for name in ("train_loss", "test_loss")}
        self.bar.set_postfix(losses)
        if self.ranks.leads:
            if self.bar.disable:  # a log file needs no bar
                print(f"epoch {row['epoch']}/{self.cfg.epochs}: {row['seconds']:.0f} s",
                      *(f"{name}={loss}" for name, loss in losses.items()), sep=", ",
                      file=sys.stderr, flush=True)
            self.files.save_curve(self.curve, last=row["epoch"] == self.cfg.epochs)

    def add_samples(self, images: Tensor) -> None:
        """A row of samples.png: images (10, 1, H, W) of the digits 0 to 9."""
        self.samples.append({"epoch": len(self.curve), "images": as_bytes(images.cpu())})
        if self.ranks.leads:
            self.files.save_samples(self.samples)

    def _finite(self, loss: Tensor) -> float:
        """The value of a loss, or of a sum with one; TrainingError, in every process, if NaN."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss or a weight is {value} at step {self.step}; "
                                f"{self.cfg.checkpoint} is left as last saved. Try a learning rate "
                                f"below {self.cfg.lr:g}")
        return value


def settings(optimizer: dict) -> list[dict]:
    """The groups in an optimizer's state_dict, without the values that a device or a step sets."""
    changing = dict.fromkeys(("lr", "foreach", "fused", "capturable"))
    return [{name: changing.get(name, value) for name, value in group.items()}
            for group in optimizer["param_groups"]]


class RunFiles:
    """model.pth; next to it model.resume.pth, loss.csv, loss.png and samples.png.

    A checkpoint of another name, digits.pth, has digits.loss.csv and so on. OSError if they could
    not be written.
    """

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.all = files_of_run(Path(cfg.checkpoint))
        self.weights, self.state, self.csv, self.png, self.samples = self.all
        check_files(self.all)
        self.pictures_failed, self.csv_time, self.png_time = False, -math.inf, -math.inf

    def keep_other_run(self) -> None:
        """Keep another run's files under names with which it can be resumed.

        They are those of --checkpoint model.old-1.pth, or -2 and so on.
        """
        if not any(path.exists() for path in self.all):
            return
        choices = (files_of_run(self.weights.with_stem(f"{self.weights.stem}.old-{number}"))
                   for number in count(1))
        kept = next(names for names in choices if not any(path.exists() for path in names))
        remove_leftovers(kept)
        if self.weights.exists():  # a copy, so that there is a model.pth at every moment
            write_atomically(kept[0], lambda temporary: shutil.copy2(self.weights, temporary))
        for path, name in zip(self.all[1:], kept[1:], strict=True):
            if path.exists():
                path.rename(name)
        continues = f"; --resume --checkpoint {kept[0]} continues it" if kept[1].exists() else ""
        print(f"{self.weights} and the files next to it are another run's: kept as {kept[0]} and "
              f"so on{continues}")

    def holds_state_of(self, launch: str) -> bool:
        """Whether there is a state that this launch of torchrun saved."""
        try:
            return load_checkpoint(self.state, STATE).get("launch") == launch
        except CheckpointError:
            return False

    def load_state(self, schedule: list[float]) -> dict:
        """The content of model.resume.pth. CheckpointError if there is none of this recipe."""
        if not self.state.exists():
            raise CheckpointError(f"there is nothing to resume: no file {self.state}")
        content = load_checkpoint(self.state, STATE)
        check_schedule(self.state, content, schedule)
        defaults = asdict(TrainConfig()) | asdict(ModelConfig())  # of options newer than the file
        before = defaults | content["recipe"] | content["recipe"]["model"]
        now = asdict(self.cfg) | asdict(self.cfg.model)
        changed = [name for name in now | before
                   if name not in MAY_CHANGE and before.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
                                    for name in changed)
            raise CheckpointError(f"{self.state} belongs to another recipe: "
                                  f"{printable(differences)}; resume with the options that it was "
                                  "started with, or leave out --resume to start again")
        return content

    def save_csv(self, curve: list[dict]) -> None:
        rows = [",".join(format(row[name], form) for name, form in CURVE.items()) for row in curve]
        text = "\n".join([",".join(CURVE), *rows]) + "\n"
        write_atomically(self.csv, lambda path: path.write_text(text))

    def save_curve(self, curve: list[dict], last: bool = False) -> None:
        """loss.csv once a second and loss.png every ten: they take as long as steps on a GPU."""
        now = time.monotonic()
        if last or now - self.csv_time > 1:
            self.csv_time = now
            self.save_csv(curve)
        if last or now - self.png_time > 10:
            self.png_time = now
            weighted = f", min-SNR weights ({self.cfg.min_snr:g})" if self.cfg.min_snr else ""
            ylabel = f"{self.cfg.loss.upper()} loss"
            self._picture(self.png, lambda: loss_curve(curve, ylabel, weighted))

    def save_samples(self, samples: list[dict]) -> None:
        self._picture(self.samples, lambda: show(
            [row["images"] / 127.5 - 1 for row in samples],
            labels=[f"epoch {row['epoch']}" for row in samples]))

    def _picture(self, path: Path, make: Callable) -> None:
        """A picture that cannot be drawn costs one line, not the run."""
        try:
            save_picture(path, make)
        except Exception as error:
            if not self.pictures_failed:
                tqdm.write(f"{path} could not be drawn, and training continues: {error}")
            self.pictures_failed = True


def files_of_run(weights: Path) -> tuple[Path, ...]:
    """The files of a run, as `RunFiles` names them; `weights` is the first."""
    stem, suffix = weights.stem, weights.suffix
    prefix = "" if stem == "model" else f"{stem}."
    others = (f"{stem}.resume{suffix}", f"{prefix}loss.csv", f"{prefix}loss.png",
              f"{prefix}samples.png")
    return weights, *(weights.parent / name for name in others)
