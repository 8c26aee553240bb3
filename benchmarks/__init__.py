"""Speed: the scripts behind every figure, run with `python -m benchmarks.NAME`."""
