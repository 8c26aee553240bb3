"""Draw the architecture, with the shapes that tensors have in the network: python -m assets.dits assets/dits.png"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from config import ModelConfig
from dit import DiT
from runtime.pictures import DPI, save_picture

FIXED, LEARNED, CONDITION, DATA = "#e8e8e8", "#cfe2f3", "#fce5cd", "#ffffff"


def shapes(model: DiT) -> dict[str, str]:
    """What each module returns for a batch of N images: name -> "(N, 49, 64)"."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(
            lambda module, inputs, out, name=name: found.update({name: f"(N, {', '.join(map(str, out.shape[1:]))})"})))
    zeros = torch.zeros(2, dtype=torch.long)
    model(torch.zeros(2, 1, 28, 28), zeros, zeros)
    for hook in hooks:
        hook.remove()
    return found


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 2.6, height: float = 0.6) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=color, edgecolor="#444444",
                                  linewidth=0.9, boxstyle="round,pad=0.02,rounding_size=0.08"))
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, x_1: float, y_1: float, x_2: float, y_2: float, label: str = "", side: float = 0.1,
          color: str = "#444444") -> None:
    axes.add_patch(FancyArrowPatch((x_1, y_1), (x_2, y_2), arrowstyle="-|>", mutation_scale=8, color=color, linewidth=0.9,
                                   shrinkA=0, shrinkB=0))
    if label:
        axes.text((x_1 + x_2) / 2 + side, (y_1 + y_2) / 2, label, fontsize=7.5, color="#333333", va="center",
                  ha="left" if side > 0 else "right")


def column(axes: Axes, x: float, steps: list[tuple[str, str, str]], top: float, gap: float = 1.1) -> list[float]:
    """Boxes from top to bottom; each step is (text, color, shape on the arrow that leaves it). Returns their heights."""
    heights = [top - i * gap for i in range(len(steps))]
    for (text, color, shape), y in zip(steps, heights, strict=True):
        box(axes, x, y, text, color)
        if y != heights[-1]:
            arrow(axes, x, y - 0.32, x, y - gap + 0.32, shape)
    return heights


def architecture() -> Figure:
    """The whole network on the left, one of its blocks on the right (DiT Figure 3)."""
    config = ModelConfig()
    model = DiT(config)
    shape = shapes(model)
    D, L, p = config.hidden_size, model.pos_embed.shape[1], config.patch_size
    figure = Figure(figsize=(9.4, 7), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.4, 13.3), ylim=(-0.3, 10.3))
    axes.set_axis_off()

    # The whole network
    axes.text(3.1, 10.1, "DiT", fontsize=11, weight="bold", ha="center")
    image = f"(N, {config.in_channels}, {config.image_size}, {config.image_size})"
    whole = column(axes, 1.2, [
        ("x_t, a noised image", DATA, image),
        (f"patchify, Linear({p * p * config.in_channels}, {D})", LEARNED, shape["x_embedder"]),
        (f"+ pos_embed (1, {L}, {D})", FIXED, shape["x_embedder"]),
        (f"DiTBlock x {config.depth}", LEARNED, shape["blocks.0"]),
        ("LayerNorm\nx (1 + scale) + shift", FIXED, shape["final_layer.norm_final"]),
        (f"Linear({D}, {p * p * config.out_channels})\ninitialised to zero", LEARNED, shape["final_layer"]),
        ("unpatchify", FIXED, image),
        ("eps_hat, predicted noise", DATA, ""),
    ], top=9.4, gap=1.25)
    condition = column(axes, 5.0, [
        ("t, y: time and digit", DATA, "(N,), (N,)"),
        ("sinusoid, MLP of t\n+ label embedding of y", LEARNED, ""),
    ], top=9.4, gap=1.25)
    c = condition[1] - 1.25
    arrow(axes, 5.0, condition[1] - 0.32, 5.0, c + 0.32, shape["t_embedder"])
    box(axes, 5.0, c, "c", CONDITION, width=0.7)
    arrow(axes, 4.65, c - 0.1, 2.55, whole[3], color="#c27c0e")
    arrow(axes, 5.0, c - 0.32, 5.0, whole[4] + 0.32, color="#c27c0e")
    box(axes, 5.0, whole[4], f"SiLU, Linear({D}, {2 * D})\ninitialised to zero", LEARNED)
    arrow(axes, 3.68, whole[4], 2.55, whole[4], color="#c27c0e")
    axes.text(3.12, whole[4] + 0.1, "shift, scale", fontsize=7.5, color="#a0650a", ha="center", va="bottom")

    # A block
    axes.text(10.2, 10.1, "DiTBlock, adaLN-Zero", fontsize=11, weight="bold", ha="center")
    axes.add_patch(FancyBboxPatch((7.1, 0.1), 6.0, 9.75, boxstyle="round,pad=0.02,rounding_size=0.15", facecolor="none",
                                  edgecolor="#888888", linestyle="--"))
    tokens, scores = shape["blocks.0"], f"softmax(Q K^T / sqrt({D // config.num_heads})) V"
    x, top, gap = 11.2, 9.0, 0.98
    block = column(axes, x, [
        ("LayerNorm", FIXED, tokens),
        ("x (1 + scale) + shift", FIXED, tokens),
        (f"Attention, {config.num_heads} heads\n{scores}", LEARNED, shape["blocks.0.attn"]),
        ("times gate", FIXED, tokens),
    ], top, gap)
    plus = block[-1] - 0.75
    block_2 = column(axes, x, [
        ("LayerNorm", FIXED, tokens),
        ("x (1 + scale) + shift", FIXED, tokens),
        (f"MLP: {D} to {shape['blocks.0.mlp.fc1'].split()[-1][:-1]} to {D}, GELU", LEARNED, shape["blocks.0.mlp"]),
        ("times gate", FIXED, tokens),
    ], plus - 0.75, gap)
    plus_2 = block_2[-1] - 0.65
    arrow(axes, x, 9.75, x, top + 0.32, "")
    for y, above, below in ((plus, block[-1], block_2[0] + 0.32), (plus_2, block_2[-1], 0.12)):
        axes.text(x, y, "+", ha="center", va="center", fontsize=12)
        axes.add_patch(FancyBboxPatch((x - 0.12, y - 0.12), 0.24, 0.24, boxstyle="circle,pad=0.02", facecolor="none",
                                      edgecolor="#444444", linewidth=0.8))
        arrow(axes, x, above - 0.32, x, y + 0.17)
        arrow(axes, x, y - 0.17, x, below)
    for start, end in ((9.6, plus), (plus - 0.3, plus_2)):  # the residual paths
        axes.plot([x, 12.85, 12.85], [start, start, end], color="#444444", linewidth=0.9)
        arrow(axes, 12.85, end, x + 0.17, end)
    box(axes, 8.0, 7.0, "c", CONDITION, width=0.7)
    arrow(axes, 8.0, 6.68, 8.0, 5.92, color="#c27c0e")
    box(axes, 8.0, 5.6, f"SiLU,\nLinear({D}, {6 * D})", LEARNED, width=1.5)
    axes.text(8.0, 5.15, "initialised to zero;\nsix vectors", fontsize=7.5, color="#a0650a", ha="center", va="top")
    axes.plot([8.77, 8.92, 8.92, 8.92], [5.6, 5.6, block[1], block_2[3]], color="#c27c0e", linewidth=0.9)
    for name, y in (("shift, scale", block[1]), ("gate", block[3]), ("shift, scale", block_2[1]), ("gate", block_2[3])):
        arrow(axes, 8.92, y, x - 1.35, y, color="#c27c0e")
        axes.text(x - 1.4, y + 0.1, name, fontsize=7.5, color="#a0650a", ha="right", va="bottom")
    for i, (color, text) in enumerate(((LEARNED, "trained"), (FIXED, "fixed"), (CONDITION, "condition"))):
        box(axes, 3.9 + 1.15 * i, 0.7, text, color, width=1.0, height=0.4)
    return figure


if __name__ == "__main__":
    save_picture(Path(sys.argv[1]), architecture)
