"""The four block designs of DiT section 3.2: how the timestep t and the label y reach the tokens.

They are in the paper's order: in-context, cross-attention, adaLN, adaLN-Zero. Figure 3, which omits
adaLN, calls shift, scale and gate beta, gamma and alpha; here, these belong to the diffusion.
Shapes: N images, L tokens per image (the paper's T), D the width of a token (the paper's d). y is
the label (the paper's text says c), c the condition. LayerNorm's eps of 1e-6 is the paper's code's.
"""

from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift: zeros change nothing. x: (N, L, D); shift, scale: (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax((Q / sqrt(d)) K^T) V. q: (N, heads, L, d); k, v: (N, heads, M, d) -> (N, L, D)."""
    # Written out because F.scaled_dot_product_attention would hide the formula.
    weights = ((q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)  # (N, heads, L, M)
    return (weights @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention with d = D / num_heads. (N, L, D) -> (N, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        N, L, D = x.shape
        qkv = self.qkv(x).reshape(N, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v))


class CrossAttention(nn.Module):
    """Multi-head attention to a second sequence. x: (N, L, D), sequence: (N, M, D) -> (N, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, sequence: Tensor) -> Tensor:
        (N, L, D), M = x.shape, sequence.shape[1]
        q = self.q(x).reshape(N, L, self.num_heads, D // self.num_heads).transpose(1, 2)
        kv = self.kv(sequence).reshape(N, M, 2, self.num_heads, D // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    """Linear, GELU (tanh form, DiT appendix A), Linear, for each token. (N, L, D) -> (N, L, D)."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class InContextBlock(nn.Module):
    """A standard ViT block (DiT section 3.2, "In-context conditioning"). (N, L + 2, D) -> the same.

    t and y are the last two tokens, which `DiT.forward` appends and removes. c is not used.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class CrossAttentionBlock(nn.Module):
    """A ViT block that also attends to t and y (DiT section 3.2, "Cross-attention block").

    x: (N, L, D); c: (N, 2, D), the sequence of the two tokens t and y -> (N, L, D).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm3 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), c)
        x = x + self.mlp(self.norm3(x))
        return x


class AdaLNBlock(nn.Module):
    """LayerNorms whose shift and scale depend on c (DiT section 3.2, "... (adaLN) block").

    x: (N, L, D); c: (N, D), the embeddings of t and y added -> (N, L, D).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_attn, scale_attn, shift_mlp, scale_mlp = self.adaLN_modulation(c).chunk(4, dim=1)
        x = x + self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class DiTBlock(nn.Module):
    """adaLN with a gate on each branch as well (DiT section 3.2, "adaLN-Zero block").

    x: (N, L, D), c: (N, D) -> (N, L, D). `DiT.initialize_weights` sets adaLN_modulation to zero:
    all gates are 0, and a new block is the identity.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x
