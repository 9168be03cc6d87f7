"""What clients of m3vit serve may do to it: each limit by itself, then slow clients of all kinds at once."""

import asyncio
import io
import json
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.types import Receive, Scope, Send

from m3vit.errors import InputError
from m3vit.export.runtime import admission, connections, serve
from m3vit.export.runtime.admission import Allowance, Places
from m3vit.export.runtime.connections import CloseUnfinished, Crowd, LimitedServer, listen, most_connections
from m3vit.export.runtime.hosts import Hosts, is_host_pattern
from m3vit.export.runtime.package import Package
from tests.export.attacks import Watch, attacked, post
from tests.export.serving import serving
from tests.export.test_runtime import CHANNELS, make_package

pytestmark = pytest.mark.process

LARGE = 8 << 20  # more than the kernel keeps of an answer that nobody reads


# --------------------------------------------------------------------------------------------------- hosts and pages


def request(hosts: Hosts, method: str = "POST", path: str = "/predict/depth", **headers: str) -> int | None:
    """Return the status that a request is refused with."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs, "server": ("10.0.0.7", 8000)}
    refusal = hosts.refusal(scope)
    return refusal[0] if refusal else None


def test_hosts() -> None:
    local = Hosts.of("127.0.0.1", "127.0.0.1")
    machine = socket.gethostname()
    for ours in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "localhost.", "10.0.0.7:80", machine):
        assert request(local, host=ours) is None, ours
    foreign = ("x", "evil.example", "evil.example:8000", "localhost.evil.example", "1.2.3.4", "10.0.0.8", "", "[::2]")
    for theirs in foreign:
        assert request(local, host=theirs) == 400, theirs
        assert request(local, "GET", "/", host=theirs) == 400
        assert request(local, "GET", "/health", host=theirs) is None
    assert request(local) is None, "HTTP/1.0 needs none, and no browser speaks it"
    everywhere = Hosts.of("0.0.0.0", "0.0.0.0", ["Vision.example", "*.example.org"])
    for ours in ("1.2.3.4:8000", "vision.example", "a.b.example.org"):
        assert request(everywhere, host=ours) is None, ours
    for theirs in ("example.org", "evilexample.org", "other.example"):
        assert request(everywhere, host=theirs) == 400, theirs
    assert request(Hosts.of("::", "::", ["*"]), host="any.example") is None


def test_pages_of_other_sites() -> None:
    hosts = Hosts.of("127.0.0.1", "127.0.0.1", ["vision.example"])
    here = {"host": "localhost:8000"}
    for headers in (
        {},
        {"sec_fetch_site": "same-origin", "origin": "http://localhost:8000"},
        {"sec_fetch_site": "none"},
        {"origin": "http://localhost:8000"},
        {"origin": "https://vision.example"},
    ):
        assert request(hosts, **here, **headers) is None, headers
    for headers in (
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site", "origin": "http://localhost:3000"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://localhost"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://["},
        {"origin": "http://localhost:8000@evil.example"},
    ):
        assert request(hosts, **here, **headers) == 403, headers
        assert request(hosts, "GET", "/", **here, **headers) is None
    assert request(Hosts(["*"]), host="evil.example", origin="http://other.example") == 403


def test_names_of_hosts() -> None:
    for good in ("a", "a.b-c.example", "*.example.org", "*", "10.0.0.1", "::1", "my_service"):
        assert is_host_pattern(good), good
    for bad in ("http://a", "a:80", "a/b", "", "*.", "a*", "*a.example", "-a", "a b"):
        assert not is_host_pattern(bad), bad


# ------------------------------------------------------------------------------------------------ places and allowances


def test_allowance_is_first_come_first_served() -> None:
    async def run() -> None:
        budget, got = Allowance(10), []

        async def take(count: int) -> None:
            await budget.take(count)
            got.append(count)

        tasks = [asyncio.ensure_future(take(count)) for count in (6, 5, 4, 30)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert got == [6], "4 would fit, but 5 came first"
        tasks[1].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert got == [6, 4] and budget.used == 10
        budget.give(6)
        budget.give(4)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert got == [6, 4, 30], "more than all, when nobody has any"
        budget.give(30)
        assert budget.used == 0

    asyncio.run(run())


def test_slow_transfers_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(admission.GRACE_S, "body", 0.1)
    counted, cut = [], []

    async def run() -> None:
        places = Places(2, counted.append)
        slow, fast = places.take(), places.take()
        assert slow and fast and places.take() is None, "both are young"
        with (
            slow.transfer("body", lambda: cut.append("slow")),
            fast.transfer("body", lambda: cut.append("fast")) as one,
        ):
            one.move(10 << 20)
            await asyncio.sleep(0.15)
            assert cut == [], "nobody wants their places"
            taken = places.take()
            assert taken and cut == ["slow"] and counted == ["slow body"]
            assert places.take() is None, "the other is fast enough"
        for place in (slow, fast, taken, taken):
            place.release()
        assert places.free == 2

    asyncio.run(run())


def test_what_is_held_is_given_back_once() -> None:
    async def run() -> None:
        places, budget, given = Places(1, print), Allowance(10), []
        place = places.take()
        assert place
        await place.reserve(budget, 4, "body")
        give_back = await place.reserve(budget, 6, "body")
        give_back()
        assert budget.used == 4
        waiting = asyncio.ensure_future(place.reserve(budget, 7, "body"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        early = place.holds(lambda: given.append("thread"))
        early()
        place.release()
        give_back()
        place.holds(lambda: given.append("late"))
        assert budget.used == 0 and places.free == 1 and given == ["thread", "late"]

    asyncio.run(run())


@pytest.mark.parametrize("moves", [0, 1])
def test_transfers_have_a_last_moment(moves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a byte for PATIENCE_S, or with fewer than SLOWEST: over, although nobody waits."""
    monkeypatch.setattr(admission, "PATIENCE_S", 0.3)
    monkeypatch.setattr(admission, "_LOOK_S", 0.05)
    cut = threading.Event()

    async def run() -> None:
        place = Places(1, lambda _: None).take()
        assert place
        with place.transfer("answer", cut.set) as transfer:
            for _ in range(40):
                await asyncio.sleep(0.05)
                transfer.move(moves)
                if transfer.stopped:
                    return
        raise AssertionError("not cut")

    asyncio.run(run())
    assert cut.is_set()


# ------------------------------------------------------------------------------------------------------- connections


async def small_app(scope: Scope, receive: Receive, send: Send) -> None:
    """/large answers at length; the others at once, with the body unread."""
    if scope["type"] != "http":
        return
    body = bytes(LARGE) if scope["path"] == "/large" else b"here"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def test_many_may_wait_to_be_accepted() -> None:
    """More than there may be connections. One too many would try again after 1 s; here it never gets through."""
    most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    with listen("127.0.0.1", 0) as listening:
        clients = [connect(listening.getsockname()[1]) for _ in range(min(most, 2 * connections.MAX_CONNECTIONS))]
        for client in clients:
            client.close()


def test_a_client_that_has_gone_before_its_answer() -> None:
    """Its reset is there, and the event loop has not looked yet: closing the connection finds it closed."""
    closed = []
    with listen("127.0.0.1", 0) as listening:
        client = connect(listening.getsockname()[1])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                client.close()
                state: Any = SimpleNamespace(unfinished=True, discarding=False, crowd=SimpleNamespace(stopping=False))
                connections._Lingering(transport, state).close()  # type: ignore[arg-type]
                closed.append(transport.is_closing())

        async def run() -> None:
            async with await asyncio.get_running_loop().create_server(Connection, sock=listening):
                while not closed:
                    await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(run(), 10))
    assert closed == [True]


@contextmanager
def answering(limit: int = 8) -> Iterator[tuple[int, list[str]]]:
    """Run the small application in a thread; yields its port, and why connections were cut."""
    counted: list[str] = []
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(CloseUnfinished(small_app), lifespan="off", log_level="error", access_log=False)
    server = LimitedServer(config, Crowd(limit, counted.append))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1], counted
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(data)
    return connection


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    connection.close()
    return received


def answer(connection: socket.socket) -> bytes:
    """One answer of `small_app`."""
    received = b""
    while not received.endswith(b"here"):
        received += connection.recv(1000) or pytest.fail(f"only {received!r} came")
    return received


GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_heads_that_do_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.4)
    with answering() as (port, counted):
        silent, half, second = connect(port), connect(port, b"GET / HT"), connect(port, GET % b"")
        assert answer(second).startswith(b"HTTP/1.1 200")
        second.sendall(b"GET /again")
        end = time.monotonic() + 30
        while not select.select([half], [], [], 0.1)[0]:
            assert time.monotonic() < end, "a byte now and then prolongs it"
            half.send(b"T")
        for connection in (silent, half, second):
            refusal = everything(connection)
            assert refusal.startswith(b"HTTP/1.1 408") and b'{"error": ' in refusal
        assert counted == ["head"] * 3


def test_answers_that_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALL_S", 0.4)
    with answering() as (port, counted):
        stalled, reading = connect(port, GET % b"large"), connect(port, GET % b"large")
        received, start = 0, time.monotonic()
        while not counted or time.monotonic() < start + 1.5:  # slowly, but on and on
            assert time.monotonic() < start + 30
            received += len(reading.recv(1 << 16))
            time.sleep(0.05)
        assert counted == ["stalled"]
        while received < LARGE:
            received += len(reading.recv(1 << 20))
        assert len(everything(stalled)) < LARGE
        reading.close()


def test_the_idlest_connection_makes_room() -> None:
    with answering(limit=4) as (port, counted):
        heads = [connect(port, b"GET / HT") for _ in range(12)]
        for _ in range(5):
            newcomer = connect(port, GET % b"")
            assert answer(newcomer).startswith(b"HTTP/1.1 200")
            newcomer.close()
        assert set(counted) == {"crowded"} and len(counted) >= 8
        assert everything(heads[0]) == b"", "the first were dropped first"
        for head in heads:
            head.close()


def test_an_answer_before_the_body_has_come_is_read_and_the_last() -> None:
    with answering() as (port, _):
        early = connect(port, post("/", 50_000_000, b"x" * 1000))
        for _ in range(50):
            early.sendall(bytes(1 << 16))  # taken, and thrown away
        last = everything(early)
        assert last.startswith(b"HTTP/1.1 200") and b"connection: close" in last and last.endswith(b"here")
        whole = connect(port, post("/", 4, b"body"))
        assert b"connection: close" not in answer(whole)
        whole.sendall(GET % b"")
        assert answer(whole), "this one goes on"
        whole.close()


def test_requests_sent_ahead_are_not_answered() -> None:
    with answering() as (port, _):
        assert everything(connect(port, GET % b"" * 50)).count(b"here") == 1


def test_chunks_of_a_byte(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    with serving(package) as server:
        head = b"POST /predict/depth HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert everything(connect(server.port, head + b"1\r\nx\r\n" * 500)) == b""
        assert server.metric('m3vit_cut_total{reason="chunks"}') == 1


def test_descriptors() -> None:
    program = (
        "import resource, sys; from m3vit.export.runtime.connections import most_connections\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))\n"
        "print(most_connections(18), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def most(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, str(soft), str(hard)], capture_output=True, text=True)

    found, limit = map(int, most(64, 64).stdout.split())
    assert limit == 64 and 22 <= found <= 44
    found, limit = map(int, most(64, 4096).stdout.split())
    assert found == connections.MAX_CONNECTIONS < limit < 400, "raised as far as needed"
    assert "may open 40 files, too few for 18 requests" in most(40, 40).stderr
    assert most_connections(1000) >= 1004
    assert issubclass(InputError, ValueError)


# ----------------------------------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("package") / "onnx")


def picture(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite(package: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Package.load(package)
    monkeypatch.setattr(loaded._sessions, "run", lambda *_, **__: [np.full((1, 1, 8, 12), value, np.float32)])
    service = serve.Service(loaded, list(CHANNELS), serve.Limits())
    for answer in serve.Format:
        with pytest.raises(serve.HTTPException, match="depth is not finite") as caught:
            service._work(picture(8, 12), "depth", serve.Answer(answer, serve.Resize.AUTO, True))
        assert caught.value.status_code == 500
    service.pool.shutdown()


def test_foreign_hosts_and_pages_are_refused_in_json(package: Path) -> None:
    with serving(package, "--allowed-hosts", "vision.example", "*.example.org") as server:
        image = {"Content-Type": "image/png"}
        status, message = server.error("POST", "/predict/depth", picture(8, 12), {**image, "Host": "evil.example"})
        assert status == 400 and "--allowed-hosts evil.example" in message
        status, message = server.error("POST", "/predict/depth", b"", {"Origin": "http://evil.example"})
        assert status == 403 and "http://evil.example" in message
        assert server.metric('m3vit_requests_total{status="403",task="depth"}') == 1
        for host in ("vision.example", "a.example.org:80", f"127.0.0.1:{server.port}"):
            assert server.request("POST", "/predict/depth", picture(8, 12), {**image, "Host": host})[0] == 200
        assert server.request("GET", "/health", headers={"Host": "evil.example"})[0] == 200


def test_a_place_is_held_until_the_answer_is_taken(package: Path) -> None:
    """Also under a wish to stop: the client has its limits then too, and the exit code is 0."""
    with serving(package, "--concurrency", 1, "--queue", 1) as server:
        image = picture(1000, 1400)
        held = [connect(server.port, post("/predict/normals?format=npy", len(image), image)) for _ in range(2)]
        assert held[0].recv(20).startswith(b"HTTP/1.1 200")
        status, body = server.post("/predict/depth", picture(8, 12))[::2]
        assert status == 503 and "2 requests are in hand" in json.loads(body)["error"]
        end = time.monotonic() + 20
        while server.post("/predict/depth", picture(8, 12))[0] == 503:  # until one has to make way
            assert time.monotonic() < end
            time.sleep(0.2)
        assert server.metric('m3vit_cut_total{reason="slow answer"}') >= 1
        for connection in held:
            connection.close()


@pytest.mark.slow
def test_slow_clients_of_all_kinds_at_once(package: Path) -> None:
    """Readers, heads and bodies, more of each than the service takes, for 12 s.

    Measured on two cores with eleven other jobs: memory 1.5 times idle, the slowest of 282 answers in 0.4 s. An answer
    that waits for one of these clients waits for 10 s (`HEAD_S`, `PATIENCE_S`); other jobs make it wait for less.
    """
    image = picture(480, 640)
    with serving(package) as server:
        for _ in range(3):
            assert server.post("/predict/normals?format=npy", image)[0] == 200
        idle, waits = server.resident_mib(), []
        memory = Watch(server.resident_mib)
        with attacked(server.port, image) as attacks:
            end = time.monotonic() + 12
            while time.monotonic() < end:
                for path in ("/health", "/metrics"):
                    start = time.monotonic()
                    assert server.request("GET", path)[0] == 200
                    waits.append(time.monotonic() - start)
                time.sleep(0.05)
            assert all(attack.begun for attack in attacks)
            for reason in ("crowded", "slow answer", "slow body"):
                assert server.metric(f'm3vit_cut_total{{reason="{reason}"}}') > 0, reason
        most = max(memory.stop())
        assert statistics.median(waits) < 1 and max(waits) < 8, f"{statistics.median(waits):.2f}, {max(waits):.2f} s"
        assert most < 2 * idle, f"{most:.0f} MiB, {idle:.0f} when idle"
        end = time.monotonic() + 20
        while server.post("/predict/depth", picture(8, 12))[0] != 200:
            assert time.monotonic() < end, "nobody attacks any more"
            time.sleep(0.2)
