"""What a training run leaves on disk: its weights, the state to go on from, and the loss curve."""

import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from config import TrainConfig
from dit import DiT
from runtime.checkpoint import (
    CheckpointError,
    check_weights,
    check_writable,
    load_checkpoint,
    outline,
    save_checkpoint,
    write_atomically,
)

MAY_CHANGE = {"epochs", "checkpoint", "checkpoint_every", "data_dir", "device", "compile"}  # in the recipe, at --resume
STATE = {"recipe": dict, "weights": dict, "ema": dict, "optimizers": list, "step": int, "curve": list, "seconds": float,
         "loss_sum": torch.Tensor, "shuffle": torch.Tensor, "random": torch.Tensor}  # entries of model.resume.pth


class RunFiles:
    """model.pth, and beside it model.resume.pth, loss.csv and loss.png. What another run made is kept under other names.

    OSError with a sentence if they could not be written.
    """

    def __init__(self, cfg: TrainConfig):
        self.cfg = cfg
        self.weights = Path(cfg.checkpoint)
        check_writable(self.weights)
        self.state = self.weights.with_name(f"{self.weights.stem}.resume{self.weights.suffix}")
        self.csv, self.png = self.weights.with_name("loss.csv"), self.weights.with_name("loss.png")
        if self.weights in (self.csv, self.png):
            raise OSError(f"{self.weights} is where the loss curve goes: choose another --checkpoint")
        for path in (self.state, self.csv, self.png):
            check_writable(path)
        self.ours: set[Path] = set()  # files known to be this run's own
        self.drawn = -math.inf

    def load_state(self) -> dict:
        """The content of model.resume.pth. CheckpointError if it is unfit, or of a run with another recipe."""
        if not self.state.exists():
            raise CheckpointError(f"there is nothing to resume: no file {self.state}")
        content = load_checkpoint(self.state, STATE)
        now = _flat(asdict(self.cfg))
        before = _flat(asdict(TrainConfig())) | _flat(content["recipe"])  # options that came later were at their defaults
        changed = [name for name in now | before if name not in MAY_CHANGE and before.get(name) != now.get(name)]
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in changed)
            raise CheckpointError(f"{self.state} belongs to another recipe: {differences}; resume with the options that "
                                  "it was started with, or leave out --resume to start anew")
        network = outline(self.cfg.model)
        for name in ("weights", "ema"):
            check_weights(self.state, content[name], network)
        return content

    def save_run(self, state: dict, ema: DiT, step: int) -> None:
        """The state first: a crash between the two leaves an older model.pth, which is replaced at resume."""
        save_checkpoint(self.state, {**state, "recipe": asdict(self.cfg)})
        self.save_weights(ema, step)

    def save_weights(self, ema: DiT, step: int) -> None:
        recipe = asdict(self.cfg)
        self._keep_a_copy_of_another_run(self.weights)
        weights = {name: value.cpu() for name, value in ema.state_dict().items()}  # loads where there is no GPU
        save_checkpoint(self.weights, {"model_config": asdict(ema.config), "ema": weights, "step": step, "recipe": recipe})

    def save_curve(self, curve: list[dict], last: bool) -> None:
        """loss.csv and loss.png; the picture at most every ten seconds, for it takes as long as many steps on a GPU."""
        self._keep_a_copy_of_another_run(self.csv)
        write_atomically(self.csv, lambda path: path.write_text("\n".join(csv_lines(curve)) + "\n"))
        if last or time.monotonic() - self.drawn > 10:
            self._keep_a_copy_of_another_run(self.png)
            write_atomically(self.png, lambda path: draw_curve(path, curve, self.cfg))
            self.drawn = time.monotonic()

    def start_anew(self) -> None:
        """Set aside the state of another run, so that a state that is found from now on is this run's."""
        if self.state.exists():
            kept = self.state.rename(_kept_name(self.state))
            tqdm.write(f"{self.state} is of a run that can go on with --resume; this is a new one, so it is kept as {kept} "
                       "(stop, rename it back and add --resume to go on with it)")

    def start_again(self, curve: list[dict]) -> None:
        """The weights are this run's; so is the curve, unless loss.csv begins with other rows than the state knows."""
        self.ours = {self.weights}
        known = csv_lines(curve)
        if not curve or not self.csv.is_file() or self.csv.read_text().splitlines()[:len(known)] == known:
            self.ours |= {self.csv, self.png}

    def _keep_a_copy_of_another_run(self, path: Path) -> None:
        """Before `path` is first written. A copy, so that there is a file of that name at every moment."""
        if path not in self.ours and path.exists():
            tqdm.write(f"{path} is another run's: kept as {shutil.copy2(path, _kept_name(path))}")
        self.ours.add(path)


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


def csv_lines(curve: list[dict]) -> list[str]:
    """A line an epoch, under the names of its values."""
    digits = {"epoch": "d", "step": "d", "train_loss": ".6f", "test_loss": ".6f", "seconds": ".1f"}
    return [",".join(digits), *(",".join(format(row[name], digits[name]) for name in digits) for row in curve)]


def draw_curve(path: Path, curve: list[dict], cfg: TrainConfig) -> None:
    """Both losses against the epoch."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    weighted = f", weighted by min-SNR {cfg.min_snr:g}" if cfg.min_snr else ""
    guided = f", noise as guided by {cfg.learn_guidance:g}" if cfg.learn_guidance != 1 else ""
    for name, label in (("train_loss", f"training images{guided}{weighted}"),
                        ("test_loss", "test images, averaged network, the same t and noise at every epoch")):
        axes.plot([row["epoch"] for row in curve], [row[name] for row in curve], ".-", label=label)
    axes.set(xlabel="epoch", ylabel=f"{cfg.loss} loss of the noise", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
