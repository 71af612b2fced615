"""How a change of keys goes through: answered once, brought into force, and told.

A key's text is in one answer and nowhere else. A request that came with an `Idempotency-Key` gets the same key again,
though nothing of it is kept: it follows from the caller's own secret and the request (`keys.derive`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from litestar import Response
from sqlalchemy import Connection

from orchestrator_fleet import keys
from orchestrator_fleet.api import once
from orchestrator_fleet.api.asking import Asked
from orchestrator_fleet.api.once import Once, Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.reconciler import HOLDER, on_thread
from orchestrator_fleet.errors import Conflict, FleetError, LeaseHeld
from orchestrator_fleet.keys import MintedKey
from orchestrator_fleet.orchestrators.issue import Section
from orchestrator_fleet.reconcile.control import publish_keys
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event

# An apply holds the control plane for as long as it writes it: well below a second.
PUBLISH_S, PUBLISH_RETRY_S = 10.0, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request that changes keys. `minted` is the key that it gets, if it gets one."""

    request: Asked
    plane: Plane
    once: Once | None
    minted: MintedKey

    @classmethod
    async def of(cls, request: Asked, plane: Plane, key: str | None) -> Ask:
        """Read it; raises Invalid when its `Idempotency-Key` can't be one."""
        found = await once.keyed(request, plane, key)
        return cls(request=request, plane=plane, once=found, minted=_key_for(request, found))

    @property
    def actor(self) -> str:
        """Who asks."""
        return self.request.auth.actor

    async def before(self) -> Response[dict[str, Any]] | None:
        """What it was answered before, if it was; raises Conflict when its key came with another request."""
        if self.once is None:
            return None
        found = await self.plane.store.write(self.once.before)
        if found is None:
            return None
        content = msgspec.json.decode(found.content)
        return once.respond(self.plane, replace(found, content=self._with_key(content)))

    def stands(self, section: Section) -> bool:
        """Whether its key is in the files: it was asked before, and cut off before it was answered.

        Raises Conflict when that key was revoked since.
        """
        entry = section.get(self.minted.id)
        if entry is None:
            return False
        if entry["sha256"] != self.minted.sha256 or entry.get("revoked") or self.minted.id in self.plane.revoked:
            raise Conflict(
                "idempotency_key_reused", f"this request made {self.minted.id}, which was revoked; take a fresh key"
            )
        return True

    async def answer(
        self, reply: Reply, *, then: Callable[[Connection], None] | None = None, shows_key: bool = False
    ) -> Response[dict[str, Any]]:
        """Answer it, in the transaction of `then`. The answer is kept for who asks again, without the key."""

        def write(conn: Connection) -> None:
            if self.once is not None and self.once.before(conn) is not None:
                return  # the same request, at the same time: it did the same
            if then is not None:
                then(conn)
            if self.once is not None:
                self.once.keep(conn, reply)

        if self.once is not None or then is not None:
            await self.plane.store.write(write)
        return once.respond(self.plane, replace(reply, content=self._with_key(reply.content)) if shows_key else reply)

    def _with_key(self, content: dict[str, Any]) -> dict[str, Any]:
        return {"key": self.minted.text, **content} if content.get("id") == self.minted.id else content


async def publish(plane: Plane) -> str | None:
    """Bring the keys of the files into force here; why they are not, if they are not."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + PUBLISH_S
    while True:
        try:
            await on_thread("publish", lambda: publish_keys(plane.fleet_file, holder=HOLDER))
            break
        except LeaseHeld as busy:
            if loop.time() > end_s:
                return f"not in force yet: {busy}; `fleet apply` brings it"
            await asyncio.sleep(PUBLISH_RETRY_S)
        except FleetError as problem:
            return f"not in force yet: {problem}"
    await plane.reread_control()
    plane.end_links()
    return None


def event(plane: Plane, kind: str, *, actor: str, orchestrator: str, **data: Any) -> Callable[[Connection], None]:
    """What writes an event of an orchestrator's keys, in the caller's transaction."""
    new = Event(at_us=plane.clock.now_us(), kind=kind, actor=actor, orchestrator=orchestrator, data=data)
    return lambda conn: outbox.append(conn, new)


def _key_for(request: Asked, found: Once | None) -> MintedKey:
    if found is None:
        return keys.mint()
    _, _, text = request.headers["authorization"].partition(" ")
    parsed = keys.parse(text.strip())
    return keys.mint() if parsed is None else keys.derive(parsed[1], f"{found.fingerprint}\0{found.key}")
