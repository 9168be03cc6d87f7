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
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from m3vit.errors import InputError

HEAD_S = 10.0  # for a request's head to arrive, and for what is left of a body that nobody waits for
STALL_S = 10.0  # without a byte of an answer being taken
MAX_CONNECTIONS = 256
WAITING = 4096  # to be accepted, if the system allows (net.core.somaxconn); one too many would try again after 1 s
CLOSING = 8  # connections that may be on their way out beside those
SPARE_DESCRIPTORS = 12  # for what the process opens now and then: /proc, a graph
KERNEL_BYTES = 1 << 18  # of a connection, each way; by itself the kernel keeps megabytes for one that does not read
DISCARD_BYTES_S = 32 << 20  # of bodies whose requests have been answered, from all clients together
_BUFFER_BYTES = 1 << 16  # in the hands of asyncio, each way
_SLICE_BYTES = 1 << 9  # of a chunked body, parsed at first; then as much as has come
_WATCH_S = 0.25  # between two looks at all connections
_RETRY_S = 0.1  # after the system refused to accept


class Connection(H11Protocol):
    """One client's connection, with limits on its time. `held`: its request has a place, so it makes no room."""

    def __init__(self, crowd: "Crowd", *, app_state: dict[str, Any], **options: Any) -> None:
        super().__init__(app_state={**app_state, "connection": self}, **options)
        self.crowd = crowd
        self.held = self.dropped = self.discarding = False
        self.idle_since = self.moved_at = self.loop.time()
        self._unread = self._sent = self._body = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(_BUFFER_BYTES)
        transport.max_size = _BUFFER_BYTES  # type: ignore[attr-defined] # of one read; asyncio's own is larger
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self.crowd.joined(self)
        if self.crowd.stopping:  # accepted just before, and not among those that are asked to end
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.crowd.left(self)

    def data_received(self, data: bytes) -> None:
        if self.discarding:
            self.crowd.discard(len(data), self.transport)
            return
        while data and not self.dropped:
            # Until the head has come, it may be the one of a chunked body.
            chunked = self.idle or any(name == b"transfer-encoding" for name, _ in self.headers)
            piece = data[: max(_SLICE_BYTES, self._sent)] if chunked else data
            data = data[len(piece) :]
            before = None if self.idle else len(self.cycle.body)
            super().data_received(piece)
            if chunked and before is not None:
                self._check_chunks(len(piece), len(self.cycle.body) - before)
        if not self.idle and self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
            # The next request was sent ahead. Nobody but floods does so, and HTTP lets us close after this one.
            self.cycle.keep_alive = False

    def _check_chunks(self, sent: int, body: int) -> None:
        """Drop a client whose chunks are tiny: each takes as long to parse as kilobytes of a large one."""
        self._sent, self._body = self._sent + sent, self._body + body
        if self._sent >= _SLICE_BYTES and self.unfinished and self._body < 0.8 * self._sent:
            self.cut("chunks")

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        self._sent = self._body = 0
        super().on_response_complete()

    def shutdown(self) -> None:
        """End what is idle; uvicorn calls this once, when it stops."""
        if self.discarding:
            self.transport.abort()
        else:
            super().shutdown()

    @property
    def idle(self) -> bool:
        """Whether no request is in hand: it is still to come, or answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def unfinished(self) -> bool:
        """Whether a request's body is still to come."""
        return self.conn.their_state is h11.SEND_BODY

    def check(self, now: float) -> None:
        """Cut the connection if its client has taken too long over a head, or stopped taking an answer."""
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread or not unread:
            self._unread, self.moved_at = unread, now
        elif now - self.moved_at > STALL_S:
            self.cut("stalled")
        if self.idle and now - self.idle_since > HEAD_S:
            if self.discarding:
                self.transport.abort()
            elif not self.transport.is_closing():
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


class _Lingering:
    """A transport whose `close`, while a body is still coming, lets the client read its answer first.

    Closed at once, the system would answer what comes with a reset, and the answer may be lost with it.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.discarding or self._transport.is_closing()

    def close(self) -> None:
        if not self._connection.unfinished or self._connection.crowd.stopping:
            self._transport.close()
        elif not self._connection.discarding:
            self._connection.discarding = True
            try:
                self._transport.write_eof()
            except OSError:  # the client has gone
                self._transport.abort()
            else:
                self._transport.resume_reading()


class CloseUnfinished:
    """ASGI middleware: an answer that comes before the request's body has is the last on its connection."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get("state", {}).get("connection")

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and connection and connection.unfinished:
                message = {**message, "headers": [*message.get("headers", []), CLOSE_HEADER]}
            await send(message)

        await self.app(scope, receive, closing)


class Crowd:
    """All open connections of a service, at most `limit`.

    `count` is told why one was cut: head, stalled, chunks, crowded.
    """

    def __init__(self, limit: int, count: Callable[[str], None]) -> None:
        self.limit, self.count = limit, count
        self.open: set[Connection] = set()
        self.opening = 0  # accepted, but perhaps not in `open` yet
        self.stopping = False
        self.on_left: list[Callable[[], None]] = []
        self._discarded = 0
        self._discarding: list[asyncio.Transport] = []

    def left(self, connection: Connection) -> None:
        self.open.discard(connection)
        for call in self.on_left:
            call()

    def joined(self, connection: Connection) -> None:
        self.opening -= 1
        self.open.add(connection)
        self._drop_idlest(0)

    def make_room(self) -> bool:
        """Drop the idlest connection if there are as many as may be; return whether one more may be accepted."""
        self._drop_idlest(1)
        return len(self.open) + self.opening < self.limit + CLOSING

    def _drop_idlest(self, more: int) -> None:
        """Drop what is too much if there are to be so many more.

        The oldest of those without a request in hand go first, then those whose requests have no place.
        """
        over = self.opening + more - self.limit
        if len(self.open) + over <= 0:
            return
        live = [one for one in self.open if not one.dropped]
        if (excess := len(live) + over) <= 0:
            return
        droppable = sorted((one for one in live if not one.held), key=lambda one: (not one.idle, one.idle_since))
        for one in droppable[:excess]:
            one.cut("crowded")

    def discard(self, count: int, transport: asyncio.Transport) -> None:
        """Note bytes that nobody wants; more than a share of the time does not go into reading them."""
        self._discarded += count
        if self._discarded > DISCARD_BYTES_S * _WATCH_S:
            transport.pause_reading()
            self._discarding.append(transport)

    async def watch(self) -> None:
        """Hold all connections to their limits, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self.open):
                connection.check(now)
            self._discarded, waiting, self._discarding = 0, self._discarding, []
            for transport in waiting:
                transport.resume_reading()


class _Acceptor:
    """Accepts on one socket; for uvicorn, what an asyncio.Server is."""

    def __init__(self, listening: socket.socket, make: Callable[[], Connection], crowd: Crowd) -> None:
        listening.setblocking(False)
        self.listening, self.make, self.crowd = listening, make, crowd
        self.loop = asyncio.get_running_loop()
        self.tasks = {self.loop.create_task(crowd.watch())}  # or they might be collected before they are done
        self.closed = False
        crowd.on_left.append(self._resume)
        self._resume()

    def _resume(self) -> None:
        if not self.closed:
            self.loop.add_reader(self.listening, self._accept)

    def _accept(self) -> None:
        """Accept what waits, but not more at a time than may be closing meanwhile."""
        for _ in range(CLOSING):
            if not self.crowd.make_room():
                self.loop.remove_reader(self.listening)  # until one has left
                return
            try:
                accepted, _address = self.listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Something else took what was spared for it: it may be free again soon.
                    self.loop.remove_reader(self.listening)
                    self.loop.call_later(_RETRY_S, self._resume)
                    return
                continue  # the client had gone
            self.crowd.opening += 1
            task = self.loop.create_task(self._open(accepted))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _open(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)
        try:
            await self.loop.connect_accepted_socket(self.make, accepted)
        except OSError:  # the client had gone
            accepted.close()
            self.crowd.opening -= 1

    def close(self) -> None:
        """Accept no more; connections stay, under their limits."""
        self.closed = self.crowd.stopping = True
        self.loop.remove_reader(self.listening)

    async def wait_closed(self) -> None:
        """Called when all connections are gone."""
        for task in self.tasks:
            task.cancel()


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
    spare = used + SPARE_DESCRIPTORS + CLOSING
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
        listening = socket.create_server((host, port), family=family, backlog=WAITING)
    except OSError as error:
        # Of a name that is unknown, the number means something else.
        known = error.errno and not isinstance(error, socket.gaierror)
        reason = os.strerror(error.errno).lower() if known else error.strerror or str(error)  # type: ignore[arg-type]
        raise InputError(f"cannot listen on {host} port {port}: {reason}; give another --port or --host") from error
    for kind in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # of the connections accepted on it
        listening.setsockopt(socket.SOL_SOCKET, kind, KERNEL_BYTES)
    return listening
