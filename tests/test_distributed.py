"""Two processes give what one gives, and a run continues when one of them is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, content
from test_train import FILES, rows

from config import TrainConfig
from runtime.checkpoint import load_model
from runtime.distributed import Ranks
from runtime.script import TrainingError
from train import main as train_main
from train import train

# Not with Muon, whose bfloat16 matrix products turn a difference in the last bit into 5e-4, even in one process.
OPTIONS = [*map(str, TINY), "--epochs", "4", "--lr", "0.01", "--optimizer", "adamw"]


def torchrun(*options, cwd, processes=2, restarts=0, machines=("--standalone",)):
    command = [sys.executable, "-m", "torch.distributed.run", *machines, f"--nproc-per-node={processes}",
               f"--max-restarts={restarts}", str(ROOT / "train.py"), *OPTIONS, *map(str, options)]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(len(machines) > 1))}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def ema_and_curve(folder):
    curve = [(float(row["train_loss"]), float(row["test_loss"])) for row in rows(folder)]
    return load_model(folder / "model.pth")[0].state_dict(), curve


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *OPTIONS], cwd=folder, check=True, capture_output=True)
    return ema_and_curve(folder)


def assert_same(folder, expected):
    (ema, curve), (expected_ema, expected_curve) = ema_and_curve(folder), expected
    for name in expected_ema:
        torch.testing.assert_close(ema[name], expected_ema[name], rtol=1e-3, atol=1e-4)
    assert len(curve) == 4
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected_curve), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--no-compile", "--compile"])
def test_two_processes_give_what_one_gives(option, tmp_path, one_process):
    finish(torchrun(option, cwd=tmp_path))
    assert_same(tmp_path, one_process)
    assert content(tmp_path).keys() == FILES


def kill_the_last_worker_after_a_checkpoint(process, folder) -> int:
    """Returns the step of the checkpoint that was there."""
    deadline = time.monotonic() + 120
    while not (folder / "model.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    step = load_model(folder / "model.pth")[1]["step"]
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    return step


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_process_is_restarted_and_the_run_continues(tmp_path, one_process, processes):
    (tmp_path / "model.resume.pth").write_text("of an earlier run")
    process = torchrun("--checkpoint-every", 1, cwd=tmp_path, processes=processes, restarts=1)
    step = kill_the_last_worker_after_a_checkpoint(process, tmp_path)
    out = finish(process)
    assert step < 12 and re.search(r"resumed at step \d+", out), out
    assert_same(tmp_path, one_process)
    assert (tmp_path / "model.old-1.resume.pth").read_text() == "of an earlier run"


@pytest.mark.slow
def test_two_machines_and_the_death_of_one_of_their_processes(tmp_path, one_process):
    """The command in docs/faq.md, with two agents on this machine instead of two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=digits", f"--rdzv-endpoint=localhost:{port}")
    first, second = (torchrun("--checkpoint-every", 1, cwd=tmp_path, processes=1, restarts=2, machines=machines)
                     for _ in range(2))
    step = kill_the_last_worker_after_a_checkpoint(second, tmp_path)
    outs = [finish(process) for process in (first, second)]
    assert step < 12 and re.search(r"resumed at step \d+", "".join(outs)), outs
    assert_same(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [lambda pid: os.kill(pid, signal.SIGTERM), lambda pid: os.killpg(pid, signal.SIGINT)])
def test_a_signal_stops_all_processes_after_saving(tmp_path, one_process, kill):
    """SIGTERM for torchrun, which passes it on; Ctrl-C, which a terminal sends to all of them, and torchrun once more."""
    process = torchrun("--checkpoint-every", 1000, cwd=tmp_path)
    bar = ""
    while "train_loss" not in bar:  # the first epoch is over
        bar += process.stdout.read(1)
    kill(process.pid)
    process.communicate(timeout=240)
    assert load_model(tmp_path / "model.pth")[1]["step"] < 12
    finish(torchrun("--checkpoint-every", 1000, "--resume", cwd=tmp_path))
    assert_same(tmp_path, one_process)


@pytest.mark.slow
def test_with_muon_the_losses_are_the_same(tmp_path, train_tiny):
    options = (*OPTIONS[-6:], "--optimizer", "muon")
    assert train_tiny(tmp_path / "one", *options)[0] == 0
    finish(torchrun(*options, cwd=tmp_path))
    curves = (torch.tensor(ema_and_curve(folder)[1]) for folder in (tmp_path, tmp_path / "one"))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-5)


def train_as_rank(rank, port, folder, options):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with open(folder / f"err{rank}", "w") as err:
        os.dup2(err.fileno(), 2)
        torch.set_num_threads(1)
        os._exit(train_main([*OPTIONS, "--checkpoint", str(folder / "model.pth"), *options]))


@pytest.mark.parametrize("other", [("--lr", "0.02"), ("--seed", "9"), ("--depth", "2"), ("--epochs", "5"), ("--no-compile",)])
def test_processes_with_different_options_are_refused(tmp_path, forked, other):
    """Except in what belongs to a machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [forked.Process(target=train_as_rank, args=(rank, port, tmp_path, options))
                 for rank, options in enumerate(((), other))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    same = other[0] == "--no-compile"
    assert [process.exitcode for process in processes] == [0 if same else 1] * 2
    for rank in () if same else (0, 1):
        assert re.fullmatch(r"train\.py: error: the processes of this run have different options.*\n",
                            (tmp_path / f"err{rank}").read_text())
    assert (tmp_path / "model.pth").exists() == same


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(TrainingError, match="99 cannot be shared evenly by 2 processes"):
        train(TrainConfig(batch_size=99), ranks=Ranks(0, 2))


def test_one_process_needs_no_connection():
    alone = Ranks()
    x = torch.arange(6)
    assert alone.leads and torch.equal(alone.share(x)[0], x) and torch.equal(alone.mean(x), x) and alone.any(True)
    assert [torch.equal(Ranks(rank, 3).share(x)[0], x[2 * rank:2 * rank + 2]) for rank in range(3)] == [True] * 3
