"""adaLN-Zero, attention and the MLP against plain float64 formulas."""

import math

import torch
from torch.nn import functional as F

from dit_block import Attention, DiTBlock, Mlp, modulate


def test_modulate():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    out = modulate(x, shift, scale)
    for n in range(2):
        for token in range(3):
            assert torch.allclose(out[n, token], x[n, token] * (1 + scale[n]) + shift[n])


def test_attention_is_softmax_qk_over_sqrt_d_times_v():
    torch.manual_seed(0)
    D, heads, N, L = 24, 3, 2, 7
    d = D // heads
    attention = Attention(D, heads).double()
    x = torch.randn(N, L, D, dtype=torch.float64)
    W, b = attention.qkv.weight, attention.qkv.bias
    out = torch.zeros(N, L, D, dtype=torch.float64)
    for n in range(N):
        q, k, v = (x[n] @ W[i * D:(i + 1) * D].T + b[i * D:(i + 1) * D] for i in range(3))
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            weights = torch.exp(q[:, own] @ k[:, own].T / math.sqrt(d))
            out[n, :, own] = weights / weights.sum(dim=1, keepdim=True) @ v[:, own]
    expected = out @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-12)


def test_mlp_has_the_tanh_gelu():
    torch.manual_seed(0)
    mlp = Mlp(8, 20).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    h = x @ mlp.fc1.weight.T + mlp.fc1.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), h @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=1e-10, atol=1e-12)


def test_block_against_its_formula():
    """The order of the six vectors: shift, scale, gate of the attention, then of the MLP."""
    torch.manual_seed(0)
    D = 8
    block = DiTBlock(D, 2).double()
    x, c = torch.randn(2, 5, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    linear = block.adaLN_modulation[1]
    six = (F.silu(c) @ linear.weight.T + linear.bias).reshape(2, 6, D)

    def layer_norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    h = x + six[:, 2:3] * block.attn(layer_norm(x) * (1 + six[:, 1:2]) + six[:, 0:1])
    expected = h + six[:, 5:6] * block.mlp(layer_norm(h) * (1 + six[:, 4:5]) + six[:, 3:4])
    torch.testing.assert_close(block(x, c), expected, rtol=1e-10, atol=1e-12)


def test_layer_norms_have_no_parameters():
    block = DiTBlock(8, 2)
    assert not list(block.norm1.parameters()) and not list(block.norm2.parameters())
    assert block.norm1.eps == block.norm2.eps == 1e-6
