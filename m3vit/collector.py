"""Python's garbage collector, which has nothing to find while modules are imported. No torch."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """Import within this what a command computes with: torch, and what builds on it.

    They are half a million objects that stay. The collector looks through them again and again while they come, and
    once more when the process ends: two of the five seconds of processor time of one that imports what trains, and
    ends. Here it is off, and it never looks at what is there afterwards. Where torch is there already, nothing is done:
    the process is not a command's own, or has begun to work.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
