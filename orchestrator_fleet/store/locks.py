"""Named locks that last as long as the transaction.

On SQLite there is one writer, so every lock is held already. On PostgreSQL they are advisory locks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from sqlalchemy import Connection

MAX_KNOWN = 4_096
LISTENER = "fleet: listens"

_LISTENERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"

# One round trip for many, each in its turn: a volatile function is called after the sorting.
_LOCK = (
    "SELECT pg_advisory_xact_lock(one.key)"
    " FROM unnest(%s::bigint[]) WITH ORDINALITY AS one (key, place) ORDER BY one.place"
)


def hold(conn: Connection, *names: str) -> None:
    """Wait until no other transaction holds any of `names`; keep them until this one ends.

    Who holds several takes them in one call: all take them in the same order, so nobody waits for each other.
    """
    if conn.dialect.name != "postgresql" or not names:
        return
    raw = conn.connection.dbapi_connection
    assert raw is not None  # noqa: S101 (a connection that runs a transaction has one)
    cursor = raw.cursor()
    try:
        cursor.execute(_LOCK, (_keys(names),))
    finally:
        cursor.close()


def alone(conn: Connection) -> bool:
    """Whether no other process listens to the events of this database: nobody else serves it."""
    return conn.dialect.name != "postgresql" or not conn.exec_driver_sql(_LISTENERS, (LISTENER,)).scalar()


def _keys(names: Iterable[str]) -> list[int]:
    return sorted({key(name) for name in names})


@lru_cache(MAX_KNOWN)
def key(name: str) -> int:
    """The number that PostgreSQL knows the lock by."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
