"""A run is killed at random moments, many times, and the disk fills up: nothing is lost."""

import csv
import multiprocessing
import os
import random
import shutil
import subprocess
import time

import pytest
import torch
from conftest import TINY, content

import train
from runtime.checkpoint import checksum, load_checkpoint, load_model
from runtime.run import STATE

OPTIONS = [*map(str, TINY), "--epochs", "30", "--lr", "0.01", "--checkpoint-every", "1"]


def run_train(folder, *options):
    """In a process of its own: train.py with its output thrown away."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    os._exit(train.main(["--checkpoint", str(folder / "model.pth"), *OPTIONS, *options]))


def run_state(folder):
    """All that must not depend on how often the run was stopped: the state without wall time and place, and the curve."""
    state = load_checkpoint(folder / "model.resume.pth", STATE)
    for row in state["curve"]:
        del row["seconds"]
    with open(folder / "loss.csv", newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return checksum({name: state[name] for name in STATE if name not in ("seconds", "recipe")}), rows


def wait_for_writes(process, file, count):
    """Until the file has been replaced so often, or the process has ended."""
    last, seen = file.stat().st_ino if file.exists() else None, 0
    while process.is_alive() and seen < count:
        time.sleep(0.001)
        now = file.stat().st_ino if file.exists() else None
        seen, last = seen + (now != last), now


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_at_random_moments(tmp_path, capsys, seed):
    """Every kill leaves files that load, and the last run ends bit for bit as one that was never killed."""
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["train"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    for _ in range(2):  # twice, since the first also starts the server that the others are forked from
        shutil.rmtree(whole)
        whole.mkdir()
        began = time.monotonic()
        process = start.Process(target=run_train, args=(whole,))
        process.start()
        while process.is_alive() and not (whole / "model.resume.pth").exists():
            time.sleep(0.001)
        to_first_step = time.monotonic() - began
        process.join(120)
        assert process.exitcode == 0
        seconds = time.monotonic() - began

    rng, kills, steps, halves = random.Random(seed), 0, set(), 0
    for _ in range(500):
        resume = ["--resume"] if (killed / "model.resume.pth").exists() else []
        process = start.Process(target=run_train, args=(killed, *resume))
        process.start()
        if rng.random() < 0.2:
            process.join(rng.uniform(0, 1) * to_first_step)
        else:  # by progress and not by the clock, so that a busy machine changes nothing
            wait_for_writes(process, killed / "model.resume.pth", rng.randint(1, 4))
            process.join(rng.uniform(0, 2) * (seconds - to_first_step) / 90)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        halves += len(list(killed.glob(".*.tmp*")))
        for leftover in killed.glob(".*.tmp*"):
            leftover.unlink()
        if (killed / "model.resume.pth").exists():
            steps.add(load_checkpoint(killed / "model.resume.pth", STATE)["step"])
        if (killed / "model.pth").exists():
            load_model(killed / "model.pth")
    assert process.exitcode == 0
    assert run_state(killed) == run_state(whole)
    assert torch.equal(load_model(killed / "model.pth")[0].x_embedder.proj.bias,
                       load_model(whole / "model.pth")[0].x_embedder.proj.bias)
    with capsys.disabled():
        print(f" [{kills} kills, at {len(steps)} different steps, {halves} in the middle of writing a file] ", end="")
    assert kills >= 5 and len(steps) >= 5


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 800 kB in memory, where the machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True).returncode == 0
    if not made:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_files(full_disk, train_tiny):
    assert train_tiny(full_disk)[0] == 0
    before = content(full_disk)
    (full_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(full_disk).free - 20_000))
    status, _, err = train_tiny(full_disk, "--epochs", 2, "--resume")
    assert status == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("train.py: error: ") and "No space left on device" in err.splitlines()[-1]
    after = content(full_disk)
    assert set(after) == {*before, "ballast"}
    for name in ("model.pth", "model.resume.pth"):
        assert after[name][0] == before[name][0]
    assert load_model(full_disk / "model.pth")[1]["step"] == 3
    (full_disk / "ballast").unlink()
    assert train_tiny(full_disk, "--epochs", 2, "--resume")[0] == 0
    assert load_model(full_disk / "model.pth")[1]["step"] == 6


TWO_EPOCHS = ("--epochs", 2, "--checkpoint-every", 2)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """A run without a fault, of two epochs with three steps each and a checkpoint every two."""
    folder = tmp_path_factory.mktemp("whole")
    assert train.main([str(argument) for argument in ("--checkpoint", folder / "model.pth", *TINY, *TWO_EPOCHS)]) == 0
    return folder


@pytest.mark.parametrize("failing", range(1, 11))
def test_a_run_whose_disk_fails_at_any_write_can_go_on(tmp_path, train_tiny, two_epochs, monkeypatch, failing):
    """The n-th of the run's ten files fails to be moved into place; a resumed run ends as one without a fault."""
    replace, calls = os.replace, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        return replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_once)
        status, _, err = train_tiny(tmp_path, *TWO_EPOCHS)
    assert status == 1 and "could not be written (Input/output error)" in err.splitlines()[-1]
    resume = ["--resume"] if (tmp_path / "model.resume.pth").exists() else []
    assert train_tiny(tmp_path, *TWO_EPOCHS, *resume)[0] == 0
    assert run_state(tmp_path) == run_state(two_epochs)


def test_out_of_memory_names_the_batch_size(tmp_path, train_tiny, monkeypatch):
    for error in (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(train.GaussianDiffusion, "loss", fail)
        status, _, err = train_tiny(tmp_path)
        assert status == 1
        assert err.splitlines()[-1].startswith("train.py: error: out of memory with batches of 100 images")
        assert not list(tmp_path.iterdir())


def test_another_error_is_not_hidden(tmp_path, train_tiny, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train.GaussianDiffusion, "loss", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train_tiny(tmp_path)


def test_a_kill_between_the_last_state_and_its_weights(tmp_path, train_tiny, monkeypatch):
    """model.pth is then a step older; --resume has no step left to do, and writes it all the same."""
    class Killed(BaseException):
        pass

    def killed(self, ema, step):
        if step == 3:
            raise Killed
        whole(self, ema, step)

    whole = train.RunFiles.save_weights
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.RunFiles, "save_weights", killed)
        train_tiny(tmp_path, "--checkpoint-every", 1)
    assert load_model(tmp_path / "model.pth")[1]["step"] == 2
    assert train_tiny(tmp_path, "--checkpoint-every", 1, "--resume")[0] == 0
    model, info = load_model(tmp_path / "model.pth")
    assert info["step"] == 3
    ema = load_checkpoint(tmp_path / "model.resume.pth", STATE)["ema"]
    assert all(torch.equal(value, ema[name]) for name, value in model.state_dict().items())
