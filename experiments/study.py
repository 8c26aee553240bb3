"""What the study trains and measures, and the table of what it found: results/runs.csv, one row per measurement."""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.measure import arithmetic
from config import BLOCKS, FAMILY, ModelConfig, TrainConfig
from dit import DiT

TABLE = Path(__file__).with_name("results") / "runs.csv"
RECIPE = TrainConfig(batch_size=64, loss="mse", min_snr=0.3, optimizer="muon", lr=0.004, lr_schedule="constant",
                     ema_decay=0.999, checkpoint_every=250)
CHANGES = {"muon": {}, "muon-0.002": {"lr": 0.002}, "muon-0.008": {"lr": 0.008},  # recipe -> how it differs from RECIPE
           "adamw": {"optimizer": "adamw", "lr": 0.001, "min_snr": 0.0}}
EPOCHS = (1, 2, 3, 5, 8, 11)  # of 937 steps, after which a network is measured: 10,307 steps in all
CURVE_IMAGES, FINAL_IMAGES = 2_000, 10_000  # for a point of a curve, and at the end
DDIM_STEPS = 50  # per image, unless the measurement varies them
SAMPLING_STEPS = (10, 20, 50, 100, 250, 1000)  # Figure 10, up to MAX_PER_IMAGE
MAX_PER_IMAGE = 45e9  # multiply-adds
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # of guidance, for the models in GUIDED
GUIDED = ("B/4", "XL/4")
SIZES, PATCHES = ("S", "B", "L", "XL"), (7, 4, 2)
IMPOSSIBLE = "S/7"  # 32 values of a token cannot hold the 49 noise values of its patch
Rows = list[dict]
REAL = "real images"  # instead of a run's name, in the rows that say what real images score

# How each column is read. n: images measured; multiply_adds: of one forward pass for one image; test_loss, train_seconds:
# from the run's loss.csv. A row of real images leaves most cells empty.
COLUMNS = {"run": str, "model": str, "block": str, "recipe": str, "seed": int, "epoch": int, "step": int,
           "sampling_steps": int, "guidance": float, "n": int, "accuracy": float, "FID": float, "precision": float,
           "recall": float, "density": float, "coverage": float, "test_loss": float, "parameters": int,
           "multiply_adds": int, "train_seconds": float}


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained."""

    model: str = "B/4"  # of FAMILY
    block: str = "adaLN-Zero"
    recipe: str = "muon"  # of CHANGES
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.model.replace('/', '')}-{self.block}-{self.recipe}-{self.seed}"

    def config(self, recipe: TrainConfig, folder: Path) -> TrainConfig:
        """`recipe` with what is this network's own; its checkpoint lies in a directory of its own in `folder`."""
        # Without C++ (the token designs; all on a GPU): in runs so short torch.compile takes as long as it saves.
        return replace(recipe, model=replace(FAMILY[self.model], block=self.block), seed=self.seed,
                       compile=recipe.compile and self.block.startswith("adaLN"),
                       checkpoint=str(folder / self.name / "model.pth"), **CHANGES[self.recipe])


@dataclass(frozen=True)
class Setting:
    """When and how a network is measured."""

    epoch: int = EPOCHS[-1]
    sampling_steps: int = DDIM_STEPS
    guidance: float = 1.0  # none
    n: int = CURVE_IMAGES


Entries = Sequence[tuple[Network, Sequence[Setting]]]  # in the order of the work; epochs never fall within an entry


def everything() -> Entries:
    """All of it. A network may come several times: first its curve, later what is measured at its end."""
    curve = [*(Setting(epoch) for epoch in EPOCHS), Setting(n=FINAL_IMAGES)]
    guidance = [Setting(guidance=strength) for strength in STRENGTHS]
    small = ("S/7", "B/7", "S/4", "L/7", "XL/7", "B/4", "L/4", "XL/4")  # from fast to slow
    large = ("S/2", "B/2", "L/2", "XL/2")

    def rates(model: str, block: str) -> list[Network]:
        return [Network(model, block, f"muon-{rate}") for rate in ("0.002", "0.008")]

    def sampling(model: str) -> list[Setting]:
        return [Setting(sampling_steps=steps) for steps in SAMPLING_STEPS
                if steps * cost(FAMILY[model])["multiply_adds"] <= MAX_PER_IMAGE]

    return [*((network, curve[2:3]) for network in rates("B/4", "in-context")),  # is one learning rate good for all?
            *((Network(block=block), curve) for block in BLOCKS),  # Figure 5
            *((Network(model), curve) for model in small),  # Figures 6 to 9
            *((network, curve[2:3]) for network in rates("XL/4", "adaLN-Zero")),
            *((Network(model), curve) for model in ("S/2", "B/2")),
            *((Network(block=block, seed=seed), curve) for seed in (1, 2) for block in BLOCKS),
            *((Network(block=block, recipe="adamw"), curve) for block in ("adaLN-Zero", "in-context")),
            *((Network(model), sampling(model)) for model in small),  # Figure 10
            *((Network(model), guidance) for model in GUIDED),
            *((Network(model, seed=seed), curve) for seed in (1, 2) for model in small),
            *((Network(model), settings) for model in large for settings in (curve, sampling(model)))]


@cache
def cost(config: ModelConfig) -> dict[str, int]:
    """Trainable parameters, and the multiply-adds of a forward pass for one image, which the paper calls flops."""
    network, zero = DiT(config, initialize=False), torch.zeros(1, dtype=torch.long)
    x_t = torch.zeros(1, config.in_channels, config.image_size, config.image_size)
    return {"parameters": sum(p.numel() for p in network.parameters()),
            "multiply_adds": arithmetic(lambda: network(x_t, zero, zero)) // 2}


def read(table: Path) -> Rows:
    """The rows of the table as dicts, empty cells as None; none if there is no such file."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return [{name: kind(row[name]) if row[name] else None for name, kind in COLUMNS.items()}
                for row in csv.DictReader(file)]


def line(row: dict) -> str:
    """A row of the table as it is written."""
    cells = (row.get(name, "") for name in COLUMNS)
    return ",".join(format(cell, ".6g") if isinstance(cell, float) else str(cell) for cell in cells) + "\n"


def missing(network: Network, settings: Sequence[Setting], rows: Rows) -> list[Setting]:
    """The settings that have no row yet."""
    done = {Setting(*(row[name] for name in vars(Setting()))) for row in rows if row["run"] == network.name}
    return [setting for setting in settings if setting not in done]


def select(rows: Rows, **wanted) -> Rows:
    """The rows with these values; by default muon, adaLN-Zero, unguided, at the end of training. None: any value."""
    wanted = {"recipe": "muon", "block": "adaLN-Zero", "sampling_steps": DDIM_STEPS, "guidance": 1.0, "n": CURVE_IMAGES,
              "epoch": EPOCHS[-1]} | wanted
    return [row for row in rows if all(value is None or row[name] == value for name, value in wanted.items())]


def over_seeds(rows: Rows, x: Callable[[dict], float], y: str = "FID") -> list[tuple[float, float, float, float]]:
    """(x, mean, least and greatest y) at each x, over the rows that share it."""
    groups = {}
    for row in rows:
        groups.setdefault(x(row), []).append(row[y])
    return [(at, statistics.mean(values), min(values), max(values)) for at, values in sorted(groups.items())]


def training_compute(row: dict) -> float:
    """Multiply-adds of the training so far: a backward pass costs two forward passes (DiT section 5)."""
    return row["multiply_adds"] * RECIPE.batch_size * row["step"] * 3
