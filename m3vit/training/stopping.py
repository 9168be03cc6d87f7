"""Signals that ask a training run to stop: it finishes its step, writes a checkpoint and ends.

SIGTERM is what clusters send before they take a node away, SIGUSR1 what Slurm can be told to send some time before
(--signal=USR1@120), SIGINT is Ctrl-C. The exit code is 128 + the signal's number (143, 138, 130), as shells have it:
the run is not finished, and neither `m3vit train ... && m3vit eval ...` nor a scheduler should think so.
"""

import signal
import threading
from types import FrameType
from typing import Any

from m3vit.collectives import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 (not an error)
    """Training stopped because of a signal, with its checkpoint written."""

    def __init__(self, kind: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {kind.name} after step {step}; continue with --resume")
        self.exit_code = 128 + kind


class StopSignals:
    """Within `with`, notes a signal instead of obeying it: `received` is the first one, or None.

    A second Ctrl-C interrupts at once. Not so under torchrun, which passes Ctrl-C on to processes that the terminal has
    sent it to already.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        # Only the main thread may take signals; elsewhere (a notebook's thread) they stay as they are.
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {kind: signal.signal(kind, self.note) for kind in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        if number == signal.SIGINT and self.received and world_size() == 1:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
