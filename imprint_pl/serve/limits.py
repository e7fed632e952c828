"""Refuses requests before anything is computed: foreign hosts and origins, bodies that are too
large or too slow, and too many requests.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.values import is_count, is_number

# The types of ASGI.
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# How many bodies of the largest size the server keeps in memory at the same time.
HELD = 4

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Headers of every answer. With them, pages of other sites can neither show nor read these answers.
SAFE_HEADERS = {
    "content-security-policy": "frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refused(ImprintError):
    """A request that is answered with an error.

    Attributes:
        status: the status code of HTTP.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True)
class Limits:
    """The limits of a request, and of the whole server.

    Attributes:
        megabytes: largest body of a request, in units of 10^6 bytes.
        megapixels: largest image, width times height in units of 10^6.
        images: most images in one request.
        seconds: longest time until a body has arrived, and again until the answer is ready.
        requests: most requests at the same time.

    Raises:
        ImprintError: one of them is not above 0.
    """

    megabytes: float = 64
    megapixels: float = 50
    images: int = 32
    seconds: float = 30
    requests: int = 64

    def __post_init__(self) -> None:
        for name in ("images", "requests"):
            if not is_count(getattr(self, name)):
                raise ImprintError(
                    f"max_{name}={getattr(self, name)!r}: give a whole number above 0"
                )
        for name in ("megabytes", "megapixels", "seconds"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise ImprintError(f"max_{name}={value!r}: give a number above 0")

    @property
    def body(self) -> int:
        """Bytes of a request's body."""
        return int(self.megabytes * 1e6)


@dataclass
class _Body:
    """The received part of a request's body: the number of bytes, and whether it is complete."""

    arrived: int = 0
    whole: bool = False


class Guard:
    """Middleware that refuses requests by their headers, size and number.

    Args:
        app: the application.
        hosts: names by which the server may be addressed, without ports. They protect against DNS
            rebinding: a page of another site whose name points to this machine sends its own name.
        limits: see `Limits`.

    Attributes:
        under_way: how many requests are being answered.
        held: bytes of their bodies in memory.
    """

    def __init__(self, app: App, hosts: Collection[str], limits: Limits) -> None:
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.limits = limits
        self.under_way = self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(n.encode(), v.encode()) for n, v in SAFE_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            await _answer(refused, send_safely)
            return
        self.under_way += 1
        body = _Body()
        try:
            await self.app(scope, self._limited(receive, body), send_safely)
        finally:
            self.under_way -= 1
            self.held -= body.arrived

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if _name_of(host) not in self.hosts:
            raise Refused(
                421,
                f"this server is not addressed as {host!r:.100}: --allow_host adds a name",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("//")[2].lower() != host.lower():
            raise Refused(403, f"a page of {origin!r:.100} may not use this server")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refused(400, f"content-length {length!r:.100} is no number")
        if int(length) > self.limits.body:
            raise self._too_large()
        # Monitoring must get an answer even when the server is busy.
        if self.under_way >= self.limits.requests and scope["path"] != "/health":
            raise self._busy()

    def _busy(self) -> Refused:
        return Refused(
            503,
            f"{self.under_way} requests are under way: try again in a moment",
            {"retry-after": "1"},
        )

    def _too_large(self) -> Refused:
        return Refused(
            413,
            f"the request is larger than {self.limits.megabytes:g} MB: send fewer images",
        )

    def _limited(self, receive: Receive, body: _Body) -> Receive:
        """Wraps `receive` to limit the bytes of the body and the time until it has arrived."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.seconds

        async def limited() -> Message:
            if body.whole:
                # After the body, only the end of the connection can follow.
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408, f"the request has not arrived within {self.limits.seconds:g} seconds"
                ) from None
            size = len(message.get("body", b""))
            body.arrived += size
            self.held += size
            if body.arrived > self.limits.body:
                raise self._too_large()
            if self.held > HELD * self.limits.body:
                raise self._busy()
            body.whole = not message.get("more_body", False)
            return message

        return limited


async def _answer(refused: Refused, send: Send) -> None:
    body = json.dumps({"detail": str(refused)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    if refused.status == 413:
        # Close the connection, since the rest of the body is not read.
        headers["connection"] = "close"
    pairs = [(n.encode(), v.encode()) for n, v in (headers | refused.headers).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _name_of(host: str) -> str:
    """Returns the name in a Host header, without its port and the brackets of IPv6; empty if it is
    not valid.

    >>> _name_of("Localhost:8000"), _name_of("[::1]:80"), _name_of("[::1")
    ('localhost', '::1', '')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
