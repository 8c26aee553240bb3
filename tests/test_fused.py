"""fused: the blocks in C++ are those of dit_block.py, in their results, their gradients and what they refuse."""

import copy
import ctypes
import subprocess

import pytest
import torch
from torch import nn

import fused as fused_module
from config import ModelConfig
from dit import DiT
from fused import FusedBlocks, block_library, fused, is_fused

SHAPES = {
    "the recipe's": {},
    "heads of 8": {"hidden_size": 32},
    "heads of 4": {"hidden_size": 16},
    "heads of 32": {"num_heads": 2},
    "a wide one": {"hidden_size": 128, "depth": 1},
    "many tokens": {"patch_size": 2, "depth": 1},
    "few tokens": {"patch_size": 14},
    "25 tokens": {"image_size": 30, "patch_size": 6},
    "a narrow MLP": {"mlp_ratio": 0.5},
}


def random_network(**sizes) -> DiT:
    torch.manual_seed(0)
    model = DiT(ModelConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def batch(model: DiT, N: int = 5) -> tuple[torch.Tensor, ...]:
    config = model.config
    x_t = torch.randn(N, config.in_channels, config.image_size, config.image_size)
    return x_t, torch.randint(1000, (N,)), torch.randint(config.num_classes + 1, (N,))


def output_and_gradients(network: nn.Module, model: DiT, x_t, t, y) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x_t = x_t.clone().requires_grad_()
    out = network(x_t, t, y)
    (out**2).mean().backward()
    return {"out": out.detach(), "x_t": x_t.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_the_blocks(sizes):
    model = random_network(**sizes)
    network = fused(model)
    assert is_fused(network) and not is_fused(model)
    inputs = batch(model)
    plain = {name: value.clone() for name, value in output_and_gradients(model, model, *inputs).items()}
    fast = output_and_gradients(network, model, *inputs)
    for name, value in plain.items():
        assert torch.allclose(fast[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item()), name


def test_its_rounding_errors_are_as_small_as_torchs():
    model = random_network()
    block, library = model.blocks[:1], block_library(49, 64, 4, 256)
    x, c = torch.randn(20, 49, 64), torch.randn(20, 64)
    exact = copy.deepcopy(block[0]).double()(x.double(), c.double())
    with torch.no_grad():
        ours = (FusedBlocks(block, library, frozen=False)(x, c) - exact).abs()
        torchs = (block[0](x, c) - exact).abs()
    assert ours.mean() < 1.5 * torchs.mean() and ours.max() < 3 * torchs.max(), (ours.max(), torchs.max())


def test_far_out_values():
    """Beyond the range of exp: scores and hidden values of many thousands, of both signs."""
    model = random_network(depth=1)
    with torch.no_grad():
        for layer in (model.blocks[0].attn.qkv, model.blocks[0].mlp.fc1):
            layer.weight.mul_(1000)
    inputs = batch(model)
    plain = {name: value.clone() for name, value in output_and_gradients(model, model, *inputs).items()}
    fast = output_and_gradients(fused(model), model, *inputs)
    for name in ("out", "x_t", "blocks.0.mlp.fc2.weight", "blocks.0.attn.proj.weight"):
        assert torch.isfinite(fast[name]).all(), name
        assert torch.allclose(fast[name], plain[name], rtol=1e-3, atol=1e-3 * plain[name].abs().max().item()), name


@pytest.mark.parametrize("place", ["blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "blocks.2.adaLN_modulation.1.bias"])
def test_a_nan_is_not_lost(place):
    model = random_network()
    with torch.no_grad():
        model.get_parameter(place).view(-1)[3] = torch.nan
    found = output_and_gradients(fused(model), model, *batch(model))
    assert found["out"].isnan().any() and found["x_t"].isnan().any()


def test_a_new_network_predicts_exactly_zero():
    model = DiT(ModelConfig())
    x, c = torch.randn(3, 49, 64), torch.randn(3, 64)
    network = fused(model)
    assert torch.equal(network.blocks[0](x, c), x)
    assert not network(*batch(model)).any()


def test_it_follows_the_parameters_and_frozen_ones_are_packed_once():
    model = random_network()
    network, frozen = fused(model), fused(model, frozen=True)
    inputs = batch(model)
    with torch.no_grad():
        before = network(*inputs)
        assert torch.equal(frozen(*inputs), before)
        model.blocks[1].mlp.fc1.weight.mul_(2)
        assert torch.allclose(network(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
        assert torch.equal(frozen(*inputs), before)
    assert not torch.allclose(network(*inputs), before)


def test_every_number_of_threads_gives_the_same():
    model = random_network()
    network, inputs = fused(model), batch(model, N=7)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append({name: value.clone() for name, value in output_and_gradients(network, model, *inputs).items()})
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.allclose(other[name], value, rtol=1e-4, atol=1e-6 * value.abs().max().item()), name
    with torch.no_grad():
        assert torch.equal(network(*inputs), found[0]["out"])


def test_memory_is_kept_only_where_gradients_are_wanted(monkeypatch):
    calls = []
    arguments = fused_module.arguments
    monkeypatch.setattr(fused_module, "arguments", lambda *values: calls.append(values) or arguments(*values))
    model = random_network()
    network, inputs = fused(model), batch(model)
    for enabled in (True, False):
        calls.clear()
        with torch.set_grad_enabled(enabled):
            network(*inputs)
        saved = next(values[-1] for values in calls if len(values) == 8)  # of blocks_forward
        assert (saved is not None) == enabled


@pytest.mark.parametrize("change", [
    lambda model: model.double(), lambda model: model.bfloat16(), fused,
    lambda model: DiT(ModelConfig(hidden_size=8)), lambda model: DiT(ModelConfig(hidden_size=264, depth=1)),
    lambda model: DiT(ModelConfig(mlp_ratio=0.1)),
], ids=["float64", "bfloat16", "fused already", "heads of 2", "too wide", "MLP of 6"])
def test_what_it_is_not_for_stays_as_it_is(change):
    model = change(DiT(ModelConfig(depth=1)))
    assert fused(model) is model


def test_under_autocast_the_network_stays_as_it_is():
    model = DiT(ModelConfig(depth=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(model) is model


@pytest.fixture
def fresh_cache():
    block_library.cache_clear()
    yield
    block_library.cache_clear()


@pytest.mark.parametrize("compiler", ["/there/is/none", "false"])
def test_without_a_compiler_the_network_stays_as_it_is(compiler, fresh_cache, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    model = DiT(ModelConfig(depth=1))
    assert fused(model) is model


def test_it_is_compiled_once(fresh_cache, monkeypatch):
    first = block_library(49, 64, 4, 256)
    block_library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert isinstance(block_library(49, 64, 4, 256), ctypes.CDLL)
    assert block_library(49, 64, 4, 256).saved_floats() == first.saved_floats() == 49 * (64 * (1 + 3 + 1 + 1) + 256)


def test_where_nothing_can_be_written_the_network_stays_as_it_is(fresh_cache, monkeypatch):
    def refuse(path, write):
        raise OSError("read-only")

    monkeypatch.setattr(fused_module, "write_atomically", refuse)
    model = DiT(ModelConfig(hidden_size=48, depth=1))
    assert fused(model) is model
