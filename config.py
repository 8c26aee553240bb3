"""Settings of a network and of a training run; fields with a help text are `train.py`'s options."""

from argparse import BooleanOptionalAction
from dataclasses import dataclass, field, fields

T = 1000  # diffusion steps, DDPM section 4
BETA = (1e-4, 0.02)  # variances of the first and the last step; those between are evenly spaced
MNIST_IMAGES, MNIST_TEST_IMAGES = 60_000, 10_000
STEPS = {"ddpm": T, "ddim": 50}  # sampling steps, by default
SEEDS = (0, 2**32 - 1)  # least and greatest: torch's CPU generator uses 32 bits of a seed
GUIDANCE = 2.0  # the least strength tried at which 99.5% of model.pth's digits are as requested
BLOCKS = ("in-context", "cross-attention", "adaLN", "adaLN-Zero")  # the order of DiT section 3.2


def option(default, help, **argparse_settings):
    """A dataclass field that `train.py` offers on its command line, with its default and help."""
    flag = type(default) is bool
    kind = {"action": BooleanOptionalAction} if flag else {"type": type(default)}
    described = {"help": f"{help} (default: {default})"}
    return field(default=default, metadata=described | kind | argparse_settings)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `DiT`; stored in the checkpoint. SettingError for sizes that do not fit."""

    image_size: int = option(28, "side of the images: MNIST's 28, or more with a black border")
    patch_size: int = option(4, "side of a square patch; must divide the side of the images")
    in_channels: int = 1  # grey; the paper's latents have 4
    hidden_size: int = option(64, "width of a token; a multiple of 4 and of the number of heads")
    depth: int = option(3, "number of blocks")
    num_heads: int = option(4, "attention heads of a block")
    block: str = option("adaLN-Zero", "how blocks use t and y (DiT section 3.2)", choices=BLOCKS)
    mlp_ratio: float = option(4.0, "hidden width of a block's MLP over the width of a token")
    num_classes: int = 10  # and one more, the null class of guidance
    class_dropout_prob: float = option(0.1, "share of labels dropped in training, for guidance")
    predicts: str = option("eps", "what the output is: the noise eps, the image x_0, or v",
                           choices=("eps", "x_0", "v"))
    learn_sigma: bool = option(False, "predict the variance of a step too, as the paper does")
    # The paper's code has 0.02 for both, at widths from 384. At width 64, that learns slowly.
    label_init_std: float = option(1.0, "initial standard deviation of the label embeddings")
    time_init_std: float = option(0.1, "initial standard deviation of the time MLP's weights")

    def __post_init__(self):
        sizes = {f.name: (1, 2**14) for f in fields(self) if f.type is int}
        _check(self, **sizes, mlp_ratio=(0, 2**14), class_dropout_prob=(0, 1),
               label_init_std=(0, 2**14), time_init_std=(0, 2**14))
        require(self.hidden_size * self.mlp_ratio >= 1, "mlp_ratio leaves the MLP no hidden unit")
        for size, part in (("image_size", "patch_size"), ("hidden_size", "num_heads")):
            require(getattr(self, size) % getattr(self, part) == 0, f"{part} "
                    f"{getattr(self, part)} does not divide {size} {getattr(self, size)}")
        require(self.hidden_size % 4 == 0, "hidden_size must be a multiple of 4")

    @property
    def out_channels(self) -> int:
        """Channels of the output: with learn_sigma, twice those of an image (DiT section 3.2)."""
        return self.in_channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of a training run. SettingError for values out of range."""

    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: int = option(500, "passes over the training images")
    batch_size: int = option(300, "images per step; an epoch's incomplete last batch is dropped")
    loss: str = option("l1", "loss on the noise; the papers have mse", choices=("l1", "mse"))
    min_snr: float = option(0.3, "weight of t: min(SNR, MIN_SNR) / SNR (its paper: 5); 0: equal")
    optimizer: str = option("muon", "muon: Muon for the blocks' matrices, AdamW for the rest",
                            choices=("muon", "adamw"))
    lr: float = option(0.005, "peak learning rate")
    lr_schedule: str = option("cosine", "decay to 0, or constant", choices=("cosine", "constant"))
    ema_decay: float = option(0.9999, "maximum decay of the EMA; sampling uses its weights")
    seed: int = option(0, "seeds initial weights, image order, t, noise and dropped labels")
    limit: int = option(0, "use only the first LIMIT images of each split; 0: all")
    data_dir: str = option("mnist", "directory that holds MNIST/raw/ with the four archives")
    checkpoint: str = option("model.pth", "the weights; all other files are written next to it")
    checkpoint_every: int = option(1000, "steps between checkpoints")
    device: str = option("auto", "cpu, cuda, mps, ...; auto is a GPU if there is one")
    compile: bool = option(True, "faster steps: C++ blocks on a CPU, else torch.compile")

    def __post_init__(self):
        _check(self, epochs=(1, 1_000_000), batch_size=(1, MNIST_IMAGES), limit=(0, MNIST_IMAGES),
               checkpoint_every=(1, 10**9), seed=SEEDS, min_snr=(0, 1e9), lr=(1e-12, 1e3),
               ema_decay=(0, 1 - 1e-9))
        require(self.batch_size <= (self.limit or MNIST_IMAGES),
                f"batch_size {self.batch_size} exceeds limit {self.limit}")
        side = self.model.image_size
        require(side >= 28 and side % 2 == 0, f"image_size must be even and >= 28, not {side}")


class SettingError(ValueError):
    """A setting cannot be used; the message says why. Scripts exit with status 2."""


def require(condition: bool, sentence: str) -> None:
    """SettingError with this sentence unless the condition holds."""
    if not condition:
        raise SettingError(sentence)


def _check(config: object, **ranges: tuple[float, float]) -> None:
    """SettingError for a value out of its range or not among its option's choices."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices", ())
        require(not choices or value in choices, f"{f.name} must be one of {choices}, not {value}")
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        require(least <= value <= most, f"{name} must lie in [{least}, {most}], not {value}")


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PAPER = {  # DiT Table 1 (SIZES: depth, D, heads), for latents of 32 x 32 x 4 and ImageNet's classes
    f"DiT-{size}/{patch}": ModelConfig(32, patch, 4, D, depth, heads, num_classes=1000,
                                       learn_sigma=True, label_init_std=0.02, time_init_std=0.02)
    for size, (depth, D, heads) in SIZES.items() for patch in (8, 4, 2)}
SMALL = {"S": (3, 32, 2), "B": (3, 64, 4), "L": (6, 80, 5), "XL": (7, 96, 6)}
FAMILY = {  # Table 1 for MNIST: widths / 12 or so, depths / 4, heads of 16. B/4 is the default.
    f"{size}/{patch}": ModelConfig(patch_size=patch, hidden_size=D, depth=depth, num_heads=heads)
    for size, (depth, D, heads) in SMALL.items() for patch in (7, 4, 2)}
