"""What the study trains and measures, and which rows of results/runs.csv belong to it."""

import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from config import BLOCKS, FAMILY, ModelConfig, TrainConfig
from dit import DiT
from experiments.rows import REAL, Rows
from experiments.starts import STARTS

TABLE = Path(__file__).with_name("results") / "runs.csv"
RECIPE = TrainConfig(batch_size=64, loss="mse", min_snr=0.3, optimizer="muon", lr=0.004,
                     lr_schedule="constant", ema_decay=0.999, checkpoint_every=250)
CHANGES = {"muon": {}, "muon-0.002": {"lr": 0.002}, "muon-0.008": {"lr": 0.008},
           "muon-unweighted": {"min_snr": 0.0}, "muon-long": {},
           "adamw": {"optimizer": "adamw", "lr": 0.001, "min_snr": 0.0},
           **{f"adamw-{lr}": {"optimizer": "adamw", "lr": lr} for lr in (0.0005, 0.002, 0.004)},
           **{name: {} for name in STARTS}}  # what differs from RECIPE
# A row's digest leaves out what has a column of its own and what changes no result.
NOT_IN_DIGEST = {"model", "block", "predicts", "seed", "epochs", "checkpoint", "checkpoint_every",
                 "data_dir", "device", "compile"}
EPOCHS = (1, 2, 3, 5, 8, 11)  # of 937 steps, after which a network is measured: 10,307 steps in all
LONG_EPOCHS = (5, 11, 20, 32, 53)  # of the recipe muon-long: 49,661 steps in all
LONG = ("B/7", "S/4", "B/4")  # what it trains
CURVE_IMAGES, FINAL_IMAGES = 2_000, 10_000  # for a point of a curve, and at the end
DDIM_STEPS = 50  # per image, unless the measurement varies them
SAMPLING_STEPS = (10, 20, 50, 100, 250, 1000)  # Figure 10, up to MAX_PER_IMAGE
MAX_PER_IMAGE = 45e9  # multiply-adds
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # of guidance, for the models in GUIDED
GUIDED = ("B/4", "XL/4")
SIZES, PATCHES = ("S", "B", "L", "XL"), (7, 4, 2)
IMPOSSIBLE = "S/7"  # its tokens of 32 values cannot hold the 49 noise values of a patch


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained."""

    model: str = "B/4"  # of FAMILY
    block: str = "adaLN-Zero"
    recipe: str = "muon"  # of CHANGES
    seed: int = 0
    predicts: str = "eps"

    @property
    def name(self) -> str:
        target = "" if self.predicts == "eps" else f"-{self.predicts}"
        return f"{self.model.replace('/', '')}-{self.block}-{self.recipe}{target}-{self.seed}"

    def config(self, recipe: TrainConfig, folder: Path) -> TrainConfig:
        """`recipe` with what is this network's own; its checkpoint has its own directory."""
        # Without C++ (the token designs; all on a GPU): in runs so short torch.compile takes as
        # long as it saves.
        model = replace(FAMILY[self.model], block=self.block, predicts=self.predicts)
        return replace(recipe, model=model, seed=self.seed,
                       compile=recipe.compile and self.block.startswith("adaLN"),
                       checkpoint=str(folder / self.name / "model.pth"), **CHANGES[self.recipe])

    def digest(self, recipe: TrainConfig) -> str:
        """Eight hex digits that change with any setting of the recipe or the network."""
        cfg = self.config(recipe, Path())
        settings = sorted((f.name, f.type(getattr(config, f.name))) for config in (cfg, cfg.model)
                          for f in fields(config) if f.name not in NOT_IN_DIGEST)
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Setting:
    """When and how a network is measured."""

    epoch: int = EPOCHS[-1]
    sampling_steps: int = DDIM_STEPS
    guidance: float = 1.0  # none
    n: int = CURVE_IMAGES


Entries = Sequence[tuple[Network, Sequence[Setting]]]  # in the order of the work; epochs only rise


def everything() -> Entries:
    """All of it. A network comes several times: first its curve, then what its end has."""
    curve = [*(Setting(epoch) for epoch in EPOCHS), Setting(n=FINAL_IMAGES)]
    guidance = [Setting(guidance=strength) for strength in STRENGTHS]
    ends = [*(Setting(guidance=strength) for strength in STRENGTHS[:4]), Setting(n=FINAL_IMAGES)]
    small = ("S/7", "B/7", "S/4", "L/7", "XL/7", "B/4", "L/4", "XL/4")  # from fast to slow
    large = ("S/2", "B/2", "L/2", "XL/2")

    def rates(model: str, block: str, *tried: float) -> list[Network]:
        return [Network(model, block, f"muon-{rate}") for rate in tried]

    def sampling(model: str) -> list[Setting]:
        return [Setting(sampling_steps=steps) for steps in SAMPLING_STEPS
                if steps * cost(FAMILY[model])["multiply_adds"] <= MAX_PER_IMAGE]

    return [  # is one learning rate good for all?
            *((network, curve[2:3]) for network in (
                *rates("B/4", "in-context", 0.002, 0.008), *rates("B/4", "adaLN", 0.002, 0.008),
                *rates("B/4", "cross-attention", 0.008))),
            *((Network(block=block), curve) for block in BLOCKS),  # Figure 5
            *((Network(model), curve) for model in small),  # Figures 6 to 9, 12 and 13
            *((network, curve[2:3]) for network in rates("XL/4", "adaLN-Zero", 0.002, 0.008)),
            *((Network(model), curve) for model in ("S/2", "B/2")),
            *((Network(block=block, seed=seed), curve) for seed in (1, 2) for block in BLOCKS),
            *((Network(block=block, recipe="adamw"), curve)
              for block in ("adaLN-Zero", "in-context")),
            *((Network(recipe=f"adamw-{lr}"), ends) for lr in (0.0005, 0.002, 0.004)),
            *((Network(model), sampling(model)) for model in small),  # Figure 10
            *((Network(model), guidance) for model in GUIDED),
            *((Network(model, seed=seed), curve) for seed in (1, 2) for model in small),
            *((Network(model), settings) for model in large
              for settings in (curve, sampling(model))),
            # Zero or gate?
            *((Network(block="adaLN" if recipe == "muon-zero" else "adaLN-Zero", recipe=recipe,
                       seed=seed), curve) for seed in (0, 1, 2) for recipe in STARTS),
            # What should a narrow token predict?
            *((Network(model, seed=seed, predicts=predicts), ends) for seed in (0, 1, 2)
              for model in small for predicts in ("x_0", "v")),
            *((Network(model, predicts=predicts), ends) for model in ("S/2", "B/2")
              for predicts in ("x_0", "v")),
            *((Network(recipe="muon-unweighted", predicts=predicts), ends)
              for predicts in ("eps", "x_0")),
            # Checks of the findings
            *((Network(model), [replace(setting, guidance=1.5) for setting in sampling(model)])
              for model in GUIDED),
            *((Network(model, seed=1), curve) for model in ("S/2", "B/2")),
            *((Network(model, recipe="muon-long"), [Setting(epoch) for epoch in LONG_EPOCHS])
              for model in LONG)]


@cache
def cost(config: ModelConfig) -> dict[str, int]:
    """Trainable parameters, and the multiply-adds of a forward pass, the paper's flops."""
    network, zero = DiT(config), torch.zeros(1, dtype=torch.long)
    x_t = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:  # 2 for a multiplication and an addition
        network(x_t, zero, zero)
    return {"parameters": sum(p.numel() for p in network.parameters()),
            "multiply_adds": counter.get_total_flops() // 2}


def missing(network: Network, settings: Sequence[Setting], rows: Rows, recipe: TrainConfig
            ) -> list[Setting]:
    """The settings that have no row yet. Rows of another recipe do not count."""
    digest = network.digest(recipe)
    done = {Setting(*(row[name] for name in vars(Setting()))) for row in rows
            if (row["run"], row["digest"]) == (network.name, digest)}
    return [setting for setting in settings if setting not in done]


def current(rows: Rows) -> Rows:
    """The rows of real images, and of the study's networks as RECIPE trains them today."""
    digests = {network.name: network.digest(RECIPE) for network, _ in everything()}
    return [row for row in rows
            if row["run"] == REAL or row["digest"] == digests.get(row["run"], "")]


def select(rows: Rows, **wanted) -> Rows:
    """The rows with these values; None stands for any.

    By default: muon, adaLN-Zero, eps, unguided, at the end of training.
    """
    wanted = {"recipe": "muon", "block": "adaLN-Zero", "predicts": "eps", "guidance": 1.0,
              "sampling_steps": DDIM_STEPS, "n": CURVE_IMAGES, "epoch": EPOCHS[-1]} | wanted
    return [row for row in rows
            if all(value is None or row[name] == value for name, value in wanted.items())]


def over_seeds(rows: Rows, x: Callable[[dict], float], y: str = "FID"
               ) -> list[tuple[float, float, float, float]]:
    """(x, mean, least and greatest y) at each x, over the rows that share it."""
    groups = {}
    for row in rows:
        groups.setdefault(x(row), []).append(row[y])
    return [(at, statistics.mean(values), min(values), max(values))
            for at, values in sorted(groups.items())]


def at_the_end(rows: Rows, *columns: str) -> dict[str, list[float]]:
    """For each model that can learn, the mean of these columns over its seeds at its end."""
    found = {}
    for name in FAMILY:
        mine = select(rows, model=name, n=FINAL_IMAGES)
        if mine and name != IMPOSSIBLE:
            found[name] = [statistics.mean(row[column] for row in mine) for column in columns]
    return found


def training_compute(row: dict) -> float:
    """Multiply-adds so far: a backward pass costs two forward passes (DiT section 5)."""
    return row["multiply_adds"] * RECIPE.batch_size * row["step"] * 3
