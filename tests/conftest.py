"""What the tests share: a network whose gates are open, and the real data set unpacked once."""

from pathlib import Path

import pytest
import torch

from config import ModelConfig
from dit import DiT

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)


@pytest.fixture
def small_config() -> ModelConfig:
    """A network of odd proportions: no two of its sizes are equal by chance."""
    return ModelConfig(image_size=12, patch_size=3, in_channels=2, hidden_size=24, depth=2, num_heads=3, mlp_ratio=2.0,
                       num_classes=5)


@pytest.fixture
def open_network(small_config) -> DiT:
    """A network in which every parameter is random, so that gates, shifts and the final layer all count."""
    torch.manual_seed(0)
    model = DiT(small_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model
