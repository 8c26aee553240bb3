"""All of a training run that Algorithm 1 does not speak of: its progress, its files, how it stops and goes on."""

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig
from dataset import Digits
from dit import DiT
from runtime.checkpoint import CheckpointError, check_weights, load_checkpoint, save_checkpoint, write_atomically
from runtime.distributed import Ranks
from runtime.pictures import as_bytes, loss_curve, save_picture, show
from runtime.script import Stopped, TrainingError, check_files

try:
    import fcntl
except ModuleNotFoundError:  # Windows; two runs with one checkpoint are not noticed there
    fcntl = None

MAY_CHANGE = {"epochs", "checkpoint", "checkpoint_every", "data_dir", "device", "compile"}  # in the recipe, on --resume
STATE = {"recipe": dict, "weights": dict, "ema": dict, "optimizers": list, "step": int, "curve": list, "samples": list,
         "seconds": float, "loss_sum": Tensor, "order": Tensor, "noise": Tensor, "threads": int}
STOP_SIGNALS = [number for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "XCPU", "PWR", "BREAK")
                if (number := getattr(signal, f"SIG{name}", None))]  # what terminals, people and schedulers stop a run with
CURVE = {"epoch": "d", "step": "d", "train_loss": ".6f", "test_loss": ".6f", "seconds": ".1f"}  # columns of loss.csv


class Run:
    """A run of `cfg`. Within `with run:` no other run writes its files, and a first stop signal saves it and ends it.

    images: how many there are to train on; noise: the generator of t, eps and dropped labels. OSError with a sentence if
    the files could not be written.
    """

    def __init__(self, cfg: TrainConfig, ranks: Ranks, model: DiT, ema: DiT, optimizers: list[torch.optim.Optimizer],
                 noise: torch.Generator, images: int):
        self.cfg, self.ranks, self.files = cfg, ranks, RunFiles(cfg)
        self.model, self.ema, self.optimizers, self.noise = model, ema, optimizers, noise
        self.steps_per_epoch = images // cfg.batch_size
        self.total_steps = cfg.epochs * self.steps_per_epoch
        self.step = 0  # optimizer steps done
        self.done = 0  # of these, in the current epoch
        self.loss_sum = torch.zeros((), device=noise.device)  # over the current epoch; reading it waits for the GPU
        self.curve: list[dict] = []  # the rows of loss.csv, one per epoch
        self.samples: list[dict] = []  # the rows of samples.png
        self.order = torch.Generator().manual_seed(cfg.seed)  # of the images
        self.order_at_epoch = self.order.get_state()  # as it was before it drew the current epoch's
        self.earlier_seconds, self.started = 0.0, time.monotonic()
        self.signals: list[int] = []  # that came

    def __enter__(self) -> "Run":
        if self.ranks.leads:
            self.files.lock()
        self.handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS
                         if signal.getsignal(number) is not signal.SIG_IGN}  # nohup ignores SIGHUP
        self.bar = tqdm(total=self.total_steps * self.cfg.batch_size, unit="img", unit_scale=True, mininterval=0.5,
                        smoothing=0.05, disable=not self.ranks.leads)
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        self._restore_handlers()
        self.files.unlock()

    def _note(self, number: int, frame) -> None:
        """The first signal is only noted, so that the current step is finished; a second one acts at once."""
        self.signals.append(number)
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def begin(self, resume: bool) -> None:
        """Start anew, or go on from the state of a run of the same recipe. CheckpointError or TrainingError if it cannot."""
        # A state that torchrun finds when it restarts dead processes is this run's: its start has set any other aside.
        if not self.ranks.any(resume or (self.ranks.restarted and self.files.state.exists())):
            if self.ranks.leads:
                self.files.set_aside_the_state_of_another_run()
            return
        state = self.files.load_state()
        if state["step"] > self.total_steps:
            raise TrainingError(f"{self.files.state} is at step {state['step']}, and {self.cfg.epochs} epochs end at step "
                                f"{self.total_steps}")
        self._restore(state)
        self.files.know(self.curve)
        self.bar.update(self.step * self.cfg.batch_size)
        if self.ranks.leads:
            self.files.save_weights(self.ema, self.step)  # a crash may have come between the state and these
            tqdm.write(f"resumed at step {self.step} of {self.total_steps}")
            if state["threads"] != torch.get_num_threads():
                tqdm.write(f"with {torch.get_num_threads()} threads and not {state['threads']} as before: sums are taken in "
                           "another order, and the last bits of the weights may differ")

    def state(self) -> dict:
        """What model.resume.pth keeps; `_restore` takes it back."""
        return {"weights": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step, "curve": self.curve, "samples": self.samples, "loss_sum": self.loss_sum,
                "order": self.order_at_epoch, "noise": self.noise.get_state(), "threads": torch.get_num_threads(),
                "seconds": self.earlier_seconds + time.monotonic() - self.started}

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.curve, self.samples = state["step"], state["curve"], state["samples"]
        self.earlier_seconds = state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.order.set_state(state["order"])
        self.noise.set_state(state["noise"])

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are not complete."""
        for epoch in range(len(self.curve) + 1, self.cfg.epochs + 1):
            self.bar.set_description(f"epoch {epoch}/{self.cfg.epochs}", refresh=False)
            yield epoch

    def batches(self, data: Digits) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x_0, y) of the current epoch that are still to come, in the order drawn for it."""
        self.order_at_epoch = self.order.get_state()
        self.done = self.step - len(self.curve) * self.steps_per_epoch
        for index in islice(data.batches(self.cfg.batch_size, self.order), self.done, None):
            yield data[index]

    def end_step(self, loss: Tensor) -> None:
        """Count the step, show its loss, save when it is time; Stopped if a signal came, TrainingError if it diverged."""
        self.step, self.done = self.step + 1, self.done + 1
        self.loss_sum += self.ranks.mean(loss.detach())
        if self.bar.update(self.cfg.batch_size):  # true when it is refreshed, twice a second at most
            self.bar.set_postfix(loss=f"{self._finite(self.loss_sum) / self.done:.4f}", refresh=False)
        stop = self.ranks.any(bool(self.signals))
        if self.step % self.cfg.checkpoint_every == 0 or self.step == self.total_steps or stop:
            self._finite(self.loss_sum + sum(p.detach().sum() for p in self.model.parameters()))
            if self.ranks.leads:
                self.files.save(self.state(), self.ema, self.step)
        if stop:
            raise Stopped(f"stopped at step {self.step} of {self.total_steps}; the same command with --resume goes on from "
                          "there", self.signals[0] if self.signals else signal.SIGTERM)

    def end_epoch(self, test_loss: float) -> None:
        """A row of loss.csv, and the pictures."""
        self.curve.append({"epoch": len(self.curve) + 1, "step": self.step, "test_loss": test_loss,
                           "train_loss": self._finite(self.loss_sum) / self.done, "seconds": self.state()["seconds"]})
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
        """The value of a loss, or of a sum that holds one; TrainingError if it is not a finite number."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss or a weight is {value} at step {self.step}, with a learning rate up to {self.cfg.lr:g}; "
                                f"{self.cfg.checkpoint} is as it was saved before. Try a lower --lr")
        return value


class RunFiles:
    """model.pth; next to it model.resume.pth, loss.csv, loss.png and samples.png. What another run made is kept.

    A checkpoint of another name, digits.pth, has digits.loss.csv and so on. OSError if they could not be written.
    """

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.weights = Path(cfg.checkpoint)
        stem, suffix = self.weights.stem, self.weights.suffix
        prefix = "" if stem == "model" else f"{stem}."
        self.state = self.weights.with_name(f"{stem}.resume{suffix}")
        self.csv, self.png, self.samples = (self.weights.with_name(prefix + name)
                                            for name in ("loss.csv", "loss.png", "samples.png"))
        check_files([self.weights, self.state, self.csv, self.png, self.samples])
        self.locked = None
        self.ours: set[Path] = set()  # files known to be this run's own
        self.pictures_failed = False
        self.picture_time = -math.inf

    def lock(self) -> None:
        """TrainingError if another process trains with this checkpoint. The system drops the lock when a process dies."""
        if fcntl is None:
            return
        path = os.path.realpath(self.weights)
        # The file stays: if it were removed, two processes could each lock another file of this name.
        file = open(Path(path).with_name(f".{Path(path).name}.lock"), "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TrainingError(f"{self.weights} is being trained by process {file.read() or '?'}: choose another "
                                "--checkpoint, or wait until it has ended") from None
        except OSError:  # a file system without locks
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self.locked = file

    def unlock(self) -> None:
        if self.locked:
            self.locked.close()

    def load_state(self) -> dict:
        """The content of model.resume.pth. CheckpointError if it is unfit, or of a run with another recipe."""
        if not self.state.exists():
            raise CheckpointError(f"there is nothing to resume: no file {self.state}")
        content = load_checkpoint(self.state, STATE)
        now = _flat(asdict(self.cfg))
        before = _flat(asdict(TrainConfig())) | _flat(content["recipe"])  # options that came later were at their defaults
        changed = [name for name in now | before if name not in MAY_CHANGE and before.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
            raise CheckpointError(f"{self.state} belongs to another recipe: {differences}; resume with the options that "
                                  "it was started with, or leave out --resume to start again")
        network = DiT(self.cfg.model, initialize=False)
        for name in ("weights", "ema"):
            check_weights(self.state, content[name], network)
        return content

    def save(self, state: dict, ema: DiT, step: int) -> None:
        """The state first: a crash between the two leaves an older model.pth, which is replaced on resume."""
        save_checkpoint(self.state, {**state, "recipe": asdict(self.cfg)})
        self.save_weights(ema, step)

    def save_weights(self, ema: DiT, step: int) -> None:
        self._keep_a_copy_of_another_run(self.weights)
        weights = {name: value.cpu() for name, value in ema.state_dict().items()}  # loads where there is no GPU
        save_checkpoint(self.weights, {"model_config": asdict(ema.config), "ema": weights, "step": step,
                                       "recipe": asdict(self.cfg)})

    def save_curve(self, curve: list[dict], last: bool) -> None:
        """loss.csv and loss.png; the picture at most every ten seconds, since it takes as long as many steps on a GPU."""
        self._keep_a_copy_of_another_run(self.csv)
        write_atomically(self.csv, lambda path: path.write_text("\n".join(csv_lines(curve)) + "\n"))
        if last or time.monotonic() - self.picture_time > 10:
            weighted = f", training: min-SNR {self.cfg.min_snr:g}" if self.cfg.min_snr else ""
            self._picture(self.png, lambda: loss_curve(curve, f"{self.cfg.loss.upper()} loss{weighted}"))
            self.picture_time = time.monotonic()

    def save_samples(self, samples: list[dict]) -> None:
        self._picture(self.samples, lambda: show([row["images"] / 127.5 - 1 for row in samples],
                                                 labels=[f"epoch {row['epoch']}" for row in samples]))

    def _picture(self, path: Path, make: Callable[[], Figure]) -> None:
        """A picture that cannot be drawn costs one line, not the run."""
        try:
            self._keep_a_copy_of_another_run(path)
            save_picture(path, make)
        except Exception as error:
            if not self.pictures_failed:
                tqdm.write(f"{path} could not be drawn, and training goes on: {error}")
            self.pictures_failed = True

    def set_aside_the_state_of_another_run(self) -> None:
        if self.state.exists():
            kept = self.state.rename(_kept_name(self.state))
            tqdm.write(f"{self.state} is of a run that can go on with --resume; this is a new one, so it is kept as {kept} "
                       "(stop, rename it back and add --resume to go on with it)")

    def know(self, curve: list[dict]) -> None:
        """The files are this run's; so is the curve, unless loss.csv begins with other rows than the state knows."""
        self.ours = {self.weights, self.samples}
        known = csv_lines(curve)
        if not curve or not self.csv.is_file() or self.csv.read_text().splitlines()[:len(known)] == known:
            self.ours |= {self.csv, self.png}

    def _keep_a_copy_of_another_run(self, path: Path) -> None:
        """Before `path` is first written. A copy, so that there is a file of that name at every moment."""
        if path not in self.ours and path.exists():
            tqdm.write(f"{path} is another run's: kept as {shutil.copy2(path, _kept_name(path))}")
        self.ours.add(path)


def csv_lines(curve: list[dict]) -> list[str]:
    """A line per epoch, under the names of its values."""
    return [",".join(CURVE), *(",".join(format(row[name], form) for name, form in CURVE.items()) for row in curve)]


def _kept_name(path: Path) -> Path:
    """The first free name of model.old-1.pth, model.old-2.pth, ..."""
    number = 1
    while (name := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return name


def _flat(recipe: dict) -> dict:
    """The fields of the recipe and of its network side by side."""
    network = recipe["model"] if isinstance(recipe.get("model"), dict) else {}
    return {name: value for name, value in recipe.items() if name != "model"} | network
