"""Train and measure the networks of the study. What results/runs.csv holds is not repeated.

    python -m experiments.runs                all of them
    python -m experiments.runs 'B4-*'         these only
    python -m experiments.runs --list         what is missing

Networks this small gain little from a second thread. Set OMP_NUM_THREADS=1
OMP_WAIT_POLICY=PASSIVE, and start one process per core: they share the work. Stop and start them
at will: a run continues where it was.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import train
from config import TrainConfig
from dataset import load_mnist
from dit import DiT
from evaluate import (
    Classifier,
    accuracy,
    balanced,
    distribution_metrics,
    load_classifier,
    sample_images,
)
from experiments import rows, study
from experiments.rows import REAL
from experiments.starts import started
from experiments.study import DDIM_STEPS, TABLE, Network, Setting
from inference import generate
from runtime.checkpoint import CheckpointError, checksum
from runtime.files import locked, write_atomically
from runtime.pictures import as_bytes
from runtime.run import RunFiles
from runtime.script import TrainingError, exit_status, pick_device
from runtime.speed import keep_freed_memory

RUNS = Path(__file__).with_name("runs")  # the state of the runs; not in git


class Worker:
    """Completes a study, side by side with other workers.

    recipe: for every network; its limit, data_dir and device apply too; folder: for the state of
    the runs; table: the CSV, with samples/ next to it; classifier: the included one by default.
    """

    def __init__(self, recipe: TrainConfig, folder: Path, table: Path,
                 classifier: Classifier | None = None):
        self.device = pick_device(recipe.device)
        # See `Network.config`.
        self.recipe = replace(recipe, compile=recipe.compile and self.device.type == "cpu")
        self.folder, self.table, self.samples = folder, table, table.with_name("samples")
        for path in (folder, self.samples):
            path.mkdir(parents=True, exist_ok=True)
        self.train_set, self.test_set = (
            load_mnist(training, recipe.data_dir, self.device, recipe.limit)
            for training in (True, False))
        self.classifier = classifier or load_classifier(self.device)

    def work(self, entries: study.Entries) -> None:
        """All that is missing and no other worker has taken. TrainingError if some of it failed."""
        for n in sorted({setting.n for _, settings in entries for setting in settings}):
            with locked(self.folder / f"real-{n}.lock", wait=True):
                if not any((row["run"], row["n"]) == (REAL, n) for row in rows.read(self.table)):
                    # As in evaluate.py: training images, except where the classifier would find
                    # what it was trained on.
                    real = balanced(self.train_set, torch.arange(n) % 10)
                    scores = self.metrics(real, *self.test_set[:])
                    self.append({"run": REAL, "n": n} | scores)
        failed = []
        for network, settings in entries:
            with locked(self.folder / f"{network.name}.lock") as ours:
                if not ours:
                    print(f"{network.name}: left to the process that has it")
                    continue
                try:
                    self.complete(network, settings)
                except (CheckpointError, TrainingError) as error:
                    print(f"{network.name}: {error}", file=sys.stderr)
                    failed.append(network.name)
        if failed:
            raise TrainingError(f"not complete: {', '.join(failed)}")

    def complete(self, network: Network, settings: Sequence[Setting]) -> None:
        """Train the network as far as each missing setting needs, and measure it there."""
        cfg, ema = network.config(self.recipe, self.folder), None
        Path(cfg.checkpoint).parent.mkdir(exist_ok=True)
        for setting in study.missing(network, settings, rows.read(self.table), self.recipe):
            if ema is None or setting.epoch > cfg.epochs:
                cfg = replace(cfg, epochs=setting.epoch)  # the rate is constant: a run may grow
                torch.compiler.reset()  # it would give up on a network that it compiles too often
                with started(network.recipe):
                    ema = train.train(cfg, resume=RunFiles(cfg).state.exists())
                if setting.epoch == max(setting.epoch for setting in settings):
                    self.save_strip(network, ema)
            with Path(cfg.checkpoint).with_name("loss.csv").open() as file:
                last = list(csv.DictReader(file))[-1]
            print(f"{network.name}: {setting}", flush=True)
            images, labels = sample_images(ema, setting.n, seed=0, sampler="ddim",
                                           steps=setting.sampling_steps, guidance=setting.guidance)
            self.append({"run": network.name, "digest": network.digest(self.recipe),
                         "step": last["step"], "test_loss": last["test_loss"],
                         "train_seconds": last["seconds"]} | vars(network) | vars(setting)
                        | study.cost(cfg.model) | self.metrics(images, images, labels))

    def metrics(self, images: Tensor, classified: Tensor, labels: Tensor) -> dict[str, float]:
        """How `images` compare with the test images, and whether `classified` are `labels`."""
        return {"accuracy": accuracy(self.classifier, classified, labels),
                **distribution_metrics(self.classifier, self.test_set[:][0], images)}

    def append(self, row: dict) -> None:
        """Write a row, with what measured it and when."""
        gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if gpu else self.device.type.upper()
        row |= {"device": device, "torch": torch.__version__.split("+")[0], "date": date.today(),
                "classifier": checksum(self.classifier.state_dict())[:8]}
        with locked(self.folder / "table.lock", wait=True):
            rows.append(self.table, row)

    def save_strip(self, network: Network, ema: DiT) -> None:
        """Ten digits side by side, from the same noise for every network, for Figure 7."""
        images = generate(ema, torch.arange(10), sampler="ddim", steps=DDIM_STEPS, guidance=1.0)
        digits = as_bytes(images.cpu())[:, 0]
        strip = Image.fromarray(digits.transpose(0, 1).flatten(1).contiguous().numpy())  # (H, 10 W)
        write_atomically(self.samples / f"{network.name}.png",
                         lambda path: strip.save(path, format="PNG"))


def list_missing(entries: study.Entries) -> None:
    table = rows.read(TABLE)
    for network, settings in entries:
        count = len(study.missing(network, settings, table, study.RECIPE))
        print(f"{network.name:24} {count} of {len(settings)} rows missing")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("experiments.runs", allow_abbrev=False,
                                     description="Train and measure the networks of the study.")
    parser.add_argument("names", nargs="*", default=["*"],
                        help="runs, or patterns such as 'B4-*' (default: all)")
    parser.add_argument("--list", action="store_true",
                        help="print the runs and how many of their rows are missing")
    args = parser.parse_args(argv)
    entries = [(network, settings) for network, settings in study.everything()
               if any(fnmatch(network.name, name) for name in args.names)]
    if not entries:
        parser.error(f"no run is named {' or '.join(args.names)}: see --list")
    if args.list:
        return exit_status(parser, lambda: list_missing(entries))
    keep_freed_memory()
    return exit_status(parser, lambda: Worker(study.RECIPE, RUNS, TABLE).work(entries))


if __name__ == "__main__":
    sys.exit(main())
