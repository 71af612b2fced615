"""Writes that a client may repeat: the same `Idempotency-Key` again gets the first answer again.

The answer is kept in the transaction of the write itself, so there is no moment at which one stands without the other.
A write that is refused keeps nothing: it may be tried again under the same key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import MediaType, Response
from litestar.params import Parameter
from sqlalchemy import Connection

from orchestrator_fleet.api.asking import Asked
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.store import idempotency
from orchestrator_fleet.store.database import Batch, Item
from orchestrator_fleet.store.idempotency import Answered
from orchestrator_fleet.wire.http import MAX_IDEMPOTENCY_KEY_CHARS

T = TypeVar("T")

Key = Annotated[
    str | None,
    Parameter(header="Idempotency-Key", description="The same key and request again get the first answer again."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a write answers. `content` None is an empty body."""

    content: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


async def write(
    request: Asked, plane: Plane, key: str | None, change: Callable[[Connection], Reply]
) -> Response[dict[str, Any]]:
    """Run `change` in a transaction and answer what it answers; what was answered to `key` before is answered again.

    Raises Conflict `idempotency_key_reused` when the key came with another request, Invalid when it can't be a key.
    """
    _check(key)
    actor, now_us = request.auth.actor, plane.clock.now_us()
    fingerprint = await _fingerprint(request) if key else ""

    if not key:
        return _respond(plane, await plane.store.write(change))

    def once(conn: Connection) -> Reply:
        if before := idempotency.find(conn, actor=actor, key=key, fingerprint=fingerprint):
            return Reply(content=msgspec.Raw(before.body.encode()), status=before.status, headers=before.headers)
        reply = change(conn)
        body = "" if reply.content is None else msgspec.json.encode(reply.content).decode()
        idempotency.remember(
            conn,
            Answered(
                actor=actor,
                key=key,
                fingerprint=fingerprint,
                status=reply.status,
                headers=dict(reply.headers),
                body=body,
                at_us=now_us,
            ),
        )
        return reply

    return _respond(plane, await plane.store.write(once))


async def write_batched(
    request: Asked,
    plane: Plane,
    key: str | None,
    *,
    fn: Batch[Item, T],
    item: Item,
    reply: Callable[[T], Reply],
    then: Callable[[T], None] | None = None,
) -> Response[dict[str, Any]]:
    """The same for what many do at once: without a key it shares its transaction's statements with the others.

    `then` is told the answer right after the commit; the pulse tells everybody a moment later, so it may be left out.
    """
    _check(key)
    if not key:
        answer = await plane.store.write_batched(fn, item)
        if then is not None:
            then(answer)
        return _respond(plane, reply(answer))

    def alone(conn: Connection) -> Reply:
        (answer,) = fn(conn, [item])
        if isinstance(answer, Exception):
            raise answer
        return reply(answer)

    return await write(request, plane, key, alone)


def _respond(plane: Plane, reply: Reply) -> Response[dict[str, Any]]:
    plane.pulse.nudge()
    content: Any = b"" if reply.content is None else msgspec.json.encode(reply.content)
    return Response(content, status_code=reply.status, headers=dict(reply.headers), media_type=MediaType.JSON)


def _check(key: str | None) -> None:
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        wanted = f"got {len(key)} characters, wanted 1 to {MAX_IDEMPOTENCY_KEY_CHARS}"
        raise Invalid([("Idempotency-Key", wanted)])


async def _fingerprint(request: Asked) -> str:
    asked = f"{request.method} {request.url.path}?{request.url.query}\n".encode()
    return hashlib.sha256(asked + await request.body()).hexdigest()
