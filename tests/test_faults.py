"""What happens to a run from outside: kill -9, full disks, a second run, a closed terminal."""

import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
from conftest import ROOT, TINY, content
from test_train import run_state

import train
from runtime.checkpoint import load_checkpoint, load_model
from runtime.run import STATE

MANY_SAVES = ("--epochs", 15, "--lr", 0.01, "--checkpoint-every", 1)


def start(folder, *options):
    """A process that trains and saves after every step: a fork, as importing torch is slow."""
    arguments = ("--checkpoint", folder / "model.pth", *TINY, *MANY_SAVES, *options)
    process = get_context("fork").Process(target=train.main, args=[list(map(str, arguments))])
    process.start()
    return process


def wait_for_writes(process, file, count):
    """Until the file has been replaced `count` times, or the process has ended."""
    last, seen = file.stat().st_ino if file.exists() else None, 0
    while process.is_alive() and seen < count:
        time.sleep(0.001)
        now = file.stat().st_ino if file.exists() else None
        seen, last = seen + (now != last), now


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path, train_tiny):
    """Every kill leaves files that load, and the last run ends as one that was never killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    assert train_tiny(whole, *MANY_SAVES)[0] == 0
    rng, steps, process = random.Random(0), set(), start(killed)
    while True:  # by progress and not by the clock, so that a busy machine changes nothing
        wait_for_writes(process, killed / "model.resume.pth", rng.randint(3, 9))
        time.sleep(rng.uniform(0, 0.02))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        steps.add(load_checkpoint(killed / "model.resume.pth", STATE)["step"])
        load_model(killed / "model.pth")
        process = start(killed, "--resume")
    assert len(steps) >= 4
    assert run_state(killed) == run_state(whole)


def test_ctrl_c_while_torch_is_imported(tmp_path):
    """Exit by the signal itself, as a shell expects it, and not a word."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py"], cwd=tmp_path,
                               stderr=subprocess.PIPE)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.stderr.read()) == (-signal.SIGINT, b"")


def test_a_closed_terminal_saves_the_run(tmp_path):
    """Also at a moment when the next thing is a line for that terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        command = [sys.executable, ROOT / "train.py", *TINY, "--epochs", 100_000]
        os.execv(sys.executable, [str(part) for part in command])
    while b"train_loss" not in os.read(terminal, 10_000):
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert load_checkpoint(tmp_path / "model.resume.pth", STATE)["step"] >= 3


def test_a_second_run_is_refused(tmp_path, train_tiny, refused):
    process = start(tmp_path, "--epochs", 1000)
    wait_for_writes(process, tmp_path / "model.resume.pth", 1)
    os.kill(process.pid, signal.SIGSTOP)  # it stays where it is
    before = content(tmp_path)
    refused(train.main, 1, "another process is writing", "--checkpoint", tmp_path / "model.pth",
            *TINY, "--seed", 5)
    assert content(tmp_path) == before
    process.kill()
    process.join()
    epochs = load_checkpoint(tmp_path / "model.resume.pth", STATE)["step"] // 3 + 1
    status, _, err = train_tiny(tmp_path, *MANY_SAVES, "--epochs", epochs, "--resume")
    assert status == 0, err


def test_a_full_disk_keeps_the_last_good_files(tmp_path, train_tiny, request):
    """A file system of 800 kB in memory, where the machine lets us make one."""
    full_disk = tmp_path / "disk"
    full_disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(full_disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    request.addfinalizer(lambda: subprocess.run(["umount", str(full_disk)], check=True))
    assert train_tiny(full_disk)[0] == 0
    before = content(full_disk)
    (full_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(full_disk).free - 20_000))
    status, _, err = train_tiny(full_disk, "--epochs", 2, "--resume")
    assert status == 1 and re.match("train.py: error: .*No space left", err.splitlines()[-1])
    after = content(full_disk)
    assert set(after) == {*before, "ballast"}
    assert all(after[name][0] == before[name][0] for name in ("model.pth", "model.resume.pth"))
    (full_disk / "ballast").unlink()
    assert train_tiny(full_disk, "--epochs", 2, "--resume")[0] == 0
    assert load_model(full_disk / "model.pth")[1]["step"] == 6


def test_a_run_whose_disk_fails_at_any_write_can_continue(tmp_path, train_tiny, monkeypatch):
    """When the n-th of its files cannot be moved into place; it ends as one without a fault."""
    options, replace = ("--epochs", 2, "--checkpoint-every", 2), os.replace
    assert train_tiny(tmp_path / "whole", *options)[0] == 0
    for failing in (1, 2, 3, 5, 7, 10):
        moved = []

        def fail_once(source, target, moved=moved, failing=failing):
            moved.append(target)
            if len(moved) == failing:
                raise OSError(5, "Input/output error")
            return replace(source, target)

        monkeypatch.setattr(os, "replace", fail_once)
        folder = tmp_path / str(failing)
        status, _, err = train_tiny(folder, *options)
        assert status == 1 and "could not be written (Input/output error)" in err.splitlines()[-1]
        resume = ["--resume"] * (folder / "model.resume.pth").exists()
        assert train_tiny(folder, *options, *resume)[0] == 0
        assert run_state(folder) == run_state(tmp_path / "whole")
