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


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """A request that came with an `Idempotency-Key`, inside a transaction."""

    actor: str
    key: str
    fingerprint: str
    at_us: int

    def before(self, conn: Connection) -> Reply | None:
        """What was answered to it before; raises Conflict when the key came with another request."""
        found = idempotency.find(conn, actor=self.actor, key=self.key, fingerprint=self.fingerprint)
        if found is None:
            return None
        return Reply(content=msgspec.Raw(found.body.encode()), status=found.status, headers=found.headers)

    def keep(self, conn: Connection, reply: Reply) -> None:
        """This is what it is answered from now on."""
        idempotency.remember(conn, self._answered(reply))

    def replace(self, conn: Connection, reply: Reply) -> None:
        """What was kept said that it is under way; this is what it is answered from now on."""
        idempotency.replace(conn, self._answered(reply))

    def _answered(self, reply: Reply) -> Answered:
        return Answered(
            actor=self.actor,
            key=self.key,
            fingerprint=self.fingerprint,
            status=reply.status,
            headers=dict(reply.headers),
            body="" if reply.content is None else msgspec.json.encode(reply.content).decode(),
            at_us=self.at_us,
        )


async def keyed(request: Asked, plane: Plane, key: str | None) -> Once | None:
    """The request's key, None when it came without; raises Invalid when it can't be one."""
    _check(key)
    if not key:
        return None
    fingerprint = await _fingerprint(request)
    return Once(actor=request.auth.actor, key=key, fingerprint=fingerprint, at_us=plane.clock.now_us())


async def write(
    request: Asked, plane: Plane, key: str | None, change: Callable[[Connection], Reply]
) -> Response[dict[str, Any]]:
    """Run `change` in a transaction and answer what it answers; what was answered to `key` before is answered again.

    Raises Conflict `idempotency_key_reused` when the key came with another request, Invalid when it can't be a key.
    """
    once = await keyed(request, plane, key)
    if once is None:
        return respond(plane, await plane.store.write(change))

    def alone(conn: Connection) -> Reply:
        reply = once.before(conn)
        if reply is None:
            reply = change(conn)
            once.keep(conn, reply)
        return reply

    return respond(plane, await plane.store.write(alone))


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
        return respond(plane, reply(answer))

    def alone(conn: Connection) -> Reply:
        (answer,) = fn(conn, [item])
        if isinstance(answer, Exception):
            raise answer
        return reply(answer)

    return await write(request, plane, key, alone)


async def answered(plane: Plane, once: Once | None) -> Response[dict[str, Any]] | None:
    """What was answered to this request before; None for a new one, and for one without a key."""
    before = None if once is None else await plane.store.write(once.before)
    return None if before is None else respond(plane, before)


async def keep(plane: Plane, once: Once | None, reply: Reply) -> Response[dict[str, Any]]:
    """Answer, and keep the answer: the first one, where the request came twice at once.

    For work that is no transaction of the store. Whoever was killed before this does it again when asked again.
    """
    if once is None:
        return respond(plane, reply)

    def first(conn: Connection) -> Reply:
        before = once.before(conn)
        if before is None:
            once.keep(conn, reply)
        return before or reply

    return respond(plane, await plane.store.write(first))


def respond(plane: Plane, reply: Reply) -> Response[dict[str, Any]]:
    """The answer to a write that is committed."""
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
