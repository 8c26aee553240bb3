"""Everything that only a GPU can tell, in calls of at most nine minutes; needs nothing installed.

    python -m benchmarks.gpu $OUT tests times                 parity, then what the time goes to
    python -m benchmarks.gpu $OUT runs                        whole commands, 500 epochs first
    python -m benchmarks.gpu $OUT study                       what the study lacks

For machines that are lent for minutes: each part writes PART.json, after every item, and
PART.tar.gz into the folder. What no longer fits into --minutes is left out, and said.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.measure import about, seconds
from benchmarks.training import training_step
from config import GUIDANCE, MNIST_IMAGES, ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from evaluate import AT_ONCE, BATCH_SIZE
from inference import generate
from runtime.checkpoint import load_model
from runtime.files import PROJECT

VARIANTS = {"compiled": (False, True), "plain": (False, False), "recorded": (True, False),
            "recorded-compiled": (True, True)}  # of training: DIT_RECORD, and --compile
GPU = torch.device("cuda:0")
QUICK = "recorded_steps or samples_are or test_loss"  # the tests of parity


class Part:
    """The items of a part, each a process with a limit in seconds; their results as JSON."""

    def __init__(self, folder: Path, name: str, deadline: float):
        self.file, self.archive = folder / f"{name}.json", folder / f"{name}.tar.gz"
        self.work = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.deadline, self.results = deadline, {}

    def item(self, name: str, command: list, limit: float, record: bool = False,
             read: Callable[[], dict] | None = None) -> None:
        """Run python with these arguments. read: results from its files, not from its last line."""
        left = self.deadline - time.monotonic()
        if left < min(limit, 20):
            print(f"{name}: left out, {left:.0f} s remain", flush=True)
            self.results[name] = {"left out": True}
            return
        print(f"{name}: python {' '.join(map(str, command))[:300]}", flush=True)
        environment = os.environ | {"DIT_RECORD": str(int(record)), "PYTHONPATH": str(PROJECT),
                                    "PYTHONUNBUFFERED": "1"}
        log, start = self.work / "log", time.monotonic()
        with log.open("w") as file:  # a pipe could stay open in a process that it has started
            try:
                status = subprocess.run(
                    [sys.executable, *map(str, command)], cwd=PROJECT, env=environment,
                    stdout=file, stderr=subprocess.STDOUT, timeout=min(limit, left)).returncode
            except subprocess.TimeoutExpired:
                status = "stopped at its limit"
        result = {"seconds": time.monotonic() - start, "status": status}
        lines = log.read_text(errors="replace").strip().splitlines()
        try:
            result |= read() if read else json.loads(lines[-1])
        except Exception as error:  # the item failed or was stopped; its output says how
            result["not read"] = repr(error)
        else:
            lines = lines if read else lines[:-1]
        shown = {k: v for k, v in result.items() if k != "kernels"}
        print(f"    {json.dumps(shown)[:600]}", flush=True)
        result["output"] = "\n".join(lines)[-6000:]
        if status:
            print(result["output"][-1500:], flush=True)
        self.results[name] = result
        self.save()

    def save(self) -> None:
        """The results so far, and the small files next to them."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.results |= {"about": about(device), "seconds left": self.deadline - time.monotonic()}
        self.file.write_text(json.dumps(self.results, indent=1))
        with tarfile.open(self.archive, "w:gz", compresslevel=1) as archive:
            for path in sorted(self.work.rglob("*")):
                if path.suffix in (".csv", ".png", ".json") or path.name in ("l1.pth", "mse.pth"):
                    archive.add(path, path.relative_to(self.work))


# Measured in a process of their own; the last line that they print is JSON.

def step_time(batch_size: int, compile: bool, tf32: bool = False) -> dict:
    """ms per training step alone, and the time of the GPU's kernels in ten of them."""
    if tf32:
        torch.set_float32_matmul_precision("high")
    cfg = TrainConfig(batch_size=batch_size, limit=MNIST_IMAGES, device=str(GPU))
    step = training_step(cfg, compile)
    seconds(GPU, step, 20)  # the first ones compile or record
    found = {"ms": 1000 * seconds(GPU, step, 300), "memory": torch.cuda.max_memory_allocated(GPU)}
    with profile(activities=[ProfilerActivity.CUDA]) as kernels:
        seconds(GPU, step, 10)
    return found | {"kernels": kernels.key_averages().table(
        sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)}


def sampling_time(n: int, steps: int) -> dict:
    """Seconds per call of `generate`; the second call, as in evaluation."""
    model, _ = load_model(PROJECT / "model.pth", GPU)
    diffusion, seeds = GaussianDiffusion(device=GPU), list(range(max(1, n // BATCH_SIZE)))
    y = torch.arange(n) % 10

    def call() -> None:
        generate(model, y, steps=steps, seed=seeds, diffusion=diffusion)

    first = seconds(GPU, call, 1)
    return {"first": first, "seconds per call": seconds(GPU, call, 2), "steps": steps}


def held_out_time() -> dict:
    """ms per call of `held_out_loss`."""
    model, diffusion = DiT(ModelConfig()).to(GPU).eval(), GaussianDiffusion(device=GPU)
    batches = train.held_out(diffusion, load_mnist(False, PROJECT / "mnist", GPU))

    def call() -> None:
        train.held_out_loss(model, diffusion, batches, "l1")

    call()
    return {"ms": 1000 * seconds(GPU, call, 5), "batches": len(batches)}


def calling(function: Callable[..., dict], *arguments, **settings) -> list[str]:
    """The arguments of python that print function(...) as JSON."""
    return ["-c", "import json\nfrom benchmarks import gpu\n"
            f"print(json.dumps(gpu.{function.__name__}(*{arguments!r}, **{settings!r})))"]


# The parts

def tested(part: Part, name: str, choice: str, limit: float) -> None:
    """The tests marked gpu that pytest's -k chooses."""
    part.item(name, ["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-k", choice,
                     "-p", "no:cacheprovider", "--tb=short"], limit, read=dict)


def tests(part: Part) -> None:
    """All tests marked gpu: the quick ones of parity first."""
    tested(part, "parity", QUICK, 200)
    tested(part, "the others", f"not ({QUICK})", 240)


def times(part: Part) -> None:
    """Steps and calls one by one, plain and recorded; what compiles comes last."""
    def step(batch_size: int, name: str, **settings) -> None:
        record, compile = VARIANTS[name]
        part.item(f"step of {batch_size}, {name}{', TF32' * ('tf32' in settings)}",
                  calling(step_time, batch_size, compile, **settings), 90, record)

    for batch_size in (300, 64):
        for name in ("plain", "recorded"):
            step(batch_size, name)
    step(300, "recorded", tf32=True)
    for on in (False, True):
        name = "recorded" if on else "plain"
        part.item(f"test loss, {name}", calling(held_out_time), 60, on)
        part.item(f"1000 steps of ten digits, {name}", calling(sampling_time, 10, 1000), 60, on)
        for n in (BATCH_SIZE, BATCH_SIZE * AT_ONCE):
            part.item(f"50 steps of {n} digits, {name}", calling(sampling_time, n, 50), 60, on)
        part.item(f"inference.py, {name}", ["inference.py", "--output", part.work / "ten.png"],
                  60, on, dict)
    part.item("imports of inference.py", ["-c", "import inference"], 60, read=dict)
    part.item("a run of 3 steps", ["train.py", "--epochs", 1, "--limit", 900, "--no-compile",
                                   "--checkpoint", part.work / "three.pth"], 60, True, dict)
    for name in ("compiled", "recorded-compiled"):  # each compiles for half a minute
        step(300, name)


def epochs(part: Part, name: str) -> dict:
    """From loss.csv of a run: its last row, and the mean seconds of an epoch after the first."""
    with (part.work / f"{name}.loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, last = (float(row["seconds"]) for row in (rows[0], rows[-1]))
    return {"last": rows[-1], "seconds per epoch": (last - first) / max(1, len(rows) - 1)}


def runs(part: Part) -> None:
    """Whole commands: the default run and its evaluation, then shorter runs of both losses."""
    def scored(name: str, sampler: str, *strengths: float) -> None:
        checkpoint = part.work / f"{name}.pth"
        if checkpoint.exists():
            file = part.work / f"{name}-{sampler}.json"
            part.item(f"{name}, {sampler}, guidance {strengths}", [
                "evaluate.py", "--checkpoint", checkpoint, "--sampler", sampler, "--guidance",
                *strengths, "--json", file], 300, True,
                lambda: {"scores": json.loads(file.read_text())})

    def trained(name: str, *options) -> None:
        part.item(name, ["train.py", "--checkpoint", part.work / f"{name}.pth", *options],
                  400, True, lambda: epochs(part, name))
        scored(name, "ddim", 1, 1.25, 1.5, 2)

    trained("l1")
    scored("l1", "ddpm", GUIDANCE)
    trained("mse", "--loss", "mse")
    for seed, count, loss, predicts in product((0, 1, 2), (100, 30, 10, 3), ("mse", "l1"),
                                               ("eps", "x_0")):
        trained(f"{loss}-{predicts}-{count}-{seed}", "--loss", loss, "--predicts", predicts,
                "--epochs", count, "--seed", seed)


def study(part: Part) -> None:
    """What the study lacks, as far as the time lets it; its table and strips come back."""
    results = PROJECT / "experiments" / "results"
    part.item("study", ["-m", "experiments.runs"], 540, True, dict)
    shutil.copytree(results, part.work / "results")
    part.save()


PARTS = {part.__name__: part for part in (tests, times, runs, study)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.gpu", allow_abbrev=False,
                                     description="Tests and measurements on a GPU.")
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: 8.5)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for name in args.parts:
        PARTS[name](Part(args.folder, name, deadline))


if __name__ == "__main__":
    main()
