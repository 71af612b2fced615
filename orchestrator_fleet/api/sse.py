"""Server-sent events: how a stream is written, resumed, kept alive, and taken from a client that does not read.

Every event carries its sequence number as `id`, which a client sends back as `Last-Event-ID` to go on behind it. So a
stream may end at any moment (we close, the client is slow, a proxy cuts it) and nothing is missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import msgspec
from litestar import Request
from litestar.params import Parameter
from litestar.response import Stream

from orchestrator_fleet import log
from orchestrator_fleet.errors import Invalid

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
RECONNECT_MS = 1_000
# A client that has not taken what the network's buffers hold by then is dropped; it knows where to go on.
SLOW_CLIENT_S = 30.0
MAX_SEQUENCE_DIGITS = 18  # fits 64 bits

LastEventId = Annotated[
    str | None,
    Parameter(header="Last-Event-ID", description="Of a stream: go on behind the event with this id."),
]
Follow = Annotated[bool, Parameter(description="Stream as server-sent events; so does `Accept: text/event-stream`.")]

_log = log.get(__name__)


def wanted(request: Request[Any, Any, Any], *, follow: bool) -> bool:
    """Whether the client asks for a stream."""
    return follow or MEDIA_TYPE in request.headers.get("accept", "")


def sequence(text: str | None, *, field: str = "cursor") -> int:
    """A cursor or `Last-Event-ID`, which is a sequence number; 0 without one. Raises Invalid on another text."""
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_SEQUENCE_DIGITS):
        raise Invalid([(field, "it is not of this list; take `next_cursor` of the page before, or an event's id")])
    return int(text)


def resumed(last_event_id: str | None, cursor: str | None) -> int:
    """Where a stream goes on: a client that comes again says it by the header, over what its URL still says."""
    return sequence(cursor) if last_event_id is None else sequence(last_event_id, field="Last-Event-ID")


def event(kind: str, data: Any, *, seq: int) -> bytes:
    """One event."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, kind.encode(), msgspec.json.encode(data))


def opening(seq: int) -> bytes:
    """The first words: where it begins, should it break before the first event; and how soon to come again."""
    return b"retry: %d\nid: %d\n\n" % (RECONNECT_MS, seq)


def still_here(seq: int) -> bytes:
    """While it is quiet: the connection lives, and everything up to `seq` was looked at."""
    return b": still here\nid: %d\n\n" % seq


async def quiet(woken: asyncio.Event, most_s: float = KEEP_ALIVE_S) -> bool:
    """Wait to be woken; True when `most_s` went by without."""
    try:
        async with asyncio.timeout(most_s):
            await woken.wait()
    except TimeoutError:
        return True
    return False


def stream(pieces: AsyncIterator[bytes]) -> Stream:
    """The answer."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return _Stream(pieces, media_type=MEDIA_TYPE, headers=headers)


class _Stream(Stream):
    """A stream whose client has to read."""

    def to_asgi_response(self, app: Any, request: Any, **known: Any) -> Any:
        """Litestar's answer, whose every word has to be taken in time."""
        answer = super().to_asgi_response(app, request, **known)

        async def respond(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            async def in_time(message: Any) -> None:
                async with asyncio.timeout(SLOW_CLIENT_S):
                    await send(message)

            try:
                await answer(scope, receive, in_time)
            except* TimeoutError:
                _log.info("a client did not read its stream and is dropped", path=scope["path"])

        return respond
