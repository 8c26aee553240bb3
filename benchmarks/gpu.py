"""Everything that only a GPU can tell, in calls of at most nine minutes; needs nothing installed.

    python -m benchmarks.gpu $OUT tests times                 parity, then what the time goes to
    python -m benchmarks.gpu $OUT runs                        whole commands, 500 epochs, evaluation
    python -m benchmarks.gpu $OUT study                       the study, with a table of its own

Each part writes PART.json, after every item, and PART.tar.gz into the folder. Today's default is
measured in the same call. What no longer fits into --minutes is left out, and said.
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
from pathlib import Path
from unittest import mock

import torch

import train
from config import GUIDANCE, MNIST_TEST_IMAGES, ModelConfig, TrainConfig
from dataset import load_mnist
from diffusion import GaussianDiffusion
from dit import DiT
from evaluate import AT_ONCE, BATCH_SIZE
from inference import generate
from runtime.checkpoint import load_model
from runtime.files import PROJECT

VARIANTS = {"default": {}, "plain": {"compile": False}, "recorded": {"record": True, "compile": False},
            "recorded, compiled": {"record": True}}  # of training
QUICK = "recorded_steps or first_recorded or samples_are or test_loss"  # the tests of parity


class Part:
    """The items of a part, each a process with a limit in seconds; their results as JSON."""

    def __init__(self, folder: Path, name: str, deadline: float):
        self.file, self.archive = folder / f"{name}.json", folder / f"{name}.tar.gz"
        self.work = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.deadline, self.results = deadline, {}

    def item(self, name: str, command: list, limit: float, record: bool = False,
             read: Callable[[], dict] | None = None, meanwhile: Callable[[], None] = lambda: None) -> dict:
        """Run python with these arguments. read: results from the files that it wrote."""
        left = self.deadline - time.monotonic()
        if left < min(limit, 20):
            print(f"{name}: left out, {left:.0f} s remain", flush=True)
            return self.results.setdefault(name, {"left out": True})
        print(f"{name}: python {' '.join(map(str, command))[:300]}", flush=True)
        environment = os.environ | {"DIT_RECORD": str(int(record)), "PYTHONPATH": str(PROJECT),
                                    "PYTHONUNBUFFERED": "1"}
        start, end = time.monotonic(), time.monotonic() + min(limit, left)
        log = self.work / "log"
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=PROJECT,
                                       env=environment, stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
                meanwhile()
            if process.poll() is None:
                process.kill()
                process.wait()
        output = log.read_text(errors="replace")
        result = {"seconds": time.monotonic() - start, "status": process.returncode, "output": output[-6000:]}
        try:
            result |= read() if read else json.loads(output.strip().splitlines()[-1])
        except Exception as error:  # the item failed or was cut; its output says how
            result["not read"] = repr(error)
        else:
            if result["status"] == 0 and read is None:
                result["output"] = ""
        self.results[name] = result
        shown = {k: v for k, v in result.items() if k not in ("output", "profile", "kernels")}
        print(f"    {json.dumps(shown)[:600]}", flush=True)
        if result["status"]:
            print(result["output"][-1500:], flush=True)
        self.save()
        return result

    def save(self) -> None:
        """The results so far, and the small files next to them."""
        self.results["about"] = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()
                                 if torch.cuda.is_available() else "none", "left": self.deadline - time.monotonic()}
        self.file.write_text(json.dumps(self.results, indent=1))
        with tarfile.open(self.archive, "w:gz", compresslevel=1) as archive:
            for path in sorted(self.work.rglob("*")):
                if path.suffix in (".csv", ".png", ".json") or path.name in ("l1.pth", "mse.pth"):
                    archive.add(path, path.relative_to(self.work))


def measure(call: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Mean seconds per call."""
    for _ in range(warm_up):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


# Measured in a process of their own; the last line that they print is JSON.

def step_time(folder: Path, repeats: int = 300, tf32: bool = False, **recipe) -> dict:
    """ms per training step alone, and the time of the GPU's kernels in one."""
    class Measured(Exception):
        pass

    found, real = {}, train.recorded
    if tf32:
        torch.set_float32_matmul_precision("high")

    def recorded(function, device, *arguments):
        step = real(function, device, *arguments)
        index = torch.randperm(cfg.batch_size).to(device)
        found["ms"] = 1000 * measure(lambda: step(index, 1e-3, 0.99), repeats, warm_up=min(20, repeats))
        if device.type == "cuda":
            found["memory"] = torch.cuda.max_memory_allocated(device)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                measure(lambda: step(index, 1e-3, 0.99), 10)
            found["kernels"] = profile.key_averages().table(sort_by="self_device_time_total", row_limit=25,
                                                            max_name_column_width=60)
        raise Measured

    cfg = TrainConfig(checkpoint=str(folder / "step.pth"), **recipe)
    with mock.patch.object(train, "recorded", recorded):
        try:
            train.train(cfg)
        except Measured:
            return found
    raise AssertionError("no step was timed")


def sampling_time(n: int, steps: int, device: str = "cuda:0", **settings) -> dict:
    """Seconds per call of `generate`; the second call, as in evaluation."""
    model = load_model(PROJECT / "model.pth", device)[0]
    diffusion, seeds = GaussianDiffusion(device=device), list(range(max(1, n // BATCH_SIZE)))
    y = torch.arange(n) % 10

    def call() -> None:
        generate(model, y, steps=steps, seed=seeds, diffusion=diffusion, **settings)

    first = measure(call, 1, warm_up=0)
    return {"first": first, "seconds per call": measure(call, 2, warm_up=0), "steps": steps}


def held_out_time(device: str = "cuda:0", images: int = MNIST_TEST_IMAGES) -> dict:
    """ms per call of `held_out_loss`."""
    device = torch.device(device)
    model, diffusion = DiT(ModelConfig()).to(device).eval(), GaussianDiffusion(device=device)
    batches = train.held_out(diffusion, load_mnist(False, PROJECT / "mnist", device, images))
    call = lambda: train.held_out_loss(model, diffusion, batches, "l1")  # noqa: E731
    return {"ms": 1000 * measure(call, 5), "batches": len(batches)}


def profiled(folder: Path, options: list[str]) -> dict:
    """What a run spends its time on in Python, by cProfile."""
    import cProfile
    import io
    import pstats
    profile, text = cProfile.Profile(), io.StringIO()
    profile.runcall(train.main, ["--checkpoint", str(folder / "profiled.pth"), *options])
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(60)
    return {"profile": text.getvalue()}


def calling(function: Callable[..., dict], *arguments, **settings) -> list[str]:
    """The arguments of python that print function(...) as JSON."""
    arguments = tuple(str(a) if isinstance(a, Path) else a for a in arguments)
    return ["-c", "import json\nfrom pathlib import Path\nfrom benchmarks import gpu\n"
            f"a = [Path(x) if isinstance(x, str) else x for x in {arguments!r}]\n"
            f"print(json.dumps(gpu.{function.__name__}(*a, **{settings!r})))"]


# The parts

def tests(part: Part) -> None:
    """All tests marked gpu: the quick ones of parity first."""
    for name, choice, limit in (("parity", QUICK, 200), ("the others", f"not ({QUICK})", 240)):
        part.item(name, ["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-k", choice, "-p",
                         "no:cacheprovider", "--tb=short"], limit, read=dict)


def times(part: Part) -> None:
    def step(batch_size: int, name: str, **settings) -> None:
        settings |= {"batch_size": batch_size} | VARIANTS[name]
        record = settings.pop("record", False)
        part.item(f"step of {batch_size}, {name}{', TF32' * ('tf32' in settings)}",
                  calling(step_time, part.work, **settings), 90, record)

    for batch_size in (300, 64):
        for name in ("plain", "recorded"):
            step(batch_size, name)
    step(300, "recorded", tf32=True)
    for on in (False, True):
        name = "recorded" if on else "default"
        part.item(f"test loss, {name}", calling(held_out_time), 60, on)
        part.item(f"1000 steps of ten digits, {name}", calling(sampling_time, 10, 1000), 60, on)
        for n in (BATCH_SIZE, BATCH_SIZE * AT_ONCE):
            part.item(f"50 steps of {n} digits, {name}", calling(sampling_time, n, 50), 60, on)
        part.item(f"inference.py, {name}", ["inference.py", "--output", part.work / "ten.png"], 60, on, dict)
    part.item("imports of inference.py", ["-c", "import inference"], 60, read=dict)
    part.item("a run of 3 steps", ["train.py", "--epochs", 1, "--limit", 900, "--no-compile",
                                   "--checkpoint", part.work / "three.pth"], 60, True, dict)
    part.item("profile of 12 epochs", calling(profiled, part.work, options=[
        "--epochs", "12", "--no-compile"]), 90, True)
    for name in ("default", "recorded, compiled"):  # each compiles for half a minute
        step(300, name)


def epochs(part: Part, name: str) -> dict:
    """From loss.csv of a run: its last row, and the mean seconds of an epoch after the first."""
    with (part.work / f"{name}.loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, last = (float(row["seconds"]) for row in (rows[0], rows[-1]))
    return {"last": rows[-1], "seconds per epoch": (last - first) / max(1, len(rows) - 1)}


def runs(part: Part) -> None:
    """Whole commands."""
    parity = part.item("parity", ["-m", "pytest", "-q", "-x", "-m", "gpu", "tests/test_gpu.py", "-k",
                                  f"({QUICK}) and not compile", "-p", "no:cacheprovider", "--tb=short"], 150, read=dict)
    predicted = {}
    for name, variant in VARIANTS.items():
        if name == "plain" or (variant.get("record") and parity.get("status") != 0):
            continue
        record, options = variant.get("record", False), [] if variant.get("compile", True) else ["--no-compile"]
        file = name.replace(", ", "-")
        count = 15 if record else 5
        result = part.item(f"{count} epochs, {name}", [
            "train.py", "--epochs", count, "--checkpoint", part.work / f"{file}.pth", *options], 100, record,
            lambda file=file: epochs(part, file))
        if result.get("status") == 0:
            predicted[result["seconds"] + (500 - count) * result["seconds per epoch"]] = (record, options)
    if not predicted:
        return
    part.results["predicted seconds of 500 epochs"] = {str(v): k for k, v in predicted.items()}
    part.save()
    record, options = predicted[min(predicted)]
    print(f"continuing with DIT_RECORD={record:d} {' '.join(options)}", flush=True)

    def trained(name: str, *settings) -> None:
        part.item(name, ["train.py", "--checkpoint", part.work / f"{name}.pth", *options, *settings], 400, record,
                  lambda: epochs(part, name))

    def scored(name: str, sampler: str, *strengths: float) -> None:
        if (part.work / f"{name}.pth").exists():
            file = part.work / f"{name}-{sampler}-{'-'.join(map(str, strengths))}.json"
            part.item(f"{name}, {sampler}, guidance {strengths}", [
                "evaluate.py", "--checkpoint", part.work / f"{name}.pth", "--sampler", sampler,
                "--guidance", *strengths, "--json", file], 300, record, lambda: {"scores": json.loads(file.read_text())})

    trained("l1")
    scored("l1", "ddpm", GUIDANCE)
    scored("l1", "ddim", 1, 1.25, 1.5, 2)
    trained("mse", "--loss", "mse")
    scored("mse", "ddim", 1, 1.25, 1.5, 2)
    for seed in (0, 1, 2):
        for count in (3, 10, 30, 100):
            for loss in ("l1", "mse"):
                name = f"{loss}-{count}-{seed}"
                trained(name, "--loss", loss, "--epochs", count, "--seed", seed)
                scored(name, "ddim", 1, 2)
    scored("l1", "ddpm", 1, 1.25, 1.5)
    scored("mse", "ddpm", 1, 1.25, 1.5, 2)


def study(part: Part, before: Path | None) -> None:
    """The whole study, with a table of its own. before: a folder with the runs.csv of a call that was cut."""
    table = part.work / "results" / "runs.csv"
    table.parent.mkdir()
    if before and (before / "runs.csv").exists():
        shutil.copy(before / "runs.csv", table)
    copied = [time.monotonic()]

    def copy() -> None:
        if table.exists() and time.monotonic() > copied[0] + 5:
            shutil.copy(table, part.file.with_name("runs.csv"))
            copied[0] = time.monotonic()

    code = ("import sys\nfrom pathlib import Path\nfrom experiments import runs\n"
            "runs.RUNS, runs.TABLE = map(Path, sys.argv[1:])\nsys.exit(runs.main([]))")
    part.item("study", ["-c", code, part.work / "state", table], 540, True,
              lambda: {"rows": len(table.read_text().splitlines()) - 1}, copy)
    if table.exists():
        shutil.copy(table, part.file.with_name("runs.csv"))
    shutil.rmtree(part.work / "state", ignore_errors=True)  # too large to come back
    part.save()


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
