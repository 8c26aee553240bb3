"""What a script does before it imports torch, which takes seconds and reads settings once."""

import os
import signal


def before_torch() -> None:
    """Let Ctrl-C end the script without a traceback, and waiting OpenMP threads sleep soon."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # which `&` in a shell script sets
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # They spin for milliseconds, which slows down two programs at once: benchmarks/README.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
