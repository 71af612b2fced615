"""The keys of daemons: made on their machines, so not in fleet.yaml; the live store keeps their hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import daemon_keys

KeyRow = tuple[str, str, str, str]

_ALL = sa.select(daemon_keys.c.orchestrator, daemon_keys.c.machine, daemon_keys.c.key_id, daemon_keys.c.sha256)
_FIND = _ALL.where(daemon_keys.c.key_id == sa.bindparam("of"))
_INSERT = daemon_keys.insert()
_DELETE = daemon_keys.delete().where(
    sa.or_(
        sa.and_(
            daemon_keys.c.orchestrator == sa.bindparam("of_orchestrator"),
            daemon_keys.c.machine == sa.bindparam("of_machine"),
        ),
        daemon_keys.c.key_id == sa.bindparam("of_key"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonKeyRow:
    """Whose key it is: one orchestrator's daemon on one machine."""

    orchestrator: str
    machine: str
    key_id: str
    sha256: str


def register_daemon_keys(store_url: str, rows: Sequence[KeyRow]) -> int:
    """Make the store know these (orchestrator, machine, key id, SHA-256); answers how many it did not know so.

    Opens the store, and closes it; another process may have it open. A daemon's new key replaces its old one.
    """
    if not rows:
        return 0
    store = open_store(store_url)
    try:
        return (
            0
            if not store.read_sync(lambda conn: missing(conn, rows))
            else store.write_sync(lambda conn: register(conn, rows))
        )
    finally:
        store.close()


def register(conn: Connection, rows: Sequence[KeyRow]) -> int:
    """The same inside a transaction."""
    changed = missing(conn, rows)
    for orchestrator, machine, key_id, sha256 in changed:
        conn.execute(_DELETE, {"of_orchestrator": orchestrator, "of_machine": machine, "of_key": key_id})
        conn.execute(_INSERT, {"orchestrator": orchestrator, "machine": machine, "key_id": key_id, "sha256": sha256})
    return len(changed)


def missing(conn: Connection, rows: Sequence[KeyRow]) -> list[KeyRow]:
    """Those of `rows` that do not stand so in the store."""
    known = {tuple(row) for row in conn.execute(_ALL)}
    return [row for row in rows if tuple(row) not in known]


def find(conn: Connection, key_id: str) -> DaemonKeyRow | None:
    """The key with this public id; None when no daemon has it."""
    row = conn.execute(_FIND, {"of": key_id}).mappings().one_or_none()
    return None if row is None else DaemonKeyRow(**row)
