"""What the benchmarks share: the roofline, and medians of many calls.

The roofline is the time that the arithmetic alone takes, at the rate of a large matrix product in
the same run.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 5


def seconds(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    """The mean time per call, over `repeats` calls in a row."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


def medians(device: torch.device, calls: dict[str, Callable[[], object]], rounds: int,
            in_a_row: int = 1) -> tuple[dict[str, float], float]:
    """The median time of each call, and the rate of a large float32 product in operations/s.

    A median is over `rounds` measurements of `in_a_row` calls. The calls and the product take
    turns: if the machine slows down, it slows all of them down.
    """
    side = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device)
    calls = {**calls, "product": lambda: a @ b}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(device, call, 10 if name == "product" else in_a_row))
    middle = {name: statistics.median(values) for name, values in times.items()}
    return middle, 2 * side**3 / middle.pop("product")


def about(device: torch.device) -> str:
    """The software and hardware of the measurement."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {name}"
