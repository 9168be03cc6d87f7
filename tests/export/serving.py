"""`m3vit serve` in a process of its own, and what a client needs."""

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# No torch, no exporter: what a machine that only serves has.
PROGRAM = (
    "import sys; sys.modules.update(torch=None, timm=None, onnx=None, av=None)\n"
    "from m3vit.cli import main; sys.exit(main(sys.argv[1:]))"
)


@dataclass
class Server:
    """A running service."""

    process: subprocess.Popen
    port: int

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **options: Any
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request and return the status, the headers in lower case, and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {}, **options)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, image: bytes, kind: str = "image/png") -> tuple[int, dict[str, str], bytes]:
        """Post an image as the body."""
        return self.request("POST", path, image, {"Content-Type": kind})

    def error(self, *words: Any, **options: Any) -> tuple[int, str]:
        """Send a request that is refused; return the status and the message."""
        status, headers, body = self.request(*words, **options)
        assert headers["content-type"] == "application/json", body
        content = json.loads(body)
        assert list(content) == ["error"] and "\n" not in content["error"]
        return status, content["error"]

    def resident_mib(self) -> float:
        """Return the process's resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metric(self, name: str) -> float:
        """Return the value of a metric, with its labels as Prometheus writes them."""
        lines = self.request("GET", "/metrics")[2].decode().splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.rsplit(" ", 1)[0] == name), 0.0)


@contextmanager
def serving(package: Path, *words: object) -> Iterator[Server]:
    """Run `m3vit serve` on a free port; at the end it must stop by itself when asked to, and have said nothing bad."""
    command = [sys.executable, "-c", PROGRAM, "serve", str(package), "--port", "0", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        yield Server(process, int(line.split("http://127.0.0.1:")[1].split("/")[0]))
        if process.poll() is None:
            process.terminate()
        code, said = process.wait(30), process.stderr.read()
        assert (code, said) == (0, ""), (code, said)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
