"""The network's facts: names, shapes, initial values, and what its output depends on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from config import BLOCKS, FAMILY, PAPER, ModelConfig
from dit import DiT, PatchEmbed, patchify, position_table, unpatchify


def reference_table(D: int, depth: int, tokens: int, patch: int, channels: int, out_channels: int, classes: int) -> dict:
    """Names and shapes in a checkpoint of the paper's release."""
    linears = {"t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D), "final_layer.linear": (patch**2 * out_channels, D),
               "final_layer.adaLN_modulation.1": (2 * D, D), "x_embedder.proj": (D, channels, patch, patch)}
    for i in range(depth):
        linears |= {f"blocks.{i}.attn.qkv": (3 * D, D), f"blocks.{i}.attn.proj": (D, D), f"blocks.{i}.mlp.fc1": (4 * D, D),
                    f"blocks.{i}.mlp.fc2": (D, 4 * D), f"blocks.{i}.adaLN_modulation.1": (6 * D, D)}
    return {"pos_embed": (1, tokens, D), "y_embedder.embedding_table.weight": (classes + 1, D),
            **{f"{name}.weight": shape for name, shape in linears.items()},
            **{f"{name}.bias": shape[:1] for name, shape in linears.items()}}


def inputs(config: ModelConfig, N: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, config.in_channels, config.image_size, config.image_size, generator=generator)
    t = torch.randint(1000, (N,), generator=generator)
    y = torch.arange(N) % (config.num_classes + 1)
    return x, t, y


def random_values(model: DiT) -> DiT:
    """Every parameter is random, so that gates, shifts and the final layer all count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def count_and_flops(config: ModelConfig) -> tuple[int, float]:
    """Trainable parameters, and multiply-adds of the forward pass for one image."""
    with torch.device("meta"):
        model = DiT(config)
        x_t, t, y = torch.empty(1, config.in_channels, *2 * [config.image_size]), torch.zeros(1), torch.zeros(1).long()
        with FlopCounterMode(display=False) as counter:
            model(x_t, t, y)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


# Names, shapes, counts

@pytest.mark.parametrize(("config", "sizes"), [
    (ModelConfig(), (64, 3, 49, 4, 1, 1, 10)), (PAPER["DiT-XL/2"], (1152, 28, 256, 2, 4, 8, 1000))], ids=["MNIST", "XL/2"])
def test_a_checkpoint_of_the_papers_release_loads(config, sizes):
    with torch.device("meta"):
        model = DiT(config)
        checkpoint = {name: torch.empty(shape) for name, shape in reference_table(*sizes).items()}
    model.load_state_dict(checkpoint, strict=True)
    assert [name for name, _ in model.named_buffers()] == ["pos_embed"]


def test_the_default_networks_size():
    model = DiT(ModelConfig())
    assert (sum(p.numel() for p in model.parameters()), model.pos_embed.numel()) == (255_824, 3_136)


PAPER_COUNTS = {
    "S/8": 33_142_016, "S/4": 32_920_448, "S/2": 32_865_056, "B/8": 130_869_248, "B/4": 130_426_496, "B/2": 130_315_808,
    "L/8": 458_578_432, "L/4": 457_988_224, "L/2": 457_840_672, "XL/8": 675_664_640, "XL/4": 675_000_704,
    "XL/2": 674_834_720,
}


GFLOPS = {"S/2": 6.06, "B/2": 23.01, "L/2": 80.71, "XL/2": 118.64}  # DiT Table 4: multiply-adds


@pytest.mark.parametrize("name", PAPER_COUNTS)
def test_the_papers_models_have_their_size_and_arithmetic(name):
    parameters, flops = count_and_flops(PAPER[f"DiT-{name}"])
    assert parameters == PAPER_COUNTS[name]
    assert flops / 1e9 == pytest.approx(GFLOPS.get(name, flops / 1e9), rel=0.002)


@pytest.mark.parametrize(("block", "gflops", "millions"), [
    ("in-context", 119.37, 449), ("cross-attention", 137.62, 598), ("adaLN", 118.56, 600), ("adaLN-Zero", 118.64, 675)])
def test_the_four_designs_have_the_papers_size_and_arithmetic(block, gflops, millions):
    """DiT Table 4, XL/2."""
    parameters, flops = count_and_flops(replace(PAPER["DiT-XL/2"], block=block))
    assert (parameters / 1e6, flops / 1e9) == pytest.approx((millions, gflops), rel=0.001)


def test_the_family_spans_the_papers_range_and_holds_the_default_network():
    flops = {name: count_and_flops(config)[1] for name, config in FAMILY.items()}
    least, most = min(flops, key=flops.get), max(flops, key=flops.get)
    assert (least, most, len(flops)) == ("S/7", "XL/2", 12)
    assert (flops[least], flops[most]) == pytest.approx((0.72e6, 204e6), rel=0.002)
    assert FAMILY["B/4"] == ModelConfig()


# Sizes

@pytest.mark.parametrize(("change", "words"), [
    ({"patch_size": 5}, "patch_size 5 does not divide image_size 28"),
    ({"num_heads": 3}, "num_heads 3 does not divide hidden_size 64"),
    ({"hidden_size": 66, "num_heads": 2}, "hidden_size 66 is not a multiple of 4"),
    ({"depth": 0}, "depth"), ({"patch_size": 0}, "patch_size"), ({"class_dropout_prob": 1.5}, "class_dropout_prob"),
    ({"mlp_ratio": math.nan}, "mlp_ratio"), ({"label_init_std": -1.0}, "label_init_std"), ({"block": "adaln"}, "block"),
])
def test_what_does_not_divide_is_refused_with_a_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**change)


@pytest.mark.parametrize("change", [
    {}, {"image_size": 32, "patch_size": 2, "in_channels": 3}, {"image_size": 9, "patch_size": 9, "num_classes": 1},
    {"image_size": 6, "patch_size": 1, "learn_sigma": True}, {"hidden_size": 12, "num_heads": 3, "mlp_ratio": 0.5},
])
@pytest.mark.parametrize("block", BLOCKS)
def test_any_size_that_divides_works(block, change):
    config = ModelConfig(block=block, **change)
    x, t, y = inputs(config, 2)
    out = DiT(config)(x, t, y)
    assert out.shape == (2, config.in_channels * (2 if config.learn_sigma else 1), config.image_size, config.image_size)


# Initial values

@pytest.mark.parametrize("block", BLOCKS)
def test_a_new_network_returns_exactly_zero_and_only_adaln_zero_blocks_are_the_identity(block):
    model = DiT(ModelConfig(block=block))
    for t in (0, 1, 500, 999):
        x, _, y = inputs(model.config, 11)
        assert torch.equal(model(x, torch.full((11,), t), y), torch.zeros(11, 1, 28, 28))
    tokens, c = torch.randn(2, 49, 64), torch.randn(2, 64) if model.adaptive else torch.randn(2, 2, 64)
    for layer in model.blocks:
        assert torch.equal(layer(tokens, c), tokens) == (block == "adaLN-Zero")


def test_after_one_step_the_network_is_not_zero_and_after_two_no_block_is_the_identity():
    torch.manual_seed(0)
    model = DiT(ModelConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, t, y = inputs(model.config)
    tokens, c = torch.randn(2, 49, 64), torch.randn(2, 64)
    # The first step moves the final layer alone, which was in the gates' way; the second reaches the gates.
    for step in (1, 2):
        optimizer.zero_grad()
        F.l1_loss(model(x, t, y), torch.randn(x.shape)).backward()
        optimizer.step()
        assert model(x, t, y).abs().max() > 0
        assert all(torch.equal(block(tokens, c), tokens) == (step == 1) for block in model.blocks)


@pytest.mark.parametrize("block", BLOCKS)
def test_all_initial_values(block):
    """Zeros and ones are exact; a uniform fills its bound; a normal has its deviation."""
    torch.manual_seed(0)
    config = ModelConfig(block=block, label_init_std=0.5, time_init_std=0.02, num_classes=1000)  # enough rows to measure
    zero = ("final_layer.linear", "final_layer.adaLN_modulation")
    for name, value in DiT(config).named_parameters():
        if name.endswith("bias") or name.startswith(zero) or (block == "adaLN-Zero" and "adaLN_modulation" in name):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        elif "embedding_table" in name or name.startswith("t_embedder"):
            std = config.time_init_std if name.startswith("t_") else config.label_init_std
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert value.abs().max() > 2.5 * std, name  # no uniform has such tails
        else:  # xavier-uniform; the patch convolution counts as a Linear with p * p * C inputs
            bound = math.sqrt(6 / (value.shape[0] + value[0].numel()))
            assert value.abs().max() <= bound and value.abs().max() > 0.99 * bound, name
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


# Patches and positions

def test_unpatchify_inverts_patchify():
    images = torch.randn(2, 3, 20, 20)  # random, so neither symmetric nor the same in two channels
    patches = patchify(images, 5)
    assert patches.shape == (2, 16, 75)
    assert torch.equal(unpatchify(patches, 5), images)
    assert torch.equal(patchify(unpatchify(patches, 5), 5), patches)


def test_patches_run_row_by_row_with_the_channel_last():
    images = torch.randn(1, 2, 6, 6)
    patches = patchify(images, 3)
    for row in range(2):
        for column in range(2):
            cut = images[0, :, 3 * row:3 * row + 3, 3 * column:3 * column + 3]  # (C, p, p)
            expected = [cut[c, i, j].item() for i in range(3) for j in range(3) for c in range(2)]
            assert patches[0, 2 * row + column].tolist() == expected


def test_the_strided_convolution_is_the_linear_map_of_the_patches():
    torch.manual_seed(0)
    embed = PatchEmbed(patch_size=3, in_channels=2, hidden_size=8).double()
    images = torch.randn(2, 2, 12, 12, dtype=torch.float64)
    convolved = embed.proj(images).flatten(2).transpose(1, 2)  # (N, D, H/p, W/p) -> (N, L, D)
    torch.testing.assert_close(embed(images), convolved, rtol=1e-10, atol=1e-12)


def test_position_table_against_a_loop():
    D, side = 24, 5
    expected = np.zeros((side * side, D))
    for row in range(side):
        for column in range(side):
            for half, position in ((0, column), (D // 2, row)):
                for i in range(D // 4):
                    omega = 10_000 ** (-i / (D / 4))
                    expected[row * side + column, half + i] = np.sin(position * omega)
                    expected[row * side + column, half + D // 4 + i] = np.cos(position * omega)
    np.testing.assert_allclose(position_table(D, side).numpy(), expected, atol=1e-6)


def test_the_network_holds_that_table_and_does_not_train_it():
    model = DiT(ModelConfig())
    assert torch.equal(model.pos_embed[0], position_table(64, 7)) and not model.pos_embed.requires_grad


# What the output depends on

@pytest.mark.parametrize("block", BLOCKS)
def test_label_and_time_change_the_output(block, small_config):
    model = random_values(DiT(replace(small_config, block=block)))
    x, t, y = inputs(model.config)
    out = model(x, t, y)
    assert (model(x, t, (y + 1) % 5) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (model(x, (t + 1) % 1000, y) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-5


def test_permuting_the_batch_permutes_the_output(open_network):
    x, t, y = inputs(open_network.config)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(open_network(x[order], t[order], y[order]), open_network(x, t, y)[order])


def test_every_patch_sees_every_other(open_network):
    x, t, y = inputs(open_network.config)
    changed = x.clone()
    changed[:, :, :3, :3] += 1
    difference = patchify((open_network(changed, t, y) - open_network(x, t, y)), 3).abs().amax(dim=2)
    assert difference.min() > 0


def test_labels_are_dropped_with_the_configs_probability(open_network):
    torch.manual_seed(0)
    embedder = open_network.y_embedder
    y = torch.arange(50_000) % 5
    kept = embedder.drop(y)
    assert embedder.null_class == open_network.config.num_classes == 5
    assert set(kept[kept != y].tolist()) == {5}
    assert (kept == 5).float().mean().item() == pytest.approx(open_network.config.class_dropout_prob, abs=0.01)
    embedder.dropout_prob = 0.0
    assert torch.equal(embedder.drop(y), y)


def test_dropped_labels_come_from_the_generator_alone(open_network):
    y = torch.arange(1000) % 5
    before = torch.get_rng_state()
    drawn = [open_network.y_embedder.drop(y, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_null_class_has_the_row_after_the_last_label(open_network):
    embedder = open_network.y_embedder
    assert torch.equal(embedder(torch.tensor([5])), embedder.embedding_table.weight[-1:])


def test_a_label_that_is_none_is_refused(open_network):
    x, t, _ = inputs(open_network.config)
    with pytest.raises(IndexError):
        open_network(x, t, torch.full((4,), 6))
