"""The Diffusion Transformer: patchify, blocks, final layer, unpatchify (DiT section 3.2, Figure 3).

With adaLN-Zero, parameters have the names and shapes of the paper's released checkpoints.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import ModelConfig
from dit_block import AdaLNBlock, CrossAttentionBlock, DiTBlock, InContextBlock, modulate
from time_emb import TimestepEmbedder

DESIGNS = {"in-context": InContextBlock, "cross-attention": CrossAttentionBlock,
           "adaLN": AdaLNBlock, "adaLN-Zero": DiTBlock}


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Squares, row by row (DiT Figure 4), channel last. (N, C, H, W) -> (N, L, p*p*C)."""
    (N, C, H, W), p = images.shape, patch_size
    patches = images.reshape(N, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(N, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`: (N, L, p*p*C) -> (N, C, H, W) with H = W = p * sqrt(L)."""
    N, L, patch_values = patches.shape
    p, side = patch_size, math.isqrt(L)
    C = patch_values // p**2
    images = patches.reshape(N, side, side, p, p, C).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(N, C, side * p, side * p)


def position_table(hidden_size: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a side x side grid (MAE, He et al. 2021). (side^2, D).

    The first half of the channels encodes the column, the second half the row; each half is sines,
    then cosines, with omega_i = 10000^(-i / (D/4)).
    """
    quarter = hidden_size // 4
    omega = 10_000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, D/4)
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D/2)
    column = one_axis[None, :, :].expand(side, side, -1)
    row = one_axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(side * side, hidden_size).float()


class PatchEmbed(nn.Module):
    """One linear map for all patches. (N, C, H, W) -> (N, L, D).

    `proj` is a strided convolution, as in released checkpoints; it is applied as a matrix product.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C), in patchify's order
        return F.linear(patchify(images, self.patch_size), weight, self.proj.bias)


class LabelEmbedder(nn.Module):
    """y: (N,) ints in [0, num_classes] -> (N, D). Row `num_classes` is guidance's null class."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.null_class = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def drop(self, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """y, with probability `dropout_prob` replaced by the null class (CFG Algorithm 1, line 3).

        generator: on y's device. The paper's code does this in forward(), here train.py does.
        """
        dropped = torch.rand(y.shape, generator=generator, device=y.device) < self.dropout_prob
        return torch.where(dropped, self.null_class, y)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PlainFinalLayer(nn.Module):
    """LayerNorm and a linear map to the values of a patch. x: (N, L, D) -> (N, L, p*p*C_out).

    For in-context and cross-attention; c is not used, "adaptive if using adaLN" (DiT section 3.2).
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class FinalLayer(nn.Module):
    """For adaLN and adaLN-Zero, modulated by c. x: (N, L, D), c: (N, D) -> (N, L, p*p*C_out)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Predicts eps, x_0 or v (`config.predicts`) from (x_t, t, y); on request, the variance too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, p = config.hidden_size, config.patch_size
        self.x_embedder = PatchEmbed(p, config.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D, config.class_dropout_prob)
        self.register_buffer("pos_embed", torch.empty(1, (config.image_size // p) ** 2, D))
        design = DESIGNS[config.block]
        self.adaptive = config.block.startswith("adaLN")  # c is one vector, not two tokens
        self.blocks = nn.ModuleList(design(D, config.num_heads, config.mlp_ratio)
                                    for _ in range(config.depth))
        final_layer = FinalLayer if self.adaptive else PlainFinalLayer
        self.final_layer = final_layer(D, p, config.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Every initial value (DiT section 3.2, "adaLN-Zero block"; section 4; the paper's code).

        LayerNorms keep torch's scale of 1 and shift of 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view: like a Linear
        nn.init.zeros_(self.x_embedder.proj.bias)
        side = self.config.image_size // self.config.patch_size
        self.pos_embed.copy_(position_table(self.config.hidden_size, side))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.config.label_init_std)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.weight, std=self.config.time_init_std)
        # Zero gates make each adaLN-Zero block the identity; the zero final layer makes the first
        # prediction exactly 0. Shift and scale start at zero as well, as in the paper's code; those
        # of AdaLNBlock start like other Linears.
        modulated = [m for m in self.modules() if isinstance(m, DiTBlock | FinalLayer)]
        for linear in (*(m.adaLN_modulation[1] for m in modulated), self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t: (N, C, H, W); t: (N,) in [0, T); y: (N,) in [0, num_classes] -> (N, C_out, H, W)."""
        x = self.x_embedder(x_t) + self.pos_embed  # (N, L, D)
        t_emb, y_emb = self.t_embedder(t), self.y_embedder(y)  # (N, D) each
        c = t_emb + y_emb if self.adaptive else torch.stack([t_emb, y_emb], dim=1)  # two tokens
        if self.config.block == "in-context":
            x = torch.cat([x, c], dim=1)  # (N, L + 2, D)
        for block in self.blocks:
            x = block(x, c)
        x = x[:, :self.pos_embed.shape[1]]  # the image tokens only
        return unpatchify(self.final_layer(x, c), self.config.patch_size)
