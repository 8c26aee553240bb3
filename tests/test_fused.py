"""The blocks in C++ are those of dit_block.py, outputs and gradients; nothing else is replaced."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_network
from torch import nn

from config import FAMILY, ModelConfig
from dit import DiT
from dit_block import AdaLNBlock
from runtime import fused as fused_module
from runtime.fused import fused, library
from runtime.fused.library import block_library

SHAPES = {
    "B/4": FAMILY["B/4"], "S/7": FAMILY["S/7"], "L/4": replace(FAMILY["L/4"], depth=2),
    "heads of 8, 25 tokens": ModelConfig(hidden_size=32, image_size=30, patch_size=6),
    "heads of 32, a narrow MLP": ModelConfig(hidden_size=128, depth=1, mlp_ratio=0.5),
    "adaLN": ModelConfig(block="adaLN"),
}


def network_of(**sizes) -> DiT:
    return random_network(ModelConfig(**sizes), std=0.1)


def batch(model: DiT, N: int = 5) -> tuple[torch.Tensor, ...]:
    config = model.config
    x_t = torch.randn(N, config.in_channels, config.image_size, config.image_size)
    return x_t, torch.randint(1000, (N,)), torch.randint(config.num_classes + 1, (N,))


def output_and_gradients(network: nn.Module, model: DiT, x_t, t, y) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x_t = x_t.clone().requires_grad_()
    out = network(x_t, t, y)
    out.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"out": out.detach(), "x_t": x_t.grad} | gradients


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5):
    """Within `tolerance` of the largest value of each tensor."""
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_the_blocks(config):
    """And the trial leaves the global generator alone."""
    model = random_network(config, std=0.1)
    before = torch.get_rng_state()
    network = fused(model)
    assert network is not model and torch.equal(torch.get_rng_state(), before)
    inputs = batch(model, 3)
    expected = output_and_gradients(model, model, *inputs)
    assert_same(output_and_gradients(network, model, *inputs), expected)


def test_every_number_of_threads_gives_the_same():
    model = network_of()
    network, inputs = fused(model), batch(model, 7)
    assert network is not model
    expected = output_and_gradients(model, model, *inputs)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same(output_and_gradients(network, model, *inputs), expected)
    finally:
        torch.set_num_threads(1)


def test_values_beyond_the_range_of_exp():
    """Scores and hidden values of many thousands, of both signs."""
    model = network_of(depth=1)
    with torch.no_grad():
        for layer in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1):
            layer.weight.mul_(1000)
    inputs = batch(model)
    plain, fast = (output_and_gradients(of, model, *inputs) for of in (model, fused(model)))
    names = ("out", "x_t", "blocks.0.mlp.fc2.weight", "blocks.0.attn.proj.weight")
    assert_same(fast, {name: plain[name] for name in names}, tolerance=2e-3)


def test_it_follows_the_parameters_except_when_frozen():
    model = network_of()
    network, frozen, inputs = fused(model), fused(model, frozen=True), batch(model)
    with torch.no_grad():
        before = network(*inputs)
        for layer in (model.blocks[1].mlp.fc1, model.blocks[0].adaLN_modulation[1]):
            layer.weight.mul_(2)
        assert_same({"": network(*inputs)}, {"": model(*inputs)})
        assert torch.equal(frozen(*inputs), before)
        assert not torch.allclose(network(*inputs), before)


# What it leaves alone

def edited(part: str, replacement) -> DiT:
    """The default network with another part in its second block; the block itself is ""."""
    model = DiT(ModelConfig(depth=2))
    owner, _, name = f"blocks.1.{part}".rstrip(".").rpartition(".")
    setattr(model.get_submodule(owner), name, replacement)
    return model


def hooked(model: DiT, hook) -> DiT:
    model.blocks[2].attn.register_forward_hook(hook)
    return model


LEFT_ALONE = {
    "cross-attention": lambda: DiT(ModelConfig(block="cross-attention")),
    "heads of 2": lambda: DiT(ModelConfig(hidden_size=8)),
    "float64": lambda: DiT(ModelConfig()).double(),
    "adaLN among adaLN-Zero": lambda: edited("", AdaLNBlock(64, 4, 4.0)),
    "no bias": lambda: edited("attn.proj", nn.Linear(64, 64, bias=False)),
    "a hook that only records": lambda: hooked(DiT(ModelConfig()), lambda *args: None),
}


@pytest.mark.parametrize("build", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_it_was_not_written_for_stays_as_it_is(build):
    model = build()
    assert fused(model) is model


# The library

SIZES = (16, 32, 2, 128)  # tokens, width, heads, width of the MLP: S/7


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[Path]:
    """Empty folders of the test's own for libraries, and nothing loaded or said before."""
    folders = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(library, "library_folders", lambda: folders)
    monkeypatch.setattr(fused_module, "said", set())
    block_library.cache_clear()
    yield folders
    block_library.cache_clear()


def works() -> bool:
    block_library.cache_clear()
    return block_library(*SIZES).saved_floats() == 16 * (32 * (1 + 3 + 1 + 1) + 128)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_vector_unit(capability, folders, monkeypatch):
    """Without one, the network stays as it is."""
    here = torch.backends.cpu.get_cpu_capability()
    if capability not in ("DEFAULT", here) and (here, capability) != ("AVX512", "AVX2"):
        pytest.skip(f"this processor has {here} alone")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = random_network(FAMILY["S/7"], std=0.1)
    network, inputs = fused(model), batch(model)
    assert (network is not model) == (capability != "DEFAULT")
    expected = output_and_gradients(model, model, *inputs)
    assert_same(output_and_gradients(network, model, *inputs), expected)


def test_it_is_compiled_once_and_not_run_if_another_user_could_have_changed_it(folders,
                                                                                monkeypatch):
    folders[0].touch()  # a file: the next folder takes it
    umask = os.umask(0o002)  # with which a new file may be changed by one's group
    try:
        assert works()
    finally:
        os.umask(umask)
    monkeypatch.setattr(library, "build", None)
    assert works()
    folders[1].chmod(0o777)
    with pytest.raises(OSError, match="can be changed by another user"):
        library.load(*folders[1].iterdir())


def test_without_a_compiler_one_line_says_so(folders, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        for patch_size in (4, 7):
            model = DiT(ModelConfig(depth=1, patch_size=patch_size))
            assert fused(model) is model
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
