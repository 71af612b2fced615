"""Requests that were answered: the same key again gets the same answer, in the transaction that would repeat it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import idempotency

KEEP_S = 86_400
MAX_FORGOTTEN = 1_000

_FIND = sa.select(idempotency).where(idempotency.c.actor == sa.bindparam("by"), idempotency.c.key == sa.bindparam("of"))
_INSERT = idempotency.insert()
_REPLACE = (
    idempotency.update()
    .where(idempotency.c.actor == sa.bindparam("by"), idempotency.c.key == sa.bindparam("of"))
    .values(status=sa.bindparam("code"), headers=sa.bindparam("with_headers"), body=sa.bindparam("text"))
)
_OLD = (
    sa.select(idempotency.c.actor, idempotency.c.key)
    .where(idempotency.c.at_us < sa.bindparam("before"))
    .order_by(idempotency.c.at_us)
    .limit(MAX_FORGOTTEN)
)
_DELETE = idempotency.delete().where(idempotency.c.actor == sa.bindparam("by"), idempotency.c.key == sa.bindparam("of"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An answer as it was given. `fingerprint` names the request: method, path and body."""

    actor: str
    key: str
    fingerprint: str
    status: int
    headers: dict[str, str]
    body: str
    at_us: int


def find(conn: Connection, *, actor: str, key: str, fingerprint: str) -> Answered | None:
    """The answer given to this request before; None for a new key.

    Conflict `idempotency_key_reused` when the key was used for another request.
    """
    locks.hold(conn, f"idempotency:{actor}:{key}")
    row = conn.execute(_FIND, {"by": actor, "of": key}).mappings().one_or_none()
    if row is None:
        return None
    if row["fingerprint"] != fingerprint:
        raise Conflict(
            "idempotency_key_reused", f"Idempotency-Key {key!r} was used for another request; take a fresh one"
        )
    return Answered(**row)


def remember(conn: Connection, answered: Answered) -> None:
    """Keep an answer, for KEEP_S."""
    conn.execute(_INSERT, asdict(answered))


def replace(conn: Connection, answered: Answered) -> None:
    """Keep another answer in the place of one that said that the work is under way."""
    of = {"by": answered.actor, "of": answered.key}
    conn.execute(_REPLACE, {**of, "code": answered.status, "with_headers": answered.headers, "text": answered.body})


def forget_old(conn: Connection, *, now_us: int) -> int:
    """Drop answers older than KEEP_S, at most MAX_FORGOTTEN a call; answers how many."""
    old = conn.execute(_OLD, {"before": now_us - KEEP_S * 1_000_000}).all()
    if old:
        conn.execute(_DELETE, [{"by": actor, "of": key} for actor, key in old])
    return len(old)
