"""fused: the blocks in C++ are those of dit_block.py, in their results and their gradients; nothing else is replaced."""

import ctypes
import logging
import subprocess
import threading
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_network
from torch import nn

from config import FAMILY, ModelConfig
from dit import DiT
from dit_block import AdaLNBlock, DiTBlock
from runtime import fused as fused_module
from runtime.fused import fused, library
from runtime.fused.library import block_library

SHAPES = FAMILY | {
    "heads of 8": ModelConfig(hidden_size=32),
    "heads of 4": ModelConfig(hidden_size=16),
    "heads of 32": ModelConfig(hidden_size=128, depth=1),
    "25 tokens": ModelConfig(image_size=30, patch_size=6),
    "a narrow MLP": ModelConfig(mlp_ratio=0.5),
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
    return {"out": out.detach(), "x_t": x_t.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5):
    """Within `tolerance` of the largest value of each tensor."""
    for name, value in expected.items():
        if value.numel():
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("block", ["adaLN", "adaLN-Zero"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_blocks(shape, block):
    model = random_network(replace(SHAPES[shape], block=block), std=0.1)
    before = torch.get_rng_state()
    network = fused(model)
    assert torch.equal(torch.get_rng_state(), before) and network is not model
    inputs = batch(model, 3)
    assert_same(output_and_gradients(network, model, *inputs), output_and_gradients(model, model, *inputs))


@pytest.mark.parametrize("N", [0, 1, 2, 7])
def test_every_number_of_images_and_threads_gives_the_same(N):
    model = network_of()
    network, inputs = fused(model), batch(model, N)
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
    plain, fast = output_and_gradients(model, model, *inputs), output_and_gradients(fused(model), model, *inputs)
    names = ("out", "x_t", "blocks.0.mlp.fc2.weight", "blocks.0.attn.proj.weight")
    assert_same(fast, {name: plain[name] for name in names}, tolerance=2e-3)


@pytest.mark.parametrize("place", ["attn.qkv.weight", "mlp.fc1.bias", "adaLN_modulation.1.bias"])
def test_a_nan_is_not_lost(place):
    model = network_of()
    with torch.no_grad():
        model.get_parameter(f"blocks.1.{place}").view(-1)[3] = torch.nan
    found = output_and_gradients(fused(model), model, *batch(model))
    assert found["out"].isnan().any() and found["x_t"].isnan().any()


@pytest.mark.parametrize("block", ["adaLN", "adaLN-Zero"])
def test_it_follows_the_parameters_except_when_frozen(block):
    model = network_of(block=block)
    network, frozen, inputs = fused(model), fused(model, frozen=True), batch(model)
    with torch.no_grad():
        before = network(*inputs)
        assert torch.equal(frozen(*inputs), before)
        for layer in (model.blocks[1].mlp.fc1, model.blocks[0].adaLN_modulation[1]):
            layer.weight.mul_(2)
        assert_same({"": network(*inputs)}, {"": model(*inputs)})
        assert torch.equal(frozen(*inputs), before) and not torch.allclose(network(*inputs), before)


def test_views_and_a_second_backward_pass():
    model = network_of()
    x, gradient = torch.randn(2, 6, 64, 49).transpose(2, 3)  # (N, L, D); neither is contiguous
    c, weight, outs = torch.randn(6, 64), model.blocks[0].attn.qkv.weight, []
    for network in (fused(model), model):
        outs.append(x)
        for block in network.blocks:
            outs[-1] = block(outs[-1], c)
    for factor in (1, 2):
        found, expected = (torch.autograd.grad(out, weight, factor * gradient, retain_graph=True)[0] for out in outs)
        assert_same({"": found}, {"": expected})


def test_what_would_be_read_past_its_end_is_refused():
    model = network_of()
    network, (x_t, t, y) = fused(model), batch(model)
    with pytest.raises(ValueError, match=r"\(5, 49, 64\) tokens cannot be conditioned on \(1, 64\)"):
        network(x_t, t[:1], y[:1])
    with pytest.raises(TypeError, match=r"contiguous float32 on a CPU, not torch\.float64 on cpu"):
        fused_module.arguments(x_t.double())


# What it replaces, and what it leaves alone

def edited(part: str, replacement) -> DiT:
    """The default network with another part in its second block; the block itself is ""."""
    model = DiT(ModelConfig(depth=2))
    owner, _, name = f"blocks.1.{part}".rstrip(".").rpartition(".")
    setattr(model.get_submodule(owner), name, replacement)
    return model


def wrapped() -> DiT:
    model = DiT(ModelConfig())
    forward = model.blocks[1].forward
    model.blocks[1].forward = lambda x, c: 2 * forward(x, c)
    return model


def hooked(place: str, listen: str) -> DiT:
    """A hook that changes nothing, as one that records attention."""
    model = DiT(ModelConfig())
    getattr(model.get_submodule(place), listen)(lambda *args: None)
    return model


def hooked_parameter() -> DiT:
    model = DiT(ModelConfig())
    model.blocks[0].mlp.fc1.weight.register_hook(lambda gradient: None)
    return model


LEFT_ALONE = {
    "in-context": lambda: DiT(ModelConfig(block="in-context")),
    "cross-attention": lambda: DiT(ModelConfig(block="cross-attention")),
    "heads of 2": lambda: DiT(ModelConfig(hidden_size=8)),
    "too wide": lambda: DiT(ModelConfig(hidden_size=264, depth=1)),
    "an MLP of 6": lambda: DiT(ModelConfig(mlp_ratio=0.1)),
    "1600 tokens": lambda: DiT(ModelConfig(image_size=40, patch_size=1, hidden_size=16, depth=1)),
    "float64": lambda: DiT(ModelConfig()).double(),
    "fused already": lambda: fused(DiT(ModelConfig())),
    "a subclass of DiTBlock": lambda: edited("", type("Other", (DiTBlock,), {"forward": lambda self, x, c: x})(64, 4, 4.0)),
    "adaLN among adaLN-Zero": lambda: edited("", AdaLNBlock(64, 4, 4.0)),
    "other heads": lambda: edited("", DiTBlock(64, 2, 4.0)),
    "another GELU": lambda: edited("mlp.act", nn.GELU()),
    "no bias": lambda: edited("attn.proj", nn.Linear(64, 64, bias=False)),
    "a wrapped forward": wrapped,
    "a hook": lambda: hooked("blocks.1.attn", "register_forward_hook"),
    "a hook before": lambda: hooked("blocks.1.attn.qkv", "register_forward_pre_hook"),
    "a hook of gradients": lambda: hooked("", "register_full_backward_hook"),
    "a hook of a parameter": hooked_parameter,
}


@pytest.mark.parametrize("build", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_it_was_not_written_for_stays_as_it_is(build):
    model = build()
    before = torch.get_rng_state()
    assert fused(model) is model and torch.equal(torch.get_rng_state(), before)


def test_a_subclass_keeps_its_own_forward():
    class OtherDiT(DiT):
        def forward(self, x_t, t, y):
            return -super().forward(x_t, t, y)

    model = OtherDiT(ModelConfig())
    model.load_state_dict(network_of().state_dict())
    inputs = batch(model)
    assert fused(model) is not model
    assert_same({"": fused(model)(*inputs)}, {"": model(*inputs)})
    assert_same({"": fused(model)(*inputs)}, {"": -network_of()(*inputs)})


def test_a_hook_of_all_modules_leaves_the_plain_network():
    model = DiT(ModelConfig())
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert fused(model) is model
    finally:
        handle.remove()
    assert fused(model) is not model


def test_it_works_in_any_mode_and_at_any_default():
    model = network_of()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert fused(model, frozen=True) is not model
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_trial_takes_no_random_numbers_from_another_thread():
    """While one thread prepares networks, what another one generates is what it would have been."""
    torch.manual_seed(0)
    expected = torch.stack([torch.rand(()) for _ in range(3000)])
    torch.manual_seed(0)
    model, stop = network_of(depth=1), threading.Event()
    torch.manual_seed(0)

    def prepare() -> None:
        while not stop.is_set():
            fused(model)

    thread = threading.Thread(target=prepare)
    thread.start()
    found = torch.stack([torch.rand(()) for _ in range(3000)])
    stop.set()
    thread.join()
    assert torch.equal(found, expected)


# The library

@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[Path]:
    """Empty folders of the test's own for libraries, and nothing loaded or said before."""
    folders = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(library, "library_folders", lambda: folders)
    monkeypatch.setattr(fused_module, "said", set())
    block_library.cache_clear()
    yield folders
    block_library.cache_clear()


SIZES = (49, 64, 4, 256)  # tokens, width, heads, width of the MLP


def works(loaded: ctypes.CDLL) -> bool:
    return loaded.saved_floats() == 49 * (64 * (1 + 3 + 1 + 1) + 256)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_vector_unit(capability, folders, monkeypatch):
    """It is as exact as the others, and faster than the plain network. Without one, the network stays as it is."""
    here = torch.backends.cpu.get_cpu_capability()
    if capability != "DEFAULT" and here != capability and (here, capability) != ("AVX512", "AVX2"):
        pytest.skip(f"this processor has {here} alone")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = network_of()
    network, inputs = fused(model), batch(model, 32)
    assert (network is not model) == (capability != "DEFAULT")
    assert_same(output_and_gradients(network, model, *inputs), output_and_gradients(model, model, *inputs))
    if network is not model:
        fast, plain = (min(timeit.repeat(lambda of=of: output_and_gradients(of, model, *inputs), number=1, repeat=7))
                       for of in (network, model))
        assert fast < (0.9 if capability == here else 1) * plain  # the plain network has the best vectors in any case


@pytest.mark.parametrize("blocked", [0, 1, 2])
def test_it_is_compiled_once_and_kept_in_the_first_folder_that_takes_it(blocked, folders, tmp_path, monkeypatch):
    """Where none does, it works for this process. A compiler's name may have two words."""
    monkeypatch.setenv("CXX", "env c++")
    for folder in folders[:blocked]:
        folder.touch()
    assert works(block_library(*SIZES))
    assert [path.parent for path in tmp_path.glob("*/*")] == folders[blocked:blocked + 1]
    block_library.cache_clear()
    monkeypatch.setattr(subprocess, "run", None if blocked < 2 else subprocess.run)
    assert works(block_library(*SIZES))


def test_an_unfit_library_is_built_again_before_it_is_loaded(folders):
    block_library(16, *SIZES[1:])
    other, = folders[0].iterdir()
    block_library(*SIZES)
    path, = set(folders[0].iterdir()) - {other}
    content = path.read_bytes()
    for damaged in (content[:len(content) // 2], other.read_bytes()):
        path.unlink()  # this process still uses the sound one
        path.write_bytes(damaged)
        block_library.cache_clear()
        assert works(block_library(*SIZES)) and path.read_bytes() != damaged


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_library_that_others_can_change_is_not_run(folders, mode):
    """Neither its file nor its folder may be writable for them; another folder takes its place."""
    block_library(*SIZES)
    path, = folders[0].iterdir()
    for place, safe in ((path, 0o600), (folders[0], 0o700)):
        place.chmod(mode)
        with pytest.raises(OSError, match="can be changed by another user"):
            library.load(path)
        place.chmod(safe)
    assert works(library.load(path))
    folders[0].chmod(mode)
    block_library.cache_clear()
    assert works(block_library(*SIZES)) and list(folders[1].iterdir())


@pytest.mark.parametrize("compiler", ["/there/is/none", "false", "true", "c++ 'x", "c++ -c"])
def test_without_a_compiler_the_network_stays_as_it_is_and_one_line_says_so(compiler, folders, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        for model in 2 * (DiT(ModelConfig(depth=1)), DiT(ModelConfig(depth=1, patch_size=7))):
            assert fused(model) is model
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
