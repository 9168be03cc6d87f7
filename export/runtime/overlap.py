"""Stages of a film that run beside one another, and how steadily its frames come. No torch, no onnxruntime."""

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
ROOM = 2  # items between two stages: enough to even out one that is slow now and then; each is a picture
_LOOK_S = 0.1  # between two looks whether nobody wants more


def ahead(items: Iterable[T], stop: threading.Event) -> Generator[T, None, None]:
    """Yield items that a thread of their own makes, ROOM of them ahead; what making them raises is raised here.

    Closing the generator sets `stop`, ends the thread after the item it is at, and waits for that: what blocks must
    look at `stop` itself.
    """
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(ROOM)

    def put(entry: tuple[bool, T | BaseException | None]) -> None:
        while not stop.is_set():
            try:
                made.put(entry, timeout=_LOOK_S)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put((True, item))
                if stop.is_set():
                    return
            put((False, None))
        except BaseException as error:  # it is raised where the items are asked for
            put((False, error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = made.get()
            if more:
                yield item  # type: ignore[misc]
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


class Behind:
    """Calls made one after the other in a thread of their own, ROOM of them waiting; used with `with`.

    What a call raises is raised by a later `call`, or by `finish`, which waits for all; no other follows it. Leaving
    without it, because of another exception, ends after the call that runs.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called after the ones before."""
        while len(self._waiting) >= ROOM:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._run, function))

    def _run(self, function: Callable[[], None]) -> None:
        if not self._failed:
            self._failed = True  # unless it returns
            function()
            self._failed = False

    def finish(self) -> None:
        """Wait for all that was asked for."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Pace:
    """How long it takes from one frame to the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def tick(self) -> None:
        """Note that a frame is done."""
        now = time.perf_counter()
        if self._last is not None:  # the first also waits for graphs to be loaded
            self.seconds.append(now - self._last)
        self._last = now

    def percentile(self, percent: int) -> float:
        """Return the seconds that so many percent of the frames take at most."""
        if len(self.seconds) < 2:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    def line(self) -> str:
        """Return the rate and the percentiles in words; "" for a film of one frame."""
        if not self.seconds:
            return ""
        spread = ", ".join(f"{percent} % {1000 * self.percentile(percent):.1f}" for percent in (50, 95, 99))
        return f"{len(self.seconds) / sum(self.seconds):.1f} frames a second; ms from one to the next: {spread}"
