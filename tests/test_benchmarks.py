"""The benchmarks run, and compare with the roofline."""

import pytest

from benchmarks import sampling, training

SMALL = ["--hidden-size", "16", "--depth", "1", "--batch-size", "8", "--rounds", "1",
         "--device", "cpu"]


@pytest.mark.parametrize("benchmark", [training, sampling])
def test_both_kinds_are_compared_with_the_roofline(benchmark, capsys):
    benchmark.main(SMALL)
    assert capsys.readouterr().out.count("x roofline") == 2
