"""What a script does before it imports torch, which takes seconds and reads OpenMP's settings once. Imports nothing slow."""

import os
import signal


def before_torch() -> None:
    """Let Ctrl-C during the imports end the script without a traceback, and let threads that wait long go to sleep."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A thread of GNU's OpenMP that waits for the others spins for milliseconds. While another program keeps one of these
    # from its core, that can make sampling on two cores several times slower. Figures: benchmarks/README.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
