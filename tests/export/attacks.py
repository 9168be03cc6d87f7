"""Clients that take their time: each keeps up one attack on a service, in a thread, until stopped."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Begin = Callable[[socket.socket], None]


class Attack:
    """Keeps `count` connections; each gets `head` and then `drip` every `pause` seconds. One that is cut comes again.

    `reads`: bytes taken of the answer at each turn. `begun` counts connections.
    """

    def __init__(self, port: int, count: int, head: bytes, drip: bytes, pause: float = 0.5, reads: int = 0) -> None:
        self.port, self.head, self.drip, self.pause, self.reads = port, head, drip, pause, reads
        self.begun = 0
        self.sockets: list[socket.socket | None] = [None] * count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _connect(self) -> socket.socket | None:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        try:
            connection.connect(("127.0.0.1", self.port))
            self.begun += 1
            connection.sendall(self.head)
        except OSError:
            connection.close()
            return None
        connection.setblocking(False)
        return connection

    def _alive(self, connection: socket.socket) -> bool:
        """Whether it is not cut: goes on with it."""
        try:
            if self.drip:
                connection.send(self.drip)
            elif not connection.recv(1, socket.MSG_PEEK):
                return False
            if self.reads:
                connection.recv(self.reads)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            for index, connection in enumerate(self.sockets):
                if connection is not None and not self._alive(connection):
                    connection.close()
                    connection = None
                self.sockets[index] = connection or self._connect()
            self._stop.wait(self.pause)

    def stop(self) -> None:
        """Close all connections."""
        self._stop.set()
        self._thread.join()
        for connection in filter(None, self.sockets):
            with suppress(OSError):
                connection.close()


def post(path: str, length: int, body: bytes = b"", host: str = "localhost") -> bytes:
    """The head of a request with a body of so many bytes, and some of them."""
    words = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\nContent-Length: {length}\r\n\r\n"
    return words.encode() + body


@contextmanager
def attacked(
    port: int, picture: bytes, readers: int = 24, heads: int = 300, bodies: int = 30
) -> Iterator[list[Attack]]:
    """Slow readers of large answers, half-sent heads and slow bodies, all at once."""
    attacks = [
        Attack(port, readers, post("/predict/normals?format=npy", len(picture), picture), b""),
        Attack(port, readers // 2, post("/predict/normals?format=npy", len(picture), picture), b"", reads=64),
        Attack(port, heads, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"x"),
        Attack(port, bodies, post("/predict/depth", 5_000_000, picture[:100]), b"x"),
    ]
    try:
        yield attacks
    finally:
        for attack in attacks:
            attack.stop()


class Watch:
    """Samples a figure all the time."""

    def __init__(self, figure: Callable[[], float], pause: float = 0.02) -> None:
        self.values: list[float] = []
        self._figure, self._pause = figure, pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.values.append(self._figure())
            time.sleep(self._pause)

    def stop(self) -> list[float]:
        """Return all samples."""
        self._stop.set()
        self._thread.join()
        return self.values
