"""Everything that only a GPU can tell, in calls of at most nine minutes; needs nothing installed.

    python -m benchmarks.gpu $OUT tests times                 parity, then what the time goes to
    python -m benchmarks.gpu $OUT runs                        whole commands, 500 epochs, evaluation
    python -m benchmarks.gpu $OUT study                       the study, with a table of its own

Each part writes PART.json, after every item, and PART.tar.gz into the folder. What no longer fits
into --minutes is left out, and said.
"""

import argparse
import cProfile
import csv
import io
import json
import os
import pstats
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
QUICK = "recorded_steps or samples_are or test_loss"  # the tests of parity


class Part:
    """The items of a part, each a process with a limit in seconds; their results as JSON."""

    def __init__(self, folder: Path, name: str, deadline: float):
        self.file, self.archive = folder / f"{name}.json", folder / f"{name}.tar.gz"
        self.work = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.deadline, self.results = deadline, {}

    def item(self, name: str, command: list, limit: float, record: bool = False,
             read: Callable[[], dict] | None = None) -> dict:
        """Run python with these arguments. read: results from its files, not from its last line."""
        left = self.deadline - time.monotonic()
        if left < min(limit, 20):
            print(f"{name}: left out, {left:.0f} s remain", flush=True)
            return self.results.setdefault(name, {"left out": True})
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
        shown = {k: v for k, v in result.items() if k not in ("profile", "kernels")}
        print(f"    {json.dumps(shown)[:600]}", flush=True)
        result["output"] = "\n".join(lines)[-6000:]
        if status:
            print(result["output"][-1500:], flush=True)
        self.results[name] = result
        self.save()
        return result

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

def step_time(batch_size: int, compile: bool, tf32: bool = False, device: str = "cuda:0",
              repeats: int = 300) -> dict:
    """ms per training step alone, and the time of the GPU's kernels in ten of them."""
    if tf32:
        torch.set_float32_matmul_precision("high")
    cfg = TrainConfig(batch_size=batch_size, limit=MNIST_IMAGES, device=device)
    step, device = training_step(cfg, compile), torch.device(device)
    seconds(device, step, min(20, repeats))  # the first ones compile or record
    found = {"ms": 1000 * seconds(device, step, repeats)}
    if device.type == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated(device)
        with profile(activities=[ProfilerActivity.CUDA]) as kernels:
            seconds(device, step, 10)
        found["kernels"] = kernels.key_averages().table(
            sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
    return found


def sampling_time(n: int, steps: int, device: str = "cuda:0") -> dict:
    """Seconds per call of `generate`; the second call, as in evaluation."""
    model, device = load_model(PROJECT / "model.pth", device)[0], torch.device(device)
    diffusion, seeds = GaussianDiffusion(device=device), list(range(max(1, n // BATCH_SIZE)))
    y = torch.arange(n) % 10

    def call() -> None:
        generate(model, y, steps=steps, seed=seeds, diffusion=diffusion)

    first = seconds(device, call, 1)
    return {"first": first, "seconds per call": seconds(device, call, 2), "steps": steps}


def held_out_time(device: str = "cuda:0", limit: int = 0) -> dict:
    """ms per call of `held_out_loss`."""
    device = torch.device(device)
    model, diffusion = DiT(ModelConfig()).to(device).eval(), GaussianDiffusion(device=device)
    batches = train.held_out(diffusion, load_mnist(False, PROJECT / "mnist", device, limit))

    def call() -> None:
        train.held_out_loss(model, diffusion, batches, "l1")

    call()
    return {"ms": 1000 * seconds(device, call, 5), "batches": len(batches)}


def profiled(*options: str) -> dict:
    """What a run spends its time on in Python, by cProfile."""
    profiler, text = cProfile.Profile(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        profiler.runcall(train.main, ["--checkpoint", f"{folder}/model.pth", *options])
    pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats(60)
    return {"profile": text.getvalue()}


def calling(function: Callable[..., dict], *arguments, **settings) -> list[str]:
    """The arguments of python that print function(...) as JSON."""
    return ["-c", "import json\nfrom benchmarks import gpu\n"
            f"print(json.dumps(gpu.{function.__name__}(*{arguments!r}, **{settings!r})))"]


# The parts

def tested(part: Part, name: str, choice: str, limit: float) -> dict:
    """The tests marked gpu that pytest's -k chooses."""
    return part.item(name, ["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-k", choice,
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
    part.item("profile of 12 epochs", calling(profiled, "--epochs", "12", "--no-compile"), 90, True)
    for name in ("compiled", "recorded-compiled"):  # each compiles for half a minute
        step(300, name)


def epochs(part: Part, name: str) -> dict:
    """From loss.csv of a run: its last row, and the mean seconds of an epoch after the first."""
    with (part.work / f"{name}.loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, last = (float(row["seconds"]) for row in (rows[0], rows[-1]))
    return {"last": rows[-1], "seconds per epoch": (last - first) / max(1, len(rows) - 1)}


def runs(part: Part) -> None:
    """Whole commands, with the variant of training that a few epochs predict to be the fastest."""
    def trained(name: str, record: bool, *options, limit: float = 400) -> dict:
        return part.item(name, ["train.py", "--checkpoint", part.work / f"{name}.pth", *options],
                         limit, record, lambda: epochs(part, name))

    def scored(name: str, sampler: str, *strengths: float) -> None:
        checkpoint = part.work / f"{name}.pth"
        if checkpoint.exists():
            file = part.work / f"{name}-{sampler}-{'-'.join(map(str, strengths))}.json"
            part.item(f"{name}, {sampler}, guidance {strengths}", [
                "evaluate.py", "--checkpoint", checkpoint, "--sampler", sampler, "--guidance",
                *strengths, "--json", file], 300, record,
                lambda: {"scores": json.loads(file.read_text())})

    parity = tested(part, "parity", f"({QUICK}) and not compile", 150)
    predicted = {}
    for name, (record, compile) in VARIANTS.items():
        if name == "plain" or (record and parity.get("status") != 0):
            continue
        options, count = [] if compile else ["--no-compile"], 15 if record else 5
        result = trained(name, record, "--epochs", count, *options, limit=100)
        if result.get("status") == 0:
            total = result["seconds"] + (500 - count) * result["seconds per epoch"]
            predicted[total] = (record, options)
    if not predicted:
        return
    part.results["predicted seconds of 500 epochs"] = {str(v): k for k, v in predicted.items()}
    part.save()
    record, options = predicted[min(predicted)]
    print(f"continuing with DIT_RECORD={record:d} {' '.join(options)}", flush=True)
    trained("l1", record, *options)
    scored("l1", "ddpm", GUIDANCE)
    scored("l1", "ddim", 1, 1.25, 1.5, 2)
    trained("mse", record, *options, "--loss", "mse")
    scored("mse", "ddim", 1, 1.25, 1.5, 2)
    for seed in (0, 1, 2):
        for count in (3, 10, 30, 100):
            for loss, predicts in product(("l1", "mse"), ("eps", "x_0")):
                name = f"{loss}-{predicts}-{count}-{seed}"
                trained(name, record, *options, "--loss", loss, "--predicts", predicts,
                        "--epochs", count, "--seed", seed)
                scored(name, "ddim", 1, 1.25, 1.5, 2)
    scored("l1", "ddpm", 1, 1.25, 1.5)
    scored("mse", "ddpm", 1, 1.25, 1.5, 2)


def study(part: Part, before: Path | None) -> None:
    """The whole study, with a table of its own. before: has the runs.csv of a call that was cut."""
    table = part.work / "results" / "runs.csv"
    table.parent.mkdir()
    if before and (before / "runs.csv").exists():
        shutil.copy(before / "runs.csv", table)
    code = ("import sys\nfrom pathlib import Path\nfrom experiments import runs\n"
            "runs.RUNS, runs.TABLE = map(Path, sys.argv[1:])\nsys.exit(runs.main([]))")
    state = Path(tempfile.mkdtemp())  # too large to come back
    part.item("study", ["-c", code, state, table], 540, True,
              lambda: {"rows": len(table.read_text().splitlines()) - 1})
    if table.exists():
        shutil.copy(table, part.file.with_name("runs.csv"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.gpu", allow_abbrev=False,
                                     description="Tests and measurements on a GPU.")
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("parts", nargs="+", choices=("tests", "times", "runs", "study"))
    parser.add_argument("--minutes", type=float, default=8.5, help="for all of it (default: 8.5)")
    parser.add_argument("--before", type=Path, help="results of an earlier call, for the study")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for name in args.parts:
        part = Part(args.folder, name, deadline)
        study(part, args.before) if name == "study" else globals()[name](part)


if __name__ == "__main__":
    main()
