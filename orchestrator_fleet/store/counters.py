"""Small named numbers that must survive a restart: turns of a round-robin, the moment the line last moved."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import counters

_GET = sa.select(counters.c.value).where(counters.c.name == sa.bindparam("of"))
_PUT = counters.update().where(counters.c.name == sa.bindparam("of"))
_INSERT = counters.insert()


def get(conn: Connection, name: str) -> int:
    """The number; 0 when it was never set."""
    return conn.execute(_GET, {"of": name}).scalar() or 0


def hold(conn: Connection, name: str) -> None:
    """Let nobody else change the number until the transaction ends."""
    locks.hold(conn, f"counter:{name}")


def put(conn: Connection, name: str, value: int) -> None:
    """Set the number. Who makes it from what `get` said takes `hold` before that."""
    hold(conn, name)
    if conn.execute(_PUT, {"of": name, "value": value}).rowcount == 0:
        conn.execute(_INSERT, {"name": name, "value": value})
