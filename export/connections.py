"""The connections of `m3vit serve`: how many there may be, and how long a client may take over its part. No torch.

uvicorn waits for ever for a request's head and for an answer to be read, and asyncio's own accepting fails by the
thousand once descriptors run out. Here connections are accepted one at a time and only while there is room: the one
that has been idle longest makes room for the next, so a client that asks at once is always answered. What a request
in hand may take is in `admission.py`.
"""

import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from m3vit.errors import InputError

HEAD_S = 10.0  # for a request's head to arrive, and for what is left of a body that nobody waits for
STALL_S = 10.0  # without a byte of an answer being taken
MAX_CONNECTIONS = 256
SPARE_DESCRIPTORS = 12  # for what the process opens now and then: /proc, a temporary file, a graph
KERNEL_BYTES = 1 << 18  # of a connection, each way; by itself the kernel keeps megabytes for one that does not read
_WRITE_BYTES = 1 << 16  # of an answer in the hands of asyncio
_WATCH_S = 0.25  # between two looks at all connections
_RETRY_S = 0.1  # after the system refused to accept


class Connection(H11Protocol):
    """One client's connection, with limits on its time. `held`: its request has a place, so it makes no room."""

    def __init__(self, crowd: "Crowd", *, app_state: dict[str, Any], **options: Any) -> None:
        super().__init__(app_state={**app_state, "connection": self}, **options)
        self.crowd = crowd
        self.held = self.dropped = False
        self.idle_since = self.moved_at = self.loop.time()
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(_WRITE_BYTES)
        self.crowd.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.crowd.left(self)

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()  # first: a request that was sent ahead begins in here
        super().on_response_complete()

    @property
    def idle(self) -> bool:
        """Whether no request is in hand: it is still to come, or answered."""
        return self.cycle is None or self.cycle.response_complete

    def check(self, now: float) -> None:
        """Cut the connection if its client has taken too long over a head, or stopped taking an answer."""
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self.moved_at = unread, now
        elif now - self.moved_at > STALL_S:
            self.cut("stalled")
        if self.idle and now - self.idle_since > HEAD_S and not self.transport.is_closing():
            self.crowd.count("head")
            self.refuse(408, f"the request's head did not arrive within {HEAD_S:.0f} s")

    def cut(self, why: str | None = None) -> None:
        """Drop the connection and what is unsent. `why` is counted."""
        if why and not self.dropped:
            self.crowd.count(why)
        self.dropped = True
        self.transport.abort()

    def refuse(self, status: int, message: str) -> None:
        """Answer what is not a request, or not yet, and close."""
        body = json.dumps({"error": message}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            parts = (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(part) or b"" for part in parts))
        except h11.LocalProtocolError:  # it has been answered before its body had come
            self.transport.abort()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer as all refusals are; uvicorn's is plain text."""
        self.refuse(400, "this is not a valid HTTP/1.1 request")


class Crowd:
    """All open connections of a service, at most `limit`. `count` is told why one was cut: head, stalled, crowded."""

    def __init__(self, limit: int, count: Callable[[str], None]) -> None:
        self.limit, self.count = limit, count
        self.open: set[Connection] = set()
        self._left = asyncio.Event()

    def joined(self, connection: Connection) -> None:
        self.open.add(connection)

    def left(self, connection: Connection) -> None:
        self.open.discard(connection)
        self._left.set()

    async def room(self) -> None:
        """Return when one more connection may be accepted; the idlest is dropped for it."""
        while len(self.open) >= self.limit:
            self._left.clear()
            if victim := self.idlest():
                victim.cut("crowded")
            await self._left.wait()

    def idlest(self) -> Connection | None:
        """Return the connection to drop first: of those without a request in hand, else without a place, the oldest."""
        droppable = [one for one in self.open if not one.held and not one.dropped]
        return min(droppable, key=lambda one: (not one.idle, one.idle_since), default=None)

    async def watch(self) -> None:
        """Hold all connections to their limits, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self.open):
                connection.check(now)


class _Acceptor:
    """Accepts on one socket; for uvicorn, what an asyncio.Server is."""

    def __init__(self, listening: socket.socket, make: Callable[[], Connection], crowd: Crowd) -> None:
        listening.setblocking(False)
        self.listening, self.make, self.crowd = listening, make, crowd
        self.accepting = asyncio.create_task(self._accept())
        self.watching = asyncio.create_task(crowd.watch())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.crowd.room()
            try:
                accepted, _ = await loop.sock_accept(self.listening)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Something else took what was spared for it: one of ours goes, and the next attempt may succeed.
                    if victim := self.crowd.idlest():
                        victim.cut("crowded")
                    await asyncio.sleep(_RETRY_S)
                continue  # or the client had gone
            with suppress(OSError):  # as well
                await loop.connect_accepted_socket(self.make, accepted)

    def close(self) -> None:
        """Accept no more; connections stay, under their limits."""
        self.accepting.cancel()

    async def wait_closed(self) -> None:
        """Called when all connections are gone."""
        self.watching.cancel()


class LimitedServer(uvicorn.Server):
    """uvicorn, with connections accepted and watched here."""

    def __init__(self, config: uvicorn.Config, crowd: Crowd) -> None:
        super().__init__(config)
        self.crowd = crowd

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        make = partial(
            Connection,
            self.crowd,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )
        self.servers = [_Acceptor(one, make, self.crowd) for one in sockets or []]  # type: ignore[misc]


def most_connections(places: int) -> int:
    """Return how many connections this process has descriptors for, with `places` requests in hand beside them.

    The soft limit on descriptors is raised if that is needed and allowed. Raises InputError if there are too few.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return max(MAX_CONNECTIONS, 2 * places)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        used = 32
    spare = used + SPARE_DESCRIPTORS + places  # a form's large image is in a temporary file while it comes
    wanted = max(MAX_CONNECTIONS, 2 * places)
    if 0 <= soft < spare + wanted:
        allowed = spare + wanted if hard < 0 else min(spare + wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
            soft = max(soft, allowed)
        wanted = min(wanted, soft - spare)
    if wanted < places + 4:  # so that there always is one to drop
        raise InputError(
            f"this process may open {soft} files, too few for {places} requests at a time and their connections: allow "
            f"{spare + places + 4} (ulimit -n), or give a smaller --queue"
        )
    return wanted


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, or raise InputError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        # Of a name that is unknown, the number means something else.
        known = error.errno and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno).lower() if known else error.strerror or str(error)  # type: ignore[arg-type]
        raise InputError(f"cannot listen on {host} port {port}: {reason}; give another --port or --host") from error
    for kind in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # of the connections accepted on it
        listening.setsockopt(socket.SOL_SOCKET, kind, KERNEL_BYTES)
    return listening
