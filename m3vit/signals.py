"""Signals that ask a long command to stop: it finishes what it is at, and says so. No torch."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignals:
    """Within `with`, notes a signal of `kinds` instead of obeying it: `received` is the first one, or None.

    A second one interrupts at once, if it `insists`: by default, any.
    """

    def __init__(
        self, kinds: tuple[signal.Signals, ...], insists: Callable[[signal.Signals], bool] = lambda kind: True
    ) -> None:
        self.kinds, self.insists = kinds, insists
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        # Only the main thread may take signals; elsewhere (a notebook's thread) they stay as they are.
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {kind: signal.signal(kind, self.note) for kind in self.kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def note(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        if self.received and self.insists(signal.Signals(number)):
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
