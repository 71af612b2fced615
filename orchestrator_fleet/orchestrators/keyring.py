"""What the live store knows of keys beside their hashes: which were revoked, and when each was used last.

A revocation here is in force before any file says so, on every control plane of the store, and for good: no clock and
no older fleet.yaml makes the key work again. Who wants to have one again makes another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import key_revocations, key_uses
from orchestrator_fleet.store.statement import Statement

REVOKED = "key_revoked"

_REVOKED = sa.select(key_revocations.c.key_id, key_revocations.c.revoked_at_us)
_REVOKE = key_revocations.insert()
_USES = sa.select(key_uses)
_USE = Statement(key_uses.insert(), sets=("key_id", "last_used_us", "address"))
_USE_AGAIN = Statement(
    key_uses.update()
    .where(key_uses.c.key_id == sa.bindparam("of"), key_uses.c.last_used_us < sa.bindparam("at_us"))
    .values(last_used_us=sa.bindparam("at_us"), address=sa.bindparam("from_where"))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """When a key was last used (microseconds since 1970), and from which address."""

    at_us: int
    address: str | None


def revoke(
    conn: Connection, found: Iterable[KnownKey], *, reason: str | None, actor: str, now_us: int
) -> list[KnownKey]:
    """Revoke keys, each with its event; answers those that were not revoked here before."""
    locks.hold(conn, "key_revocations")
    known = revoked(conn)
    new = [key for key in found if key.id not in known]
    for key in new:
        conn.execute(
            _REVOKE,
            {"key_id": key.id, "owner": key.owner, "revoked_at_us": now_us, "actor": actor, "reason": reason},
        )
    outbox.append(conn, *(_event(key, reason=reason, actor=actor, now_us=now_us) for key in new))
    return new


def revoked(conn: Connection) -> dict[str, int]:
    """When each key that was revoked here was (microseconds since 1970), by id."""
    return {row.key_id: row.revoked_at_us for row in conn.execute(_REVOKED)}


def use(conn: Connection, found: Mapping[str, Use]) -> None:
    """Write down the last uses of keys, by id. What is older than what stands there changes nothing."""
    if not found:
        return
    locks.hold(conn, "key_uses")
    known = uses(conn)
    first = [(key_id, one) for key_id, one in found.items() if key_id not in known]
    again = [(key_id, one) for key_id, one in found.items() if key_id in known]
    if first:
        _USE.many(conn, [{"key_id": i, "last_used_us": one.at_us, "address": one.address} for i, one in first])
    if again:
        _USE_AGAIN.many(conn, [{"of": i, "at_us": one.at_us, "from_where": one.address} for i, one in again])


def uses(conn: Connection) -> dict[str, Use]:
    """The last use of each key that was ever used, by id."""
    return {row.key_id: Use(at_us=row.last_used_us, address=row.address) for row in conn.execute(_USES)}


def _event(key: KnownKey, *, reason: str | None, actor: str, now_us: int) -> Event:
    data = {
        "key": key.id,
        "owner": key.owner,
        "scopes": list(key.scopes),
        "reason": reason,
        "before": {"revoked": None if key.revoked_us is None else to_rfc3339(key.revoked_us)},
        "after": {"revoked": to_rfc3339(now_us)},
    }
    orchestrator = key.owner if key.is_orchestrators else None
    return Event(at_us=now_us, kind=REVOKED, actor=actor, orchestrator=orchestrator, data=data)
