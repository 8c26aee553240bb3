"""The network's facts: names, shapes, initial values, and what its output depends on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from config import PAPER, ModelConfig
from dit import DiT, PatchEmbed, patchify, position_table, unpatchify

MNIST_TABLE = {
    "pos_embed": (1, 49, 64),
    "x_embedder.proj.weight": (64, 1, 4, 4), "x_embedder.proj.bias": (64,),
    "t_embedder.mlp.0.weight": (64, 256), "t_embedder.mlp.0.bias": (64,),
    "t_embedder.mlp.2.weight": (64, 64), "t_embedder.mlp.2.bias": (64,),
    "y_embedder.embedding_table.weight": (11, 64),
    **{f"blocks.{i}.{name}": shape for i in range(3) for name, shape in {
        "attn.qkv.weight": (192, 64), "attn.qkv.bias": (192,),
        "attn.proj.weight": (64, 64), "attn.proj.bias": (64,),
        "mlp.fc1.weight": (256, 64), "mlp.fc1.bias": (256,),
        "mlp.fc2.weight": (64, 256), "mlp.fc2.bias": (64,),
        "adaLN_modulation.1.weight": (384, 64), "adaLN_modulation.1.bias": (384,),
    }.items()},
    "final_layer.linear.weight": (16, 64), "final_layer.linear.bias": (16,),
    "final_layer.adaLN_modulation.1.weight": (128, 64), "final_layer.adaLN_modulation.1.bias": (128,),
}


def inputs(config: ModelConfig, N: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, config.in_channels, config.image_size, config.image_size, generator=generator)
    t = torch.randint(1000, (N,), generator=generator)
    y = torch.arange(N) % (config.num_classes + 1)
    return x, t, y


# Names, shapes, counts

def test_parameter_count():
    assert sum(p.numel() for p in DiT(ModelConfig()).parameters()) == 255_824


def test_names_and_shapes_are_the_reference_implementations():
    model = DiT(ModelConfig())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == MNIST_TABLE
    assert {name for name, _ in model.named_buffers()} == {"pos_embed"}
    assert model.pos_embed.numel() == 3_136


PAPER_COUNTS = {
    "S/8": 33_142_016, "S/4": 32_920_448, "S/2": 32_865_056, "B/8": 130_869_248, "B/4": 130_426_496, "B/2": 130_315_808,
    "L/8": 458_578_432, "L/4": 457_988_224, "L/2": 457_840_672, "XL/8": 675_664_640, "XL/4": 675_000_704,
    "XL/2": 674_834_720,
}


@pytest.mark.parametrize("name", PAPER_COUNTS)
def test_the_papers_models_have_their_parameter_counts(name):
    with torch.device("meta"):
        model = DiT(PAPER[f"DiT-{name}"])
    assert sum(p.numel() for p in model.parameters()) == PAPER_COUNTS[name]
    assert len(PAPER) == len(PAPER_COUNTS)


@pytest.mark.parametrize(("name", "gflops"), [("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.71), ("XL/2", 118.64)])
def test_the_papers_models_have_their_arithmetic(name, gflops):
    """DiT Table 4, "Gflops": multiply-adds of the forward pass for one latent."""
    with torch.device("meta"):
        model = DiT(PAPER[f"DiT-{name}"])
        batch = torch.empty(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(*batch)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.01)


def test_names_and_shapes_at_xl_2_are_those_of_the_papers_checkpoint():
    D, table = 1152, {
        "pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256), "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152), "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152), "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    for i in range(28):
        for name, rows, columns in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D),
                                    ("mlp.fc2", D, 4 * D), ("adaLN_modulation.1", 6 * D, D)):
            table |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    with torch.device("meta"):
        model = DiT(PAPER["DiT-XL/2"])
        checkpoint = {name: torch.empty(shape) for name, shape in table.items()}
    model.load_state_dict(checkpoint, strict=True, assign=True)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == table


# Sizes

@pytest.mark.parametrize(("change", "words"), [
    ({"patch_size": 5}, "patch_size 5 does not divide image_size 28"),
    ({"num_heads": 3}, "num_heads 3 does not divide hidden_size 64"),
    ({"hidden_size": 66, "num_heads": 2}, "hidden_size 66 is not a multiple of 4"),
    ({"depth": 0}, r"depth must lie in \[1, 1000\], not 0"),
    ({"patch_size": 0}, "patch_size must lie in"),
    ({"class_dropout_prob": 1.5}, r"class_dropout_prob must lie in \[0, 1\]"),
    ({"mlp_ratio": math.nan}, "mlp_ratio"),
    ({"label_init_std": -1.0}, "label_init_std"),
])
def test_what_does_not_divide_is_refused_with_a_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**change)


@pytest.mark.parametrize("change", [
    {}, {"image_size": 32, "patch_size": 2, "in_channels": 3}, {"image_size": 9, "patch_size": 9, "num_classes": 1},
    {"image_size": 6, "patch_size": 1, "learn_sigma": True}, {"hidden_size": 12, "num_heads": 3, "mlp_ratio": 0.5},
])
def test_any_size_that_divides_works(change):
    config = ModelConfig(**change)
    x, t, y = inputs(config, 2)
    out = DiT(config)(x, t, y)
    assert out.shape == (2, config.in_channels * (2 if config.learn_sigma else 1), config.image_size, config.image_size)


# Initial values

def test_a_fresh_network_returns_exactly_zero_for_any_t_and_y():
    model = DiT(ModelConfig())
    for t in (0, 1, 500, 999):
        x, _, y = inputs(model.config, 11)
        assert torch.equal(model(x, torch.full((11,), t), y), torch.zeros(11, 1, 28, 28))


def test_a_fresh_block_is_exactly_the_identity():
    model = DiT(ModelConfig())
    x, c = torch.randn(2, 49, 64), torch.randn(2, 64)
    for block in model.blocks:
        assert torch.equal(block(x, c), x)


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


def test_all_initial_values():
    """Zeros are exact; a uniform fills its bound; a normal has its deviation."""
    torch.manual_seed(0)
    config = ModelConfig(label_init_std=0.02, time_init_std=0.02, num_classes=1000)  # the paper's; rows enough to measure
    seen = set()
    for name, value in DiT(config).named_parameters():
        seen.add(name)
        if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "embedding_table" in name or name.startswith("t_embedder"):
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
            assert value.abs().max() > 0.05, name  # no uniform has such tails
        else:  # xavier-uniform; the patch convolution counts as a Linear with p * p * C inputs
            bound = math.sqrt(6 / (value.shape[0] + value[0].numel()))
            assert value.abs().max() <= bound and value.abs().max() > 0.99 * bound, name
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    assert seen == MNIST_TABLE.keys() - {"pos_embed"}


def test_the_scales_of_the_initial_embeddings_are_the_configs():
    torch.manual_seed(0)
    model = DiT(replace(ModelConfig(), num_classes=1000))
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(model.config.label_init_std, rel=0.05)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(model.config.time_init_std, rel=0.05)
    assert model.t_embedder.mlp[2].weight.std().item() == pytest.approx(model.config.time_init_std, rel=0.05)


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

def test_label_and_time_change_the_output(open_network):
    x, t, y = inputs(open_network.config)
    out = open_network(x, t, y)
    assert (open_network(x, t, (y + 1) % 5) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (open_network(x, (t + 1) % 1000, y) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-5


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


def test_the_null_class_has_the_row_after_the_last_label(open_network):
    embedder = open_network.y_embedder
    assert torch.equal(embedder(torch.tensor([5])), embedder.embedding_table.weight[-1:])


def test_a_label_that_is_none_is_refused(open_network):
    x, t, _ = inputs(open_network.config)
    with pytest.raises(IndexError):
        open_network(x, t, torch.full((4,), 6))
