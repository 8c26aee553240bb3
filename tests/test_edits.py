"""What is read is what runs: a line of a copy's source is edited; training and sampling obey."""

import functools
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from runtime.fused.library import block_library

HEADS = "return (weights @ v)"
FIFTH = """class FifthBlock(DiTBlock):
    def forward(self, x, c):
        shift, scale, gate, _, _, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift, scale))


DESIGNS["adaLN-Zero"] = FifthBlock


def patchify("""

# Edits of dit_block.py, old text and new, that the C++ does not follow, in what it computes or in
# what else happens then: the plain network has to run.
IN_THE_BLOCKS = {
    "attention's gate removed": ("x + gate_attn[:, None] * ", "x + "),
    "softmax scale 1/d": ("q.shape[-1]**-0.5", "q.shape[-1]**-1.0"),
    "ReLU": ('nn.GELU(approximate="tanh")', "nn.ReLU()"),
    "detach": ("self.norm2(x), shift_mlp", "self.norm2(x.detach()), shift_mlp"),
    "GELU without tanh": ('nn.GELU(approximate="tanh")', "nn.GELU()"),
    "a scaled residual": ("x = x + gate_mlp", "x = 0.999 * x + gate_mlp"),
    "slower gradients": ("attend(q, k, v)", "attend(0.9 * q + 0.1 * q.detach(), k, v)"),
    "another eps": ("eps=1e-6", "eps=2e-6"),
    "clipped scores": ("softmax(dim=-1)", "clamp(-20, 20).softmax(dim=-1)"),
    "a causal mask": ("softmax(dim=-1)", "tril().softmax(dim=-1)"),
    "dropout": ("self.act(self.fc1(x))", "nn.functional.dropout(self.act(self.fc1(x)), 0.3)"),
    "a print": (HEADS, f"print(weights.shape); {HEADS}"),
    "recorded input": ("N, L, D = x.shape", "self.seen = x; N, L, D = x.shape"),
}
REPLACED = {name: {"dit_block.py": edit} for name, edit in IN_THE_BLOCKS.items()} | {
    "half of each block": {"dit.py": ("x = block(x, c)", "x = x + 0.5 * block(x, c)")},
    "a fifth design": {"dit.py": ("def patchify(", FIFTH)}}
# Edits around the blocks: they count, and the C++ may stay.
KEPT = {
    "nothing": {},
    "the final layer": {"dit.py": ("self.norm_final(x), shift", "self.norm_final(x), 0 * shift")},
    "the time embedding": {"time_emb.py": ("math.log(10_000)", "math.log(1_000)")},
    "the sampler": {"diffusion.py": ("x_0.clamp(-1, 1)", "x_0.clamp(-0.5, 0.5)")}}


@pytest.fixture(scope="module")
def process():
    """process(function, arguments): its result, from a process of its own."""
    block_library(49, 64, 4, 256)  # compiled once, and copied
    forked = multiprocessing.get_context("forkserver")  # with torch imported already
    forked.set_forkserver_preload(["train"])
    with forked.Pool(1, maxtasksperchild=1) as pool:
        yield pool.apply


def enter(folder: Path) -> None:
    """From now on, the project is its copy in this folder."""
    os.chdir(folder)
    pytest.MonkeyPatch().syspath_prepend(folder)  # never undone: the process ends with the test
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.parent == ROOT or path.is_relative_to(ROOT / "runtime"):  # no .venv in it
            del sys.modules[name]


def edited_copy(folder: Path, edits: dict) -> None:
    for path in (*ROOT.glob("*.py"), ROOT / "model.pth"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "runtime", folder / "runtime")
    for name, (old, new) in edits.items():
        text = (folder / name).read_text()
        assert old in text, f"{old!r} no longer stands in {name}"
        (folder / name).write_text(text.replace(old, new))


def run_copy(folder: Path) -> tuple[bool, list[np.ndarray]]:
    """In the copy: DDIM with the included weights and two training steps, twice.

    First as they are, then with the plain network. Returns whether C++ stood in the first time;
    samples and trained weights, samples and trained weights.
    """
    enter(folder)
    import torch

    from runtime import pictures

    # What takes long and makes no difference here. torch.compile follows what is read.
    torch.compile = lambda network, **settings: network
    pictures.save_picture = lambda *arguments: None
    torch.set_num_threads(1)

    import inference
    import train
    from config import TrainConfig
    from runtime import fused

    train.load_mnist, train.samples_due = functools.cache(train.load_mnist), lambda *epochs: False
    check_same, passed, found = fused.check_same, [], []
    fused.check_same = lambda *networks: (check_same(*networks), passed.append(True))
    for name in ("with", "without"):
        torch.manual_seed(0)  # for an edited network that uses it
        model = inference.load_model("model.pth")[0]
        digits = inference.generate(model, [2, 5, 8], sampler="ddim", steps=3)
        ema = train.train(TrainConfig(
            limit=64, batch_size=32, epochs=1, device="cpu", data_dir=str(ROOT / "mnist"),
            checkpoint=f"{name}.pth"))
        weights = torch.cat([parameter.flatten() for parameter in ema.parameters()])
        found += [digits.numpy(), weights.numpy()]
        fused.in_cpp = None  # fails, as without a compiler
    return bool(passed), found


@pytest.mark.parametrize("edits", REPLACED.values(), ids=REPLACED)
def test_an_edited_block_is_what_trains_and_samples(edits, tmp_path, process):
    """The same bits with C++ and without: the plain network ran in both."""
    edited_copy(tmp_path, edits)
    in_cpp, (digits, weights, plain_digits, plain_weights) = process(run_copy, (tmp_path,))
    assert not in_cpp
    assert np.array_equal(digits, plain_digits) and np.array_equal(weights, plain_weights)


def test_an_edit_around_the_blocks_counts(tmp_path, process):
    """With C++, up to rounding; and each edit changes the samples."""
    samples = []
    for name, edits in KEPT.items():
        folder = tmp_path / name
        folder.mkdir()
        edited_copy(folder, edits)
        in_cpp, (digits, weights, plain_digits, plain_weights) = process(run_copy, (folder,))
        assert in_cpp
        assert np.abs(digits - plain_digits).mean() < 0.005
        assert np.abs(weights - plain_weights).mean() < 1e-3
        samples.append(digits)
    assert all(np.abs(digits - samples[0]).mean() > 0.01 for digits in samples[1:])


def load_copy(folder: Path) -> str:
    """How the copy's load_model refuses the included weights."""
    enter(folder)
    from runtime.checkpoint import CheckpointError, load_model

    with pytest.raises(CheckpointError) as refused:
        load_model("model.pth")
    return str(refused.value)


@pytest.mark.parametrize("edits", [
    {"config.py": ("T = 1000", "T = 500")}, {"config.py": ("(1e-4, 0.02)", "(1e-4, 0.01)")},
    {"diffusion.py": ('device="cpu")\n', 'device="cpu").square() * 50\n')}],
    ids=["T", "beta", "curve"])
def test_weights_of_another_schedule_are_refused(edits, tmp_path, process):
    edited_copy(tmp_path, edits)
    assert "trained with another schedule" in process(load_copy, (tmp_path,))
