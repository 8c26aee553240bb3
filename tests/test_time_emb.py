"""The sinusoid against a loop, cosines first."""

import math

import pytest
import torch

from time_emb import sinusoid


def test_sinusoid_against_a_loop():
    t = torch.tensor([0, 1, 17, 500, 999])
    ours = sinusoid(t, 256)
    assert ours.shape == (5, 256)
    for n, time in enumerate(t.tolist()):
        for i in range(128):
            angle = time * 10_000 ** (-i / 128)  # in float32 there: up to 999
            assert ours[n, i].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert ours[n, 128 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)
