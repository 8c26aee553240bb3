"""fused: the blocks in C++ are those of dit_block.py, in their results, their gradients and what they refuse."""

import copy
import ctypes
import subprocess
from functools import partial

import pytest
import torch
from torch import nn

import train
from config import ModelConfig
from diffusion import GaussianDiffusion
from dit import DiT
from runtime import fused as fused_module
from runtime.fused import FusedBlocks, block_library, fused, is_fused

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
    assert len(frozen.blocks[0].ordered()) == 24
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
    lambda model: DiT(ModelConfig(mlp_ratio=0.1)), lambda model: DiT(ModelConfig(image_size=44)),
    lambda model: DiT(ModelConfig(image_size=40, patch_size=1, hidden_size=16, depth=1)),
], ids=["float64", "bfloat16", "fused already", "heads of 2", "too wide", "MLP of 6", "121 tokens", "1600 tokens"])
def test_what_it_is_not_for_stays_as_it_is(change):
    model = change(DiT(ModelConfig(depth=1)))
    assert fused(model) is model


def test_under_autocast_the_network_stays_as_it_is():
    model = DiT(ModelConfig(depth=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(model) is model


def test_entered_under_autocast_it_goes_on_in_float32():
    """As the average does in `guided_target` when a run is in bfloat16."""
    model = random_network()
    network, inputs = fused(model), batch(model)
    with torch.no_grad():
        expected = network(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(network(*inputs), expected, atol=0.05 * expected.abs().max().item())


def test_a_run_in_bfloat16_that_learns_guidance_has_sound_targets(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: partial(model))
    cfg = train.TrainConfig(precision="bfloat16", learn_guidance=1.35)
    run = train.Run(cfg, torch.device("cpu"))
    x_0, y = torch.rand(30, 1, 28, 28), torch.arange(30) % 10
    with torch.no_grad():
        for network in (run.model, run.ema):
            network.load_state_dict(random_network().state_dict())
    _, averaged = train.compiled_networks(run, cfg, (x_0, y), (x_0, y))
    assert is_fused(averaged)
    diffusion = GaussianDiffusion(1000)
    t, eps = diffusion.draw_t_and_eps(x_0)
    with train.precision(cfg, x_0.device):
        fast, plain = (diffusion.guided_target(network, x_0, y, t, eps, 1.35, 10) for network in (averaged, run.ema))
    assert torch.allclose(fast, plain, atol=0.05 * plain.abs().max().item())


@pytest.mark.parametrize("N", [0, 1, 2])
def test_few_images_and_many_threads(N):
    model = random_network()
    inputs = batch(model, N)
    try:
        torch.set_num_threads(5)
        fast = output_and_gradients(fused(model), model, *inputs)
    finally:
        torch.set_num_threads(1)
    plain = output_and_gradients(model, model, *inputs)
    assert torch.allclose(fast["out"], plain["out"], rtol=1e-4, atol=1e-5)
    if N:
        assert torch.allclose(fast["x_t"], plain["x_t"], rtol=1e-4, atol=1e-7)


def test_views_and_a_second_backward_pass():
    model = random_network()
    network, (x_t, t, y) = fused(model), batch(model, 6)
    model.zero_grad()
    out = network(x_t.repeat(2, 1, 1, 1)[::2], t, y)
    assert torch.allclose(out, model(x_t.repeat(2, 1, 1, 1)[::2], t, y), rtol=1e-4, atol=1e-5)
    gradient = torch.randn_like(out).transpose(2, 3)  # not contiguous
    once = torch.autograd.grad(out, model.blocks[0].attn.qkv.weight, gradient, retain_graph=True)[0]
    again = torch.autograd.grad(out, model.blocks[0].attn.qkv.weight, 2 * gradient)[0]
    assert torch.allclose(again, 2 * once)


def test_what_would_be_read_past_its_end_is_refused():
    model = random_network()
    network, (x_t, t, y) = fused(model), batch(model)
    with pytest.raises(ValueError, match="5 images cannot be conditioned on 1 "):
        network(x_t, t[:1], y[:1])
    with pytest.raises(TypeError, match=r"contiguous float32 on a CPU, not torch\.float64 on cpu"):
        fused_module.arguments(x_t.double())


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_every_vector_unit(capability, fresh_cache, monkeypatch):
    here = torch.backends.cpu.get_cpu_capability()
    if here != capability and (here, capability) != ("AVX512", "AVX2"):
        pytest.skip(f"this processor has {here} alone")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = random_network(depth=1)
    inputs = batch(model)
    assert is_fused(fused(model))
    assert torch.allclose(fused(model)(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_without_vector_units_the_network_stays_as_it_is(fresh_cache, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    model = DiT(ModelConfig(depth=1))
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
    monkeypatch.setattr(subprocess, "run", None)
    assert fused(model) is model, "that it failed is not tried again"


def test_a_compiler_of_two_words(fresh_cache, monkeypatch):
    monkeypatch.setenv("CXX", "env c++")
    assert is_fused(fused(DiT(ModelConfig(depth=1))))


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
