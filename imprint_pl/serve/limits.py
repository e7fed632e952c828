"""What the server refuses before it computes anything: foreign hosts and origins, bodies that are
too large or too slow, and more requests than it can hold.
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

# Bodies that the server holds at the same time, in units of the largest that is allowed.
HELD = 4

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Headers of every answer. A page of somebody else's can neither show these answers nor read them.
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
    """How much a request may ask for, and how much the server takes on.

    Attributes:
        megabytes: size of a request's body, in units of 10^6 bytes.
        megapixels: width times height of an image, in units of 10^6.
        images: in one request.
        seconds: until a body has arrived, and again until the answer is there.
        requests: that are under way at the same time.

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
    """What has arrived of a request's body: how many bytes, and whether that is all."""

    arrived: int = 0
    whole: bool = False


class Guard:
    """Stands around the application and refuses requests by their headers, size and number.

    Args:
        app: the application.
        hosts: names by which the server may be addressed, without ports. A page of another site
            that had its name point to this machine would send that name.
        limits: see `Limits`.

    Attributes:
        under_way: how many requests are being answered.
        held: bytes of their bodies.
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
        # Whoever watches over the server must get an answer when it is busy, too.
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
        """Counts the bytes that arrive, and the time until all have arrived."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.seconds

        async def limited() -> Message:
            if body.whole:
                # Only the end of the connection can come now.
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
        # The rest of the body is not read.
        headers["connection"] = "close"
    pairs = [(n.encode(), v.encode()) for n, v in (headers | refused.headers).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _name_of(host: str) -> str:
    """The name in a Host header, without its port and without the brackets of IPv6; empty where it
    cannot be read.

    >>> _name_of("Localhost:8000"), _name_of("[::1]:80"), _name_of("[::1")
    ('localhost', '::1', '')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
