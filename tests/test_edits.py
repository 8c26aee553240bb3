"""What is read is what runs: a line of a copy's source is edited; training and sampling obey."""

import os
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
MLP, HEADS = "return self.fc2(self.act(self.fc1(x)))", "return (weights @ v)"
EPS = "nn.LayerNorm(hidden_size, elementwise_affine=False, eps={})"
FIFTH = """class FifthBlock(DiTBlock):
    def forward(self, x, c):
        shift, scale, gate, _, _, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift, scale))
"""

# Edits of what the C++ computes, or of what else happens then: the plain network has to run.
# file: (what stands there, what takes its place), or the latter alone, at the end of the file
REPLACED = {
    "attention's gate removed": {"dit_block.py": ("x + gate_attn[:, None] * self.attn", "x + self.attn")},
    "softmax scale 1/d": {"dit_block.py": ("q.shape[-1]**-0.5", "q.shape[-1]**-1.0")},
    "ReLU": {"dit_block.py": ('nn.GELU(approximate="tanh")', "nn.ReLU()")},
    "GELU without tanh": {"dit_block.py": ('nn.GELU(approximate="tanh")', "nn.GELU()")},
    "half of each block": {"dit.py": ("x = block(x, c)", "x = x + 0.5 * block(x, c)")},
    "a scaled residual": {"dit_block.py": ("x = x + gate_mlp", "x = 0.999 * x + gate_mlp")},
    "detach": {"dit_block.py": ("self.mlp(modulate(self.norm2(x)", "self.mlp(modulate(self.norm2(x.detach())")},
    "slower gradients": {"dit_block.py": ("attend(q, k, v)", "attend(0.9 * q + 0.1 * q.detach(), k, v)")},
    "another eps": {"dit_block.py": ("norm2 = " + EPS.format("1e-6"), "norm2 = " + EPS.format("2e-6"))},
    "clipped scores": {"dit_block.py": ("-2, -1)).softmax", "-2, -1)).clamp(-20, 20).softmax")},
    "a causal mask": {"dit_block.py": ("-2, -1)).softmax", "-2, -1)).tril().softmax")},
    "a clipped stream": {"dit_block.py": ("x = x + gate_mlp", "x = x.clamp(-30, 30) + gate_mlp")},
    "bfloat16": {"dit_block.py": ("return self.proj(attend(q, k, v))",
                                  "return self.proj(attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float())")},
    "dropout": {"dit_block.py": (MLP, f"return nn.functional.dropout({MLP[7:]}, 0.3, True)")},
    "rare skips": {"dit_block.py": (MLP, f"return {MLP[7:]} * (__import__('random').random() > 1e-9)")},
    "a print": {"dit_block.py": (HEADS, f"print(weights.shape); {HEADS}")},
    "recorded input": {"dit_block.py": ("q, k, v = self.qkv(x)", "self.seen = x; q, k, v = self.qkv(x)")},
    "recorded attention": {"dit_block.py": (HEADS, f"MAPS.append(weights.shape); {HEADS}"),
                           "dit_block.py ": "MAPS = []"},
    "a fifth design": {"dit_block.py": FIFTH, "dit.py": ('"adaLN-Zero": DiTBlock}', '"adaLN-Zero": FifthBlock}'),
                       "dit.py ": ("import AdaLNBlock,", "import FifthBlock, AdaLNBlock,")},
}
# Edits around the blocks: they count, and the C++ may stay.
KEPT = {
    "nothing": {},
    "the final layer": {"dit.py": ("self.norm_final(x), shift, scale)", "self.norm_final(x), shift, 0 * scale)")},
    "the time embedding": {"time_emb.py": ("math.log(10_000)", "math.log(1_000)")},
    "the sampler": {"diffusion.py": ("x_0.clamp(-1, 1) if clip", "x_0.clamp(-0.5, 0.5) if clip")},
}


@pytest.fixture(scope="module")
def process(forked):
    """process(function, arguments): its result, from a process of its own."""
    with forked.Pool(1, maxtasksperchild=1) as pool:
        yield pool.apply


def enter(folder: Path) -> None:
    """From now on, the project is its copy in this folder."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            del sys.modules[name]


def edited_copy(folder: Path, edits: dict) -> None:
    for path in (*ROOT.glob("*.py"), ROOT / "model.pth"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "runtime", folder / "runtime")
    (folder / "mnist").symlink_to(ROOT / "mnist")
    for name, edit in edits.items():
        path = folder / name.strip()
        text = path.read_text()
        old, new = edit if isinstance(edit, tuple) else ("", edit)
        assert old in text, f"{old!r} no longer stands in {name}"
        path.write_text(text.replace(old, new) if old else text + "\n\n" + new)


def run_copy(folder: Path) -> bool:
    """In the copy: inference.py and three training steps, as they are and with the plain network.

    Whether C++ stood in.
    """
    enter(folder)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile follows what is read, and takes half a minute
    torch.set_num_threads(1)
    import inference
    import train
    from runtime import fused

    sample = ["--sampler", "ddim", "--steps", "3", "--digits", "2", "5", "8", "--columns", "1", "--device", "cpu"]
    steps = ["--limit", "300", "--batch-size", "100", "--epochs", "1", "--device", "cpu"]
    train.samples_due = lambda *epochs: False
    check_same, passed = fused.check_same, []
    fused.check_same = lambda *networks: (check_same(*networks), passed.append(True))
    for name in ("with", "without"):
        torch.manual_seed(0)  # for an edited sampler that uses it
        assert inference.main([*sample, "--output", f"{name}.png"]) == 0
        assert train.main([*steps, "--checkpoint", f"{name}.pth"]) == 0
        fused.in_cpp = None  # fails, as without a compiler
    return bool(passed)


def results(folder: Path, name: str) -> tuple[np.ndarray, torch.Tensor]:
    weights = torch.load(folder / f"{name}.pth", weights_only=True)["ema"]
    pixels = np.asarray(Image.open(folder / f"{name}.png").convert("L"), float)
    return pixels, torch.cat([value.flatten() for value in weights.values()])


@pytest.mark.parametrize("edits", REPLACED.values(), ids=REPLACED)
def test_an_edited_block_is_what_trains_and_samples(edits, tmp_path, process):
    """The same bits with C++ and without: the plain network ran in both."""
    edited_copy(tmp_path, edits)
    assert not process(run_copy, (tmp_path,))
    (pixels, weights), (plain_pixels, plain_weights) = (results(tmp_path, name) for name in ("with", "without"))
    assert np.array_equal(pixels, plain_pixels) and torch.equal(weights, plain_weights)


def test_an_edit_around_the_blocks_counts(tmp_path, process):
    """With C++, up to rounding; and each edit changes the picture."""
    pictures = []
    for name, edits in KEPT.items():
        folder = tmp_path / name
        folder.mkdir()
        edited_copy(folder, edits)
        assert process(run_copy, (folder,))
        (pixels, weights), (plain_pixels, plain_weights) = (results(folder, name) for name in ("with", "without"))
        assert np.abs(pixels - plain_pixels).mean() < 0.5
        assert (weights - plain_weights).abs().mean() < 1e-3
        pictures.append(pixels)
    assert all(np.abs(pixels - pictures[0]).mean() > 0.5 for pixels in pictures[1:])


def sample_copy(folder: Path) -> tuple[int, str, bool]:
    """Exit status and last line of inference.py in the copy, and whether it wrote a picture."""
    enter(folder)
    import inference

    with open("error.txt", "w") as error, redirect_stderr(error):
        status = inference.main(["--sampler", "ddim", "--steps", "2", "--digits", "1", "--device", "cpu"])
    return status, Path("error.txt").read_text().splitlines()[-1], Path("inference.png").exists()


@pytest.mark.parametrize("edits", [
    {"config.py": ("T = 1000", "T = 500")}, {"config.py": ("(1e-4, 0.02)", "(1e-4, 0.01)")},
    {"diffusion.py": ("dtype=torch.float64, device=\"cpu\")  # DDPM section 4", "dtype=torch.float64).square() * 50")}])
def test_weights_of_another_schedule_are_refused(edits, tmp_path, process):
    """T, beta, or the curve of beta edited in place."""
    edited_copy(tmp_path, edits)
    status, sentence, written = process(sample_copy, (tmp_path,))
    assert (status, written) == (1, False) and "trained with another schedule" in sentence
