"""Everything in a training run that Algorithm 1 leaves out: its progress, its files, how it stops and continues."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ModelConfig, TrainConfig
from dataset import Digits
from dit import DiT
from runtime.checkpoint import CheckpointError, load_checkpoint, printable, save_checkpoint
from runtime.distributed import Ranks
from runtime.files import check_files, files_of_run, keep_other_run, write_atomically
from runtime.pictures import as_bytes, loss_curve, save_picture, show
from runtime.script import Stopped, TrainingError, lock

# What may differ on --resume; "model" because the fields of the network are compared one by one.
MAY_CHANGE = {"epochs", "checkpoint", "checkpoint_every", "data_dir", "device", "compile", "model"}
STATE = {"recipe": dict, "weights": dict, "ema": dict, "optimizers": list, "step": int, "curve": list, "samples": list,
         "seconds": float, "loss_sum": Tensor, "order": Tensor, "noise": Tensor, "threads": int}
STOP_SIGNALS = [number for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR",
                                    "STKFLT", "XCPU", "BREAK")  # what people, terminals and schedulers stop a run with
                if (number := getattr(signal, f"SIG{name}", None))]
CURVE = {"epoch": "d", "step": "d", "train_loss": ".6f", "test_loss": ".6f", "seconds": ".1f"}  # columns of loss.csv


class Run:
    """A run of `cfg`. Within `with run:` no other run writes its files, and a first stop signal saves it and ends it.

    images: how many there are to train on; generator: of t, eps and dropped labels. OSError if the files
    could not be written.
    """

    def __init__(self, cfg: TrainConfig, ranks: Ranks, model: DiT, ema: DiT, optimizers: list[torch.optim.Optimizer],
                 generator: torch.Generator, images: int):
        self.cfg, self.ranks, self.files = cfg, ranks, RunFiles(cfg)
        self.model, self.ema, self.optimizers, self.generator = model, ema, optimizers, generator
        self.steps_per_epoch = images // cfg.batch_size
        self.total_steps = cfg.epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps done
        self.loss_sum = torch.zeros((), device=generator.device)  # over the current epoch; reading it waits for the GPU
        self.curve: list[dict] = []  # the rows of loss.csv, one per epoch
        self.samples: list[dict] = []  # the rows of samples.png
        self.order = torch.Generator().manual_seed(cfg.seed)  # of the images
        self.order_at_epoch = self.order.get_state()  # its state before the current epoch's order was drawn
        self.started = time.monotonic()  # moved back on resume, by the time already spent
        self.signal, self.signal_time = 0, 0.0

    def __enter__(self) -> "Run":
        self.exit = ExitStack()
        if self.ranks.leads:
            self.exit.enter_context(lock(self.files.weights))
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # nohup, for one, ignores SIGHUP
                self.exit.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *exception) -> None:
        self.exit.close()

    def _note(self, number: int, frame) -> None:
        """Lets the current step finish. A second Ctrl-C acts at once, but not within 2 s: torchrun and timeout send two."""
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.signal_time > 2:
            raise KeyboardInterrupt

    def begin(self, resume: bool) -> None:
        """Start, or continue from the state of a run of the same recipe. CheckpointError or TrainingError if it cannot."""
        # torchrun restarts dead processes without --resume. A state from another launch is not continued: this one may have
        # died before it set that aside.
        if self.ranks.any(resume or (self.ranks.restarted and self.files.holds_state_of(self.ranks.launch))):
            self._continue()
        elif self.ranks.leads:
            keep_other_run(self.files.weights)
        self.bar = self.exit.enter_context(tqdm(
            initial=self.step * self.cfg.batch_size, total=self.total_steps * self.cfg.batch_size, unit="img",
            unit_scale=True, mininterval=0.5, smoothing=0.05, disable=not self.ranks.leads))

    def _continue(self) -> None:
        try:
            state = self.files.load_state()
            self._restore(state)
            if self.step > self.total_steps:
                raise TrainingError(f"{self.files.state} is at step {self.step}, and {self.cfg.epochs} epochs end at step "
                                    f"{self.total_steps}")
            if self.ranks.leads:
                # After a crash, these may be older than the state. A state that does not fit fails before they change.
                if self.curve:
                    self.files.save_curve(self.curve, last=False)
                self.files.save_weights(self.ema, self.step)
                print(f"resumed at step {self.step} of {self.total_steps}")
                if (before := state["recipe"]["epochs"]) != self.cfg.epochs and self.cfg.lr_schedule == "cosine":
                    print(f"the cosine now spans {self.cfg.epochs} epochs instead of {before}: the learning rate jumps")
                if state["threads"] != torch.get_num_threads():
                    print(f"with {torch.get_num_threads()} threads instead of {state['threads']}: sums are taken in another "
                          "order, so the last bits may differ")
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.files.state} does not fit this run: {printable(error)}") from error

    def state(self) -> dict:
        """What model.resume.pth keeps; `_restore` takes it back."""
        return {"weights": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step, "curve": self.curve, "samples": self.samples, "seconds": time.monotonic() - self.started,
                "loss_sum": self.loss_sum, "order": self.order_at_epoch, "noise": self.generator.get_state(),
                "threads": torch.get_num_threads(), "launch": self.ranks.launch}

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.curve, self.samples = state["step"], state["curve"], state["samples"]
        self.started -= state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.order.set_state(state["order"])
        self.generator.manual_seed(self.cfg.seed + self.step)
        if len(state["noise"]) == len(self.generator.get_state()):  # else it is of another kind of device
            self.generator.set_state(state["noise"])

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are not complete."""
        for epoch in range(len(self.curve) + 1, self.cfg.epochs + 1):
            self.bar.set_description(f"epoch {epoch}/{self.cfg.epochs}", refresh=False)
            yield epoch

    def batches(self, data: Digits) -> Iterator[tuple[Tensor, Tensor]]:
        """The remaining batches (x_0, y) of the current epoch, in the order drawn for it."""
        self.order_at_epoch = self.order.get_state()
        for index in islice(data.batch_indices(self.cfg.batch_size, self.order), self._steps_of_epoch(), None):
            yield data[index]

    def _steps_of_epoch(self) -> int:
        """How many steps of the current epoch are done."""
        return self.step - len(self.curve) * self.steps_per_epoch

    def end_step(self, loss: Tensor) -> None:
        """Count the step, show the mean loss, save when due. Stopped after a signal, TrainingError if it diverges."""
        self.step += 1
        self.loss_sum += self.ranks.mean(loss)
        if self.bar.update(self.cfg.batch_size):  # true when it is refreshed, twice a second at most
            self.bar.set_postfix(loss=f"{self.loss_sum.item() / self._steps_of_epoch():.4f}", refresh=False)
        stop = self.ranks.any(bool(self.signal))
        if self.step % self.cfg.checkpoint_every == 0 or self.step == self.total_steps or stop:
            self._finite(self.loss_sum + sum(p.detach().sum() for p in self.model.parameters()))
            if self.ranks.leads:
                self.files.save(self.state(), self.ema, self.step)
        if stop:
            raise Stopped(f"stopped at step {self.step} of {self.total_steps}; the same command with --resume continues",
                          self.signal or signal.SIGTERM)

    def end_epoch(self, test_loss: float) -> None:
        """Add a row to loss.csv, and update loss.png."""
        self.curve.append({"epoch": len(self.curve) + 1, "step": self.step, "test_loss": test_loss,
                           "train_loss": self._finite(self.loss_sum) / self.steps_per_epoch,
                           "seconds": time.monotonic() - self.started})
        self.bar.set_postfix({name: f"{self.curve[-1][name]:.4f}" for name in ("train_loss", "test_loss")})
        self.loss_sum.zero_()
        if self.ranks.leads:
            self.files.save_curve(self.curve, last=len(self.curve) == self.cfg.epochs)

    def add_samples(self, images: Tensor) -> None:
        """A row of samples.png: images (10, 1, H, W) of the digits 0 to 9."""
        self.samples.append({"epoch": len(self.curve), "images": as_bytes(images.cpu())})
        if self.ranks.leads:
            self.files.save_samples(self.samples)

    def _finite(self, loss: Tensor) -> float:
        """The value of a loss, or of a sum that holds one; TrainingError, in every process, if it is not a finite number."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss or a weight is {value} at step {self.step}; {self.cfg.checkpoint} is left as "
                                f"last saved. Try a learning rate below {self.cfg.lr:g}")
        return value


class RunFiles:
    """model.pth; next to it model.resume.pth, loss.csv, loss.png and samples.png. What another run made is kept.

    A checkpoint of another name, digits.pth, has digits.loss.csv and so on. OSError if they could not be written.
    """

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.all = self.weights, self.state, self.csv, self.png, self.samples = files_of_run(Path(cfg.checkpoint))
        check_files(self.all)
        self.pictures_failed, self.picture_time = False, -math.inf

    def holds_state_of(self, launch: str) -> bool:
        """Whether there is a state that this launch of torchrun saved."""
        try:
            return load_checkpoint(self.state, STATE).get("launch") == launch
        except CheckpointError:
            return False

    def load_state(self) -> dict:
        """The content of model.resume.pth. CheckpointError if there is none, or one of another recipe."""
        if not self.state.exists():
            raise CheckpointError(f"there is nothing to resume: no file {self.state}")
        content = load_checkpoint(self.state, STATE)
        defaults = asdict(TrainConfig()) | asdict(ModelConfig())  # for options that are newer than the file
        before = defaults | content["recipe"] | content["recipe"]["model"]
        now = asdict(self.cfg) | asdict(self.cfg.model)
        changed = [name for name in now | before if name not in MAY_CHANGE and before.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
            raise CheckpointError(f"{self.state} belongs to another recipe: {differences}; resume with the options that "
                                  "it was started with, or leave out --resume to start again")
        return content

    def save(self, state: dict, ema: DiT, step: int) -> None:
        """The state first: a crash between the two leaves an older model.pth, which is replaced on resume."""
        save_checkpoint(self.state, {**state, "recipe": asdict(self.cfg)})
        self.save_weights(ema, step)

    def save_weights(self, ema: DiT, step: int) -> None:
        weights = {name: value.cpu() for name, value in ema.state_dict().items()}  # loads where there is no GPU
        save_checkpoint(self.weights, {"model_config": asdict(ema.config), "ema": weights, "step": step,
                                       "recipe": asdict(self.cfg)})

    def save_curve(self, curve: list[dict], last: bool) -> None:
        """loss.csv and loss.png; the picture at most every ten seconds, since it takes as long as many steps on a GPU."""
        rows = [",".join(format(row[name], form) for name, form in CURVE.items()) for row in curve]
        write_atomically(self.csv, lambda path: path.write_text("\n".join([",".join(CURVE), *rows]) + "\n"))
        if last or time.monotonic() - self.picture_time > 10:
            weighted = f", min-SNR weights ({self.cfg.min_snr:g})" if self.cfg.min_snr else ""
            self._picture(self.png, lambda: loss_curve(curve, f"{self.cfg.loss.upper()} loss", weighted))
            self.picture_time = time.monotonic()

    def save_samples(self, samples: list[dict]) -> None:
        self._picture(self.samples, lambda: show([row["images"] / 127.5 - 1 for row in samples],
                                                 labels=[f"epoch {row['epoch']}" for row in samples]))

    def _picture(self, path: Path, make: Callable) -> None:
        """A picture that cannot be drawn costs one line, not the run."""
        try:
            save_picture(path, make)
        except Exception as error:
            if not self.pictures_failed:
                tqdm.write(f"{path} could not be drawn, and training continues: {error}")
            self.pictures_failed = True
