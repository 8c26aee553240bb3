"""What happens to a run from outside: kill -9, full disks, a second run, broken streams, odd settings. Nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, content
from test_train import FILES, run_state

import train
from runtime.checkpoint import checksum, load_checkpoint, load_model
from runtime.run import STATE

MANY_SAVES = ("--epochs", 30, "--lr", 0.01, "--checkpoint-every", 1)
TRAIN = " ".join(map(str, (sys.executable, ROOT / "train.py", *TINY, "--epochs 1")))


def run_train(folder, *options):
    """In a process of its own: train.py with its output thrown away."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    os._exit(train.main([str(word) for word in ("--checkpoint", folder / "model.pth", *TINY, *MANY_SAVES, *options)]))


@pytest.fixture
def start(forked):
    """start(folder, *options): a process that trains."""
    def start_process(folder, *options):
        process = forked.Process(target=run_train, args=(folder, *options))
        process.start()
        return process

    return start_process


def wait_for_writes(process, file, count):
    """Until the file has been replaced `count` times, or the process has ended."""
    last, seen = file.stat().st_ino if file.exists() else None, 0
    while process.is_alive() and seen < count:
        time.sleep(0.001)
        now = file.stat().st_ino if file.exists() else None
        seen, last = seen + (now != last), now


# A process dies

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_at_random_moments(tmp_path, train_tiny, start, seed):
    """Every kill leaves files that load, and the last run ends bit for bit as one that was never killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    assert train_tiny(whole, *MANY_SAVES)[0] == 0
    rng, kills, steps = random.Random(seed), 0, set()
    for _ in range(500):
        process = start(killed, *["--resume"] * (killed / "model.resume.pth").exists())
        if rng.random() < 0.2:
            process.join(rng.uniform(0, 2))
        else:  # by progress and not by the clock, so that a busy machine changes nothing
            wait_for_writes(process, killed / "model.resume.pth", rng.randint(1, 4))
            process.join(rng.uniform(0, 0.02))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        if (killed / "model.resume.pth").exists():
            steps.add(load_checkpoint(killed / "model.resume.pth", STATE)["step"])
        if (killed / "model.pth").exists():
            load_model(killed / "model.pth")
    assert process.exitcode == 0
    assert run_state(killed) == run_state(whole)
    assert checksum(load_model(killed / "model.pth")[0].state_dict()) == checksum(
        load_model(whole / "model.pth")[0].state_dict())
    assert kills >= 5 and len(steps) >= 5


def test_ctrl_c_while_torch_is_imported(tmp_path):
    """Exit by the signal itself, as a shell expects it, and not a word."""
    for seconds in (0.15, 0.4, 0.8):
        process = subprocess.Popen([sys.executable, ROOT / "train.py"], cwd=tmp_path, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read()) == (-signal.SIGINT, b"")
    assert not list(tmp_path.iterdir())


# Two runs

@pytest.mark.parametrize("second", ["model.pth", "link.pth", "model.pt", "model.resume.pth"])
def test_a_second_run_is_refused_as_long_as_the_first_lives(tmp_path, start, train_tiny, refused, second):
    """By whatever name it has the first one's checkpoint, or its loss.csv, or its state."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.pth").symlink_to(tmp_path / "model.pth")
    process = start(tmp_path, "--epochs", 1000)
    wait_for_writes(process, tmp_path / "model.pth", 1)
    os.kill(process.pid, signal.SIGSTOP)  # it stays where it is
    before = content(tmp_path)
    place = tmp_path / "folder" / second if second == "link.pth" else tmp_path / second
    refused(train.main, 1, f"{place} or a file next to it is being written by process {process.pid}",
            "--checkpoint", place, *TINY, "--seed", 5)
    assert content(tmp_path) == before
    process.kill()
    process.join()
    epochs = load_checkpoint(tmp_path / "model.resume.pth", STATE)["step"] // 3 + 1
    status, _, err = train_tiny(tmp_path, *MANY_SAVES, "--epochs", epochs, "--resume")
    assert status == 0, err


# A disk that is full or fails

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


@pytest.mark.parametrize("free", [0, 20_000])
def test_a_full_disk_keeps_the_last_good_files(full_disk, train_tiny, free):
    assert train_tiny(full_disk)[0] == 0
    before = content(full_disk)
    (full_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(full_disk).free - free))
    status, _, err = train_tiny(full_disk, "--epochs", 2, "--resume")
    assert status == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("train.py: error: ") and "No space left on device" in err.splitlines()[-1]
    after = content(full_disk)
    assert set(after) == {*before, "ballast"}
    assert all(after[name][0] == before[name][0] for name in ("model.pth", "model.resume.pth"))
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


@pytest.mark.parametrize("failing", range(1, 15))
def test_a_run_whose_disk_fails_at_any_write_can_continue(tmp_path, train_tiny, two_epochs, monkeypatch, failing):
    """The n-th of the run's files fails to be moved into place; the run, or a resumed one, ends as one without a fault."""
    replace, moved = os.replace, []

    def fail_once(source, target):
        moved.append(Path(target))
        if len(moved) == failing:
            raise OSError(5, "Input/output error")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_once)
        status, out, err = train_tiny(tmp_path, *TWO_EPOCHS)
    assert len(moved) >= failing
    if moved[failing - 1].suffix == ".png":
        assert status == 0 and "could not be drawn" in out
    else:
        assert status == 1 and "could not be written (Input/output error)" in err.splitlines()[-1]
        assert train_tiny(tmp_path, *TWO_EPOCHS, *["--resume"] * (tmp_path / "model.resume.pth").exists())[0] == 0
    assert run_state(tmp_path) == run_state(two_epochs)
    weights = [load_model(folder / "model.pth")[0].state_dict() for folder in (tmp_path, two_epochs)]
    assert checksum(weights[0]) == checksum(weights[1])


# Streams, names and settings

def bash(command, folder, **environment):
    """The command in bash; TRAIN in it is a run of three steps. Its exit status is that of the first part that fails."""
    command = "set -o pipefail; " + command.replace("TRAIN", TRAIN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=120)


@pytest.mark.parametrize("command", [
    "TRAIN 2>&1 | head -c 400",
    "TRAIN >&- 2>&-",
    *(pytest.param(command, marks=pytest.mark.slow) for command in (
        "TRAIN 2>&-", "TRAIN 2>/dev/full", "TRAIN >/dev/full 2>&1", "TRAIN <&- >&- 2>&-", "TRAIN && TRAIN | true",
        "TRAIN && TRAIN --resume >&-", "nohup TRAIN"))])
def test_a_broken_stream_does_not_end_a_run(tmp_path, command):
    done = bash(command, tmp_path)
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert content(tmp_path).keys() >= FILES and load_model(tmp_path / "model.pth")[1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "environment"), [
    ("mödel.pth", {"PYTHONIOENCODING": "ascii"}),
    ("mödel.pth", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ("m\udcf6del.pth", {}), ("m\udcf6del.pth", {"PYTHONIOENCODING": "ascii"})])
def test_a_name_that_a_terminal_cannot_show(tmp_path, name, environment):
    command = f"TRAIN --checkpoint {name}; cp {name} first; TRAIN --checkpoint {name} --seed 1"
    done = bash(f"set -e; {command}; TRAIN --checkpoint {name} --seed 1 --resume", tmp_path, **environment)
    assert done.returncode == 0, done
    assert (tmp_path / name.replace(".", ".old-1.")).read_bytes() == (tmp_path / "first").read_bytes()
    assert load_model(tmp_path / name)[1]["recipe"]["seed"] == 1


@pytest.mark.parametrize("error", [RuntimeError("no LaTeX"), MemoryError()])
def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(tmp_path, train_tiny, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr("runtime.run.save_picture", fail)
    status, out, _ = train_tiny(tmp_path, "--epochs", 2)
    assert status == 0 and out.count("could not be drawn, and training continues") == 1
    assert load_model(tmp_path / "model.pth")[1]["step"] == 6
