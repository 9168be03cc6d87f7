"""Which requests `m3vit serve` answers, by the names in them: no page of another site may use it. No torch.

A browser lets any page send a simple request to any address, and a page whose own name was pointed to this machine
(DNS rebinding) may read the answers too. So requests that name another host are refused, and those that a page of
another site sent. Programs that are no browsers send neither Origin nor Sec-Fetch-Site, and are not concerned.
"""

import ipaddress
import json
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/metrics")  # for checkers by any name; they say nothing of images, and nothing is done
ANY = "*"
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?")


class Hosts:
    """The hosts that a service answers for: names, `*.example.org` for all below one, or `*` for all.

    Addresses: the machine's own that the client connected to, and if all are listened on, any: an address cannot be
    pointed elsewhere, and behind address translation the machine does not know its own.
    """

    def __init__(self, names: Iterable[str], allowed: Iterable[str] = (), every_address: bool = False) -> None:
        self.allowed = {name.lower().rstrip(".") for name in allowed}
        self.names, self.every_address = {*names, *self.allowed}, every_address

    @classmethod
    def of(cls, host: str, bound: str, allowed: Iterable[str] = ()) -> "Hosts":
        """Return those of a service started with `--host host --allowed-hosts allowed`, listening on address `bound`.

        They are localhost, the machine's name, `host` and `allowed`.
        """
        machine = socket.gethostname().lower()
        first = machine.split(".")[0]
        names = ["localhost", bound, host.lower(), machine, first, f"{first}.local"]
        return cls(names, allowed, ipaddress.ip_address(bound.split("%")[0]).is_unspecified)

    def answers_for(self, host: str, connected_to: str | None) -> bool:
        """Return whether a Host header (or an Origin's host) is ours. `connected_to`: the client's end of us."""
        name = _without_port(host)
        if ANY in self.names or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return any(one.startswith("*.") and name.endswith(one[1:]) for one in self.names)
        return self.every_address or address.is_loopback or name == (connected_to or "").split("%")[0]

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and message if a request is to be refused."""
        headers, server = Headers(scope=scope), (scope.get("server") or (None,))[0]
        host = headers.get("host")  # without one (HTTP/1.0), it is no browser's
        if host is not None and scope["path"] not in OPEN_PATHS and not self.answers_for(host, server):
            message = f"this service does not answer for {host[:100]!r}"
            return 400, f"{message}: if that is its name, start it with --allowed-hosts {_without_port(host)[:100]}"
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):  # nothing is done, and other sites cannot read the answer
            return None
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is not None:
            ours = site in ("same-origin", "none")
        elif origin is not None:
            theirs = origin.partition("://")[2].lower()  # scheme://host[:port] or null
            # Behind a proxy that names us differently, the page has the name that was allowed.
            ours = bool(theirs) and (theirs == (host or "").lower() or _without_port(theirs) in self.allowed)
        else:
            return None
        if ours:
            return None
        return 403, f"a page of {origin or 'another site'!r} sent this: only this service's own page may"


class HostsOnly:
    """ASGI middleware: refuses what `Hosts` does not let pass."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self.hosts.refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        status, message = refusal
        body = json.dumps({"error": message}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def is_host_pattern(text: str) -> bool:
    """Return whether a text can stand in `Hosts.names`: a name or an address, without scheme, port or path."""
    if text == ANY or _NAME.fullmatch(text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    """Return the name in "name:port" or "[address]:port", in lower case, without a dot at its end."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")
