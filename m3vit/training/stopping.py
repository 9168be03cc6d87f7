"""Signals that ask a training run to stop: it finishes its step, writes a checkpoint and ends.

SIGTERM is what clusters send before they take a node away, SIGUSR1 what Slurm can be told to send some time before
(--signal=USR1@120), SIGINT is Ctrl-C. The exit code is 128 + the signal's number (143, 138, 130), as shells have it:
the run is not finished, and neither `m3vit train ... && m3vit eval ...` nor a scheduler should think so.
"""

import signal

from m3vit.collectives import world_size
from m3vit.signals import StopSignals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 (not an error)
    """Training stopped because of a signal, with its checkpoint written, or before it began (step None)."""

    def __init__(self, kind: signal.Signals, step: int | None) -> None:
        when = "before training began: start it again" if step is None else f"after step {step}; continue with --resume"
        super().__init__(f"stopped by {kind.name} {when}")
        self.exit_code = 128 + kind


def stop_signals() -> StopSignals:
    """Return what notes these signals; a second Ctrl-C interrupts at once.

    Not so under torchrun, which passes Ctrl-C on to processes that the terminal has sent it to already.
    """
    return StopSignals(SIGNALS, lambda kind: kind == signal.SIGINT and world_size() == 1)
