"""Two processes give what one gives, and a run continues when one of them is killed."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, content
from test_train import FILES, rows

from runtime.checkpoint import load_model

OPTIONS = [*map(str, TINY), "--epochs", "4", "--lr", "0.01", "--optimizer", "adamw"]


def torchrun(*options, cwd, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               f"--max-restarts={restarts}", str(ROOT / "train.py"), *OPTIONS, *map(str, options)]
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def ema_and_curve(folder):
    curve = [(float(row["train_loss"]), float(row["test_loss"])) for row in rows(folder)]
    return dict(load_model(folder / "model.pth")[0].state_dict()), torch.tensor(curve)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    command = [sys.executable, str(ROOT / "train.py"), *OPTIONS]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return ema_and_curve(folder)


def assert_same(folder, expected):
    ema, curve = ema_and_curve(folder)
    torch.testing.assert_close(ema, expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curve, expected[1], rtol=1e-4, atol=1e-5)


def kill_the_last_worker_after_a_checkpoint(process, folder):
    while not (folder / "model.resume.pth").exists() and process.poll() is None:
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_continues(tmp_path, one_process):
    """And it ends where one process does, with the same files."""
    process = torchrun("--checkpoint-every", 1, "--compile", cwd=tmp_path, restarts=1)
    kill_the_last_worker_after_a_checkpoint(process, tmp_path)
    out = finish(process)
    assert re.search(r"resumed at step \d+ of 12", out), out
    assert_same(tmp_path, one_process)
    assert content(tmp_path).keys() == FILES


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_saving(tmp_path, one_process):
    """It reaches all of them, and torchrun sends it once more."""
    process = torchrun("--checkpoint-every", 1000, cwd=tmp_path)
    log = ""
    while "train_loss" not in log:  # the first epoch is over
        log += process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=240)
    assert load_model(tmp_path / "model.pth")[1]["step"] < 12
    finish(torchrun("--checkpoint-every", 1000, "--resume", cwd=tmp_path))
    assert_same(tmp_path, one_process)
