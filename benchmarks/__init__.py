"""Speed, measured: run with `python -m benchmarks.NAME`."""
