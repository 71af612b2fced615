"""The outermost layer: who is asking, how often, for how long, and the one log line of each request.

It stands around Litestar, not inside: so that a request without a key learns nothing, not even which
routes there are, and so that every answer, also a 404, has its line and its request id.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec

from orchestrator_fleet import log
from orchestrator_fleet.api import problems
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.orchestrators.access import Denied, KnownKey
from orchestrator_fleet.store.outbox import CALLER

OPEN_ROUTES = frozenset(
    {
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/schema/openapi.json"),
        ("POST", "/api/vps/validate"),
        ("POST", "/api/orchestrators/validate"),
    }
)
MAX_LOGGED_PATH = 500
# How soon a long answer notices that its key has expired; a revocation wakes it.
LOOK_S = 5.0
# Of an IPv6 address: what one customer has, who could else take a new address for every guess.
NETWORK_BITS = 64

# ASGI as it is on the wire: three callables over dicts.
Message = dict[str, Any]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

# No two requests of any process have the same id; drawing one from the system's randomness costs 50 µs.
_PROCESS, _requests = secrets.token_hex(4), itertools.count(1)

_log = log.get("orchestrator_fleet.api.request")


class Door:
    """An ASGI app that authenticates, then hands on with `scope["auth"]` set to the KnownKey.

    A key that comes to be no good while its request is served (a stream, a long poll) ends it: the app hears that the
    client hung up.
    """

    def __init__(self, app: ASGIApp, *, plane: Plane) -> None:
        self._app, self._plane = app, plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = f"{_PROCESS}{next(_requests):08x}"
        scope.setdefault("state", {})["request_id"] = request_id
        status, open_end = 0, False

        async def watched(message: Message) -> None:
            nonlocal status, open_end
            if message["type"] == "http.response.start" or message["type"] == "websocket.http.response.start":
                status, open_end = message["status"], True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            elif message["type"] == "http.response.body":
                open_end = message.get("more_body", False)
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        who = await self._who(scope)
        over = False

        def is_over() -> None:
            nonlocal over
            over = True

        try:
            if isinstance(who, _Refusal):
                await _refuse(scope, watched, who, request_id=request_id)
            else:
                scope["auth"] = scope["user"] = who
                if who is not None and scope["type"] == "http":
                    receive = self._while_good(who, receive, is_over)
                await self._app(scope, receive, watched)
                if over and open_end:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            _log.info(
                "request",
                method=scope.get("method", "WEBSOCKET"),
                path=scope["path"][:MAX_LOGGED_PATH],
                status=status,
                ms=round((time.perf_counter() - started) * 1000, 2),
                key=who.id if isinstance(who, KnownKey) else None,
                request_id=request_id,
            )

    async def _who(self, scope: Scope) -> KnownKey | _Refusal | None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) in OPEN_ROUTES:
            return None
        header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, text = header.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            return _unauthorized("send `Authorization: Bearer <key>`")  # guesses nothing, so it is not counted
        plane, address = self._plane, address_of(scope)
        found = await plane.authenticate(text.strip())
        if isinstance(found, Denied):
            # A good key is let through however many wrong ones come from its address.
            caller = network_of(address)
            if not plane.failures.admit(caller):
                return _too_many("too many keys that are not valid came from here", plane.failures.wait_s(caller))
            return _unauthorized("the key is not valid")
        if not plane.requests.admit(found.id):
            return _too_many("too many requests came with this key", plane.requests.wait_s(found.id))
        if scope["type"] == "http":
            CALLER.set({"owner": found.owner, "address": address})
        if not found.machine:
            plane.uses.note(found.id, address=address, now_us=plane.clock.now_us())
        return found

    def _while_good(self, who: KnownKey, receive: Receive, is_over: Callable[[], None]) -> Receive:
        """`receive`; but once the body is there, it also says that the client hung up when the key is good no more."""
        has_body = False

        async def listening() -> Message:
            nonlocal has_body
            if not has_body:
                message = await receive()
                has_body = message["type"] == "http.request" and not message.get("more_body", False)
                return message
            hung_up = await self._hung_up(who, receive)
            if hung_up is None:
                is_over()
            return hung_up or {"type": "http.disconnect"}

        return listening

    async def _hung_up(self, who: KnownKey, receive: Receive) -> Message | None:
        """What comes next from the client; None when its key came to be no good before."""
        coming = asyncio.ensure_future(receive())
        try:
            with self._plane.callers.waiting(who.id) as moved:
                while not coming.done():
                    moved.clear()
                    if self._plane.why_no_longer(who) is not None:
                        return None
                    woken = asyncio.ensure_future(moved.wait())
                    try:
                        await asyncio.wait({coming, woken}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        woken.cancel()
                return coming.result()
        finally:
            coming.cancel()


class _Refusal(msgspec.Struct, frozen=True):
    """What is answered instead of what was asked."""

    status: HTTPStatus
    code: str
    told: str
    header: tuple[bytes, bytes]


def _unauthorized(told: str) -> _Refusal:
    return _Refusal(HTTPStatus.UNAUTHORIZED, "unauthorized", told, (b"www-authenticate", b"Bearer"))


def _too_many(told: str, wait_s: float) -> _Refusal:
    after = problems.retry_after(wait_s)
    told = f"{told}; come again after {after} s"
    return _Refusal(HTTPStatus.TOO_MANY_REQUESTS, "too_many_requests", told, (b"retry-after", after.encode()))


def address_of(scope: Scope) -> str | None:
    """Where a request comes from; None when the server does not know."""
    client = scope.get("client")
    return client[0] if client else None


def network_of(address: str | None) -> str:
    """Who counts as one caller: an IPv4 address, or an IPv6 network."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return address or ""
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), NETWORK_BITS), strict=False))


async def _refuse(scope: Scope, send: Send, refusal: _Refusal, *, request_id: str) -> None:
    body = msgspec.json.encode(
        problems.details(status=refusal.status, code=refusal.code, detail=refusal.told, request_id=request_id)
    )
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    headers = [
        (b"content-type", problems.MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        refusal.header,
    ]
    await send({"type": f"{kind}.start", "status": int(refusal.status), "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
