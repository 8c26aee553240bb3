"""The four block designs, their attention and MLP against plain float64 formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dit_block import AdaLNBlock, Attention, CrossAttention, CrossAttentionBlock, DiTBlock, InContextBlock, Mlp, modulate

D, HEADS, N, L = 24, 3, 2, 7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(length: int = L) -> torch.Tensor:
    return torch.randn(N, length, D, dtype=torch.float64)


def linear(x, weight, bias):
    return x @ weight.T + bias


def softmax_qk_v(q, k, v):
    """softmax(Q K^T / sqrt(d)) V for each image and head by itself. q: (N, L, D), k, v: (N, M, D)."""
    d, out = D // HEADS, torch.zeros_like(q)
    for n in range(N):
        for head in range(HEADS):
            own = slice(head * d, (head + 1) * d)
            weights = torch.exp(q[n, :, own] @ k[n, :, own].T / math.sqrt(d))
            out[n, :, own] = weights / weights.sum(dim=1, keepdim=True) @ v[n, :, own]
    return out


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_modulate():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    out = modulate(x, shift, scale)
    for n in range(2):
        for token in range(3):
            assert torch.allclose(out[n, token], x[n, token] * (1 + scale[n]) + shift[n])


def test_attention():
    attention, x = Attention(D, HEADS).double(), tokens()
    q, k, v = (linear(x, *parts) for parts in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True))
    close(attention(x), linear(softmax_qk_v(q, k, v), attention.proj.weight, attention.proj.bias))


def test_cross_attention():
    attention, x, two = CrossAttention(D, HEADS).double(), tokens(), tokens(2)
    q = linear(x, attention.q.weight, attention.q.bias)
    k, v = (linear(two, *parts) for parts in zip(attention.kv.weight.chunk(2), attention.kv.bias.chunk(2), strict=True))
    close(attention(x, two), linear(softmax_qk_v(q, k, v), attention.proj.weight, attention.proj.bias))


def test_mlp_has_the_tanh_gelu():
    mlp, x = Mlp(D, 20).double(), tokens()
    h = linear(x, mlp.fc1.weight, mlp.fc1.bias)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    close(mlp(x), linear(h, mlp.fc2.weight, mlp.fc2.bias))


def with_random_norms(block: nn.Module) -> nn.Module:
    """The block in float64, its LayerNorms' own scale and shift random where they have them."""
    with torch.no_grad():
        for norm in (module for module in block.modules() if isinstance(module, nn.LayerNorm)):
            for parameter in norm.parameters():
                parameter.normal_()
    return block.double()


def affine(norm: nn.LayerNorm, x):
    return layer_norm(x) * norm.weight + norm.bias


def test_in_context_block():
    block, x = with_random_norms(InContextBlock(D, HEADS)), tokens()
    h = x + block.attn(affine(block.norm1, x))
    close(block(x, tokens(2)), h + block.mlp(affine(block.norm2, h)))


def test_cross_attention_block():
    block, x, two = with_random_norms(CrossAttentionBlock(D, HEADS)), tokens(), tokens(2)
    h = x + block.attn(affine(block.norm1, x))
    h = h + block.cross_attn(affine(block.norm2, h), two)
    close(block(x, two), h + block.mlp(affine(block.norm3, h)))


def test_adaln_block_is_adaln_zero_with_gates_of_one():
    block, gated = AdaLNBlock(D, HEADS).double(), DiTBlock(D, HEADS).double()
    four, six = block.adaLN_modulation[1], gated.adaLN_modulation[1]
    with torch.no_grad():
        for ours, theirs, gate in ((four.weight, six.weight, 0), (four.bias, six.bias, 1)):
            attn, mlp = ours.chunk(2)
            theirs.copy_(torch.cat([attn, torch.full_like(ours[:D], gate), mlp, torch.full_like(ours[:D], gate)]))
    gated.load_state_dict({**block.state_dict(), **gated.adaLN_modulation.state_dict(prefix="adaLN_modulation.")})
    x, c = tokens(), tokens()[:, 0]
    close(block(x, c), gated(x, c))


def test_adaln_zero_block():
    """The order of the six vectors: shift, scale, gate of the attention, then of the MLP."""
    block, x, c = DiTBlock(D, HEADS).double(), tokens(), tokens()[:, 0]
    six = linear(F.silu(c), *block.adaLN_modulation[1].parameters()).reshape(N, 6, D)
    h = x + six[:, 2:3] * block.attn(layer_norm(x) * (1 + six[:, 1:2]) + six[:, 0:1])
    close(block(x, c), h + six[:, 5:6] * block.mlp(layer_norm(h) * (1 + six[:, 4:5]) + six[:, 3:4]))
