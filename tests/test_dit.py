"""The network's facts: names, shapes, initial values, and what its output depends on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_network
from torch.utils.flop_counter import FlopCounterMode

from config import BLOCKS, FAMILY, PAPER, ModelConfig
from dit import DiT, PatchEmbed, patchify, position_table, unpatchify


def released_shapes(D, depth, tokens, patch, channels, out_channels, classes) -> dict:
    """Names and shapes in a checkpoint of the paper's release."""
    linears = {
        "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (patch**2 * out_channels, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
        "x_embedder.proj": (D, channels, patch, patch)}
    for i in range(depth):
        linears |= {f"blocks.{i}.{name}": shape for name, shape in {
            "attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D),
            "mlp.fc2": (D, 4 * D), "adaLN_modulation.1": (6 * D, D)}.items()}
    return {"pos_embed": (1, tokens, D), "y_embedder.embedding_table.weight": (classes + 1, D),
            **{f"{name}.weight": shape for name, shape in linears.items()},
            **{f"{name}.bias": shape[:1] for name, shape in linears.items()}}


def inputs(config: ModelConfig, N: int = 4):
    generator, side = torch.Generator().manual_seed(1), config.image_size
    x_t = torch.randn(N, config.in_channels, side, side, generator=generator)
    t = torch.randint(1000, (N,), generator=generator)
    return x_t, t, torch.arange(N) % (config.num_classes + 1)


def count_and_flops(config: ModelConfig) -> tuple[int, float]:
    """Trainable parameters, and multiply-adds of the forward pass for one image."""
    with torch.device("meta"):
        model = DiT(config)
        x_t = torch.empty(1, config.in_channels, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(x_t, torch.zeros(1), torch.zeros(1).long())
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


# Names, shapes, counts

@pytest.mark.parametrize(("config", "sizes"), [
    (ModelConfig(), (64, 3, 49, 4, 1, 1, 10)),
    (PAPER["DiT-XL/2"], (1152, 28, 256, 2, 4, 8, 1000))], ids=["MNIST", "XL/2"])
def test_a_checkpoint_of_the_papers_release_loads(config, sizes):
    with torch.device("meta"):
        shapes = released_shapes(*sizes)
        checkpoint = {name: torch.empty(shape) for name, shape in shapes.items()}
        DiT(config).load_state_dict(checkpoint, strict=True)


@pytest.mark.parametrize(("name", "block", "parameters", "gflops"), [
    ("S/2", "adaLN-Zero", 32_865_056, 6.06), ("B/2", "adaLN-Zero", 130_315_808, 23.01),
    ("L/2", "adaLN-Zero", 457_840_672, 80.71), ("XL/2", "adaLN-Zero", 674_834_720, 118.64),
    ("XL/2", "in-context", 449e6, 119.37), ("XL/2", "cross-attention", 598e6, 137.62),
    ("XL/2", "adaLN", 600e6, 118.56)])
def test_the_papers_networks_have_their_size_and_arithmetic(name, block, parameters, gflops):
    """DiT Table 4; the exact numbers of parameters are those of the paper's release."""
    found, flops = count_and_flops(replace(PAPER[f"DiT-{name}"], block=block))
    assert found == pytest.approx(parameters, rel=0 if block == "adaLN-Zero" else 0.001)
    assert flops / 1e9 == pytest.approx(gflops, rel=0.001)


def test_the_family_spans_the_papers_range_and_holds_the_default_network():
    flops = [count_and_flops(FAMILY[name])[1] for name in ("S/7", "XL/2")]
    assert flops == pytest.approx([0.72e6, 204e6], rel=0.002)
    assert FAMILY["B/4"] == ModelConfig() and count_and_flops(ModelConfig())[0] == 255_824


@pytest.mark.parametrize(("change", "words"), [
    ({"patch_size": 5}, "patch_size 5 does not divide image_size 28"),
    ({"num_heads": 3}, "num_heads 3 does not divide hidden_size 64"),
    ({"hidden_size": 66, "num_heads": 2}, "hidden_size must be a multiple of 4"),
    ({"depth": 0}, "depth"), ({"mlp_ratio": math.nan}, "mlp_ratio"), ({"block": "adaln"}, "block")])
def test_what_does_not_divide_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**change)


# Initial values

@pytest.mark.parametrize("block", BLOCKS)
def test_a_new_network_returns_zero_and_only_adaln_zero_blocks_are_the_identity(block):
    model = DiT(ModelConfig(block=block))
    assert torch.equal(model(*inputs(model.config, 11)), torch.zeros(11, 1, 28, 28))
    tokens, c = torch.randn(2, 49, 64), torch.randn((2, 64) if model.adaptive else (2, 2, 64))
    for layer in model.blocks:
        assert torch.equal(layer(tokens, c), tokens) == (block == "adaLN-Zero")


@pytest.mark.parametrize("block", BLOCKS)
def test_all_initial_values(block):
    """Zeros and ones are exact; a uniform fills its bound; a normal has its deviation."""
    torch.manual_seed(0)
    config = ModelConfig(block=block, label_init_std=0.5, time_init_std=0.02,
                         num_classes=1000)  # enough rows to measure
    zero = ("final_layer.linear", "final_layer.adaLN_modulation")
    for name, value in DiT(config).named_parameters():
        gates = block == "adaLN-Zero" and "adaLN_modulation" in name
        if name.endswith("bias") or name.startswith(zero) or gates:
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        elif "embedding_table" in name or name.startswith("t_embedder"):
            std = 0.02 if name.startswith("t_") else 0.5
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert value.abs().max() > 2.5 * std, name  # no uniform has such tails
        else:  # xavier-uniform; the patch convolution counts as a Linear with p * p * C inputs
            bound = math.sqrt(6 / (value.shape[0] + value[0].numel()))
            assert 0.99 * bound < value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


# Patches and positions

def test_patches_run_row_by_row_with_the_channel_last():
    images = torch.randn(2, 3, 20, 20)
    patches = patchify(images, 5)
    for row in range(4):
        for column in range(4):
            cut = images[:, :, 5 * row:5 * row + 5, 5 * column:5 * column + 5]  # (N, C, p, p)
            assert torch.equal(patches[:, 4 * row + column], cut.movedim(1, -1).flatten(1))
    assert torch.equal(unpatchify(patches, 5), images)


def test_the_strided_convolution_is_the_linear_map_of_the_patches():
    embed = PatchEmbed(patch_size=3, in_channels=2, hidden_size=8).double()
    images = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    convolved = embed.proj(images).flatten(2).transpose(1, 2)  # (N, D, H/p, W/p) -> (N, L, D)
    torch.testing.assert_close(embed(images), convolved, rtol=1e-10, atol=1e-12)


def test_position_table_against_a_loop():
    D, side = 64, 7
    expected = np.zeros((side * side, D))
    for row in range(side):
        for column in range(side):
            for half, position in ((0, column), (D // 2, row)):
                for i in range(D // 4):
                    angle = position * 10_000 ** (-i / (D / 4))
                    expected[row * side + column, half + i] = np.sin(angle)
                    expected[row * side + column, half + D // 4 + i] = np.cos(angle)
    pos_embed = DiT(ModelConfig()).pos_embed
    np.testing.assert_allclose(position_table(D, side).numpy(), expected, atol=1e-6)
    assert torch.equal(pos_embed[0], position_table(D, side)) and not pos_embed.requires_grad


# What the output depends on

@pytest.mark.parametrize("block", BLOCKS)
def test_a_patch_depends_on_its_own_images_label_time_and_pixels_alone(block, small_config):
    model = random_network(replace(small_config, block=block))
    x_t, t, y = inputs(model.config)
    corner = x_t.clone()
    corner[1, :, :3, :3] += 1
    out, second = model(x_t, t, y), torch.arange(4) == 1
    for changed in ((corner, t, y), (x_t, t.where(~second, 7), y), (x_t, t, y.where(~second, 4))):
        difference = patchify((model(*changed) - out).abs(), 3).amax(dim=2)  # (N, L)
        assert difference[second].min() > 1e-6 > difference[~second].max()


def test_labels_are_dropped_with_the_configs_probability(small_config):
    """To the null class, the row after the last label's; with numbers of the generator alone."""
    embedder, y = DiT(small_config).y_embedder, torch.arange(50_000) % 5
    kept, again = (embedder.drop(y, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(kept, again)
    assert set(kept[kept != y].tolist()) == {5} == {embedder.null_class}
    assert (kept == 5).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(embedder(torch.tensor([5])), embedder.embedding_table.weight[-1:])
    with pytest.raises(IndexError):
        embedder(torch.tensor([6]))
