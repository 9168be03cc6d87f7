"""What requests of `m3vit serve` may hold at a time: places, bytes of images, bytes of answers. No torch.

A request has a place from before its body is read until its answer has been taken, or its client has been too slow for
it. So memory is bounded by the places and the two allowances of bytes, whatever clients do. Slow clients are left alone
while nobody else wants what they hold, up to a limit; those that are slower than that, or in the way, are cut off.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 10.0  # that a client may take besides the time its bytes take at SLOWEST
SLOWEST = 1 << 14  # bytes a second
GRACE_S = {"body": 3.0, "answer": 1.0}  # before a transfer may have to make way for others
FAIR = 1 << 20  # bytes a second; faster ones do not make way
_LOOK_S = 0.25  # between two looks


class Transfer:
    """A "body" that comes or an "answer" that goes. `moved`: its bytes so far. `stopped`: it was cut off."""

    def __init__(self, kind: str, place: "Place", cut: Callable[[], object]) -> None:
        self.kind, self.place, self.cut = kind, place, cut
        self.moved, self.stopped = 0, False
        self.began = self.moved_at = _now()

    def move(self, count: int) -> None:
        """Note that `count` bytes more have passed."""
        self.moved += count
        self.moved_at = _now()

    def too_slow(self) -> bool:
        """Whether its client's time is over: it stalls, or goes on at less than SLOWEST."""
        now = _now()
        return now - self.moved_at > PATIENCE_S or now - self.began > PATIENCE_S + self.moved / SLOWEST

    def in_the_way(self) -> bool:
        """Whether it has to make way when others wait."""
        seconds = _now() - self.began
        return seconds > GRACE_S[self.kind] and self.moved < FAIR * seconds

    def stop(self) -> None:
        """Cut it off, and free its place."""
        self.stopped = True
        self.place.places.count(f"slow {self.kind}")
        self.cut()
        self.place.release()


class Place:
    """One request's right to be in hand, and what it holds beside it."""

    def __init__(self, places: "Places") -> None:
        self.places = places
        self._held: list[Callable[[], None]] = []
        self._released = False

    def holds(self, give_back: Callable[[], object]) -> Callable[[], None]:
        """Have `give_back` called when the place is released, or earlier by what is returned; once in any case."""
        once = _once(give_back)
        self._held.append(once)
        if self._released:
            once()
        return once

    async def reserve(self, allowance: "Allowance", count: int, kind: str) -> Callable[[], None]:
        """Wait for bytes of an allowance that slow transfers of a kind may hold: they have to make way.

        Returns what gives them back; releasing the place does so too.
        """

        async def take() -> Callable[[], None]:
            await allowance.take(count)
            return self.holds(lambda: allowance.give(count))

        task = asyncio.ensure_future(take())
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_S)
                if not task.done():
                    self.places.make_way(kind)
        finally:
            task.cancel()  # does nothing to one that is done
        return task.result()

    def release(self) -> None:
        """Give back the place and what it holds; more than once does nothing more."""
        if self._released:
            return
        self._released = True
        self.places.free += 1
        for give_back in self._held:
            give_back()

    @contextmanager
    def transfer(self, kind: str, cut: Callable[[], object]) -> Iterator[Transfer]:
        """A transfer of bytes that is watched while the context lasts; `cut` ends it if its client is too slow."""
        transfer = Transfer(kind, self, cut)
        loop = asyncio.get_running_loop()

        def look() -> None:
            if transfer.too_slow():
                transfer.stop()
            else:
                timers[0] = loop.call_later(_LOOK_S, look)

        timers = [loop.call_later(_LOOK_S, look)]
        self.places.transfers.add(transfer)
        try:
            yield transfer
        finally:
            timers[0].cancel()
            self.places.transfers.discard(transfer)


class Places:
    """So many requests may be in hand. `count` is told why one was cut off: slow body, slow answer."""

    def __init__(self, count_of_places: int, count: Callable[[str], None]) -> None:
        self.free, self.count = count_of_places, count
        self.transfers: set[Transfer] = set()

    def take(self) -> Place | None:
        """Return a place, if need be that of the slowest client in the way; None if there is none."""
        if not self.free:
            self.make_way()
        if not self.free:
            return None
        self.free -= 1
        return Place(self)

    def make_way(self, kind: str | None = None) -> None:
        """Cut off the slowest transfer (of a kind) that is in the way, if one is."""
        now = _now()
        slow = [one for one in self.transfers if one.in_the_way() and not one.stopped and kind in (None, one.kind)]
        if slow:
            min(slow, key=lambda one: one.moved / (now - one.began)).stop()


class Allowance:
    """Bytes that requests may hold together; one that wants more than all of them gets it when nobody holds any."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> None:
        """Return when `count` bytes are ours, first come, first served; give them back with `give`."""
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(count)
            self._serve()  # it may have stood before one that fits
            raise

    def give(self, count: int) -> None:
        self.used -= count
        self._serve()

    def _serve(self) -> None:
        while self._queue:
            count, turn = self._queue[0]
            if not turn.cancelled():
                if self.used and self.used + count > self.limit:
                    return
                self.used += count
                turn.set_result(None)
            self._queue.popleft()


def _once(function: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls another the first time."""
    left = [function]

    def call() -> None:
        if left:
            left.pop()()

    return call


def _now() -> float:
    return asyncio.get_running_loop().time()
