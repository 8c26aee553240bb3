"""The DiT block with adaLN-Zero conditioning (DiT section 3.2; Figure 3, "DiT Block with adaLN-Zero").

Figure 3 calls the shift, scale and gate of a modulation beta, gamma and alpha; here beta and alpha belong to the schedule.
Shapes: N images, L tokens an image, D the width of a token.
"""

from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift. x: (N, L, D); shift, scale: (N, D), the same for every token of an image."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V with d = D / num_heads. (N, L, D) -> (N, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        N, L, D = x.shape
        d = D // self.num_heads
        q, k, v = self.qkv(x).reshape(N, L, 3, self.num_heads, d).permute(2, 0, 3, 1, 4)  # each (N, heads, L, d)
        # F.scaled_dot_product_attention is no faster for 49 tokens on a CPU, and hides the formula.
        weights = (q * d**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (N, heads, L, L)
        return self.proj((weights @ v).transpose(1, 2).reshape(N, L, D))


class Mlp(nn.Module):
    """Linear, GELU (tanh form, DiT appendix A), Linear, on every token alone. (N, L, D) -> (N, L, D)."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Attention, then MLP; c modulates the input of each and gates its output. x: (N, L, D), c: (N, D) -> (N, L, D).

    `DiT.initialize_weights` sets adaLN_modulation to zero: all gates are 0 and a new block is the identity.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x
