"""The sinusoid against a loop, and the order of its halves."""

import math

import pytest
import torch

from time_emb import TimestepEmbedder, sinusoid


def test_sinusoid_against_a_loop():
    t = torch.tensor([0, 1, 17, 500, 999])
    ours = sinusoid(t, 256)
    assert ours.shape == (5, 256) and ours.dtype == torch.float32
    for n, time in enumerate(t.tolist()):
        for i in range(128):
            omega = 10_000 ** (-i / 128)
            assert ours[n, i].item() == pytest.approx(math.cos(time * omega), abs=2e-4)  # float32 angles up to 999
            assert ours[n, 128 + i].item() == pytest.approx(math.sin(time * omega), abs=2e-4)


def test_cosines_come_first():
    at_zero = sinusoid(torch.tensor([0]), 8)
    assert at_zero.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_frequencies_run_from_1_to_nearly_max_period():
    t = torch.tensor([1.0])
    sines = sinusoid(t, 256)[0, 128:]
    assert sines[0].item() == pytest.approx(math.sin(1), abs=1e-6)
    assert sines[127].item() == pytest.approx(10_000 ** (-127 / 128), rel=1e-4)


def test_embedder_tells_every_timestep_from_its_neighbour():
    torch.manual_seed(0)
    c = TimestepEmbedder(64)(torch.arange(1000))
    assert c.shape == (1000, 64)
    assert (c[1:] - c[:-1]).norm(dim=1).min() > 1e-3
