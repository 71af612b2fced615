"""The outermost layer: who is asking, and the one log line of each request.

It stands around Litestar, not inside: so that a request without a key learns nothing, not even which
routes there are, and so that every answer, also a 404, has its line and its request id.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from orchestrator_fleet import log
from orchestrator_fleet.api import problems
from orchestrator_fleet.orchestrators.access import Denied, KnownKey

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

# ASGI as it is on the wire: three callables over dicts.
Message = dict[str, Any]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

_log = log.get("orchestrator_fleet.api.request")


class Door:
    """An ASGI app that authenticates, then hands on with `scope["auth"]` set to the KnownKey.

    `authenticate` gets the bearer text and answers with the key or why it is none.
    """

    def __init__(self, app: ASGIApp, *, authenticate: Callable[[str], Awaitable[KnownKey | Denied]]) -> None:
        self._app, self._authenticate = app, authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start" or message["type"] == "websocket.http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        who = await self._who(scope)
        try:
            if isinstance(who, Denied):
                await _refuse(scope, watched, request_id=request_id, reason=who.reason)
            else:
                scope["auth"] = scope["user"] = who
                await self._app(scope, receive, watched)
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

    async def _who(self, scope: Scope) -> KnownKey | Denied | None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) in OPEN_ROUTES:
            return None
        header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, text = header.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            return Denied("missing")
        return await self._authenticate(text.strip())


async def _refuse(scope: Scope, send: Send, *, request_id: str, reason: str) -> None:
    told = "send `Authorization: Bearer <key>`" if reason == "missing" else "the key is not valid"
    body = msgspec.json.encode(problems.details(status=401, code="unauthorized", detail=told, request_id=request_id))
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    headers = [
        (b"content-type", problems.MEDIA_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": f"{kind}.start", "status": 401, "headers": headers})
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
