"""The four block designs, their attention and MLP against plain float64 formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dit_block

D, HEADS, N, L = 24, 3, 2, 7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(length: int = L) -> torch.Tensor:
    return torch.randn(N, length, D, dtype=torch.float64)


def random(part: nn.Module) -> nn.Module:
    """The part in float64, all its parameters random."""
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.5)
    return part.double()


def linear(x, layer: nn.Linear, share=slice(None)):
    return x @ layer.weight[share].T + layer.bias[share]


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def affine(norm: nn.LayerNorm, x):
    return layer_norm(x) * norm.weight + norm.bias


def softmax_qk_v(q, k, v):
    """softmax(Q K^T / sqrt(d)) V, head by head. q: (N, L, D), k, v: (N, M, D)."""
    d, out = D // HEADS, torch.zeros_like(q)
    for n in range(N):
        for head in range(HEADS):
            own = slice(head * d, (head + 1) * d)
            weights = torch.exp(q[n, :, own] @ k[n, :, own].T / math.sqrt(d))
            out[n, :, own] = weights / weights.sum(dim=1, keepdim=True) @ v[n, :, own]
    return out


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_attention():
    attention, x = random(dit_block.Attention(D, HEADS)), tokens()
    q, k, v = (linear(x, attention.qkv, slice(i * D, (i + 1) * D)) for i in range(3))
    close(attention(x), linear(softmax_qk_v(q, k, v), attention.proj))


def test_cross_attention():
    cross, x, two = random(dit_block.CrossAttention(D, HEADS)), tokens(), tokens(2)
    k, v = (linear(two, cross.kv, slice(i * D, (i + 1) * D)) for i in range(2))
    close(cross(x, two), linear(softmax_qk_v(linear(x, cross.q), k, v), cross.proj))


def test_mlp_has_the_tanh_gelu():
    mlp, x = random(dit_block.Mlp(D, 20)), tokens()
    h = linear(x, mlp.fc1)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    close(mlp(x), linear(h, mlp.fc2))


def test_in_context_block():
    block, x = random(dit_block.InContextBlock(D, HEADS, 4.0)), tokens()
    h = x + block.attn(affine(block.norm1, x))
    close(block(x, tokens(2)), h + block.mlp(affine(block.norm2, h)))


def test_cross_attention_block():
    block, x, two = random(dit_block.CrossAttentionBlock(D, HEADS, 4.0)), tokens(), tokens(2)
    h = x + block.attn(affine(block.norm1, x))
    h = h + block.cross_attn(affine(block.norm2, h), two)
    close(block(x, two), h + block.mlp(affine(block.norm3, h)))


@pytest.mark.parametrize("design", [dit_block.AdaLNBlock, dit_block.DiTBlock])
def test_adaln_and_adaln_zero_blocks(design):
    """The order is shift, scale and, in adaLN-Zero, gate of the attention, then of the MLP."""
    block, x, c = random(design(D, HEADS, 4.0)), tokens(), tokens()[:, 0]
    h = x
    vectors = linear(F.silu(c), block.adaLN_modulation[1]).reshape(N, 2, -1, 1, D)
    for branch, part in enumerate((block.attn, block.mlp)):
        shift, scale, gate = (*vectors[:, branch].unbind(1), 1)[:3]
        h = h + gate * part(layer_norm(h) * (1 + scale) + shift)
    close(block(x, c), h)
