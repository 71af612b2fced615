"""Named locks that last as long as the transaction.

On SQLite there is one writer, so every lock is held already. On PostgreSQL they are advisory locks.
"""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from sqlalchemy import Connection

_LOCK = sa.text("SELECT pg_advisory_xact_lock(:key)")


def hold(conn: Connection, name: str) -> None:
    """Wait until no other transaction holds `name`; keep it until this one ends."""
    if conn.dialect.name == "postgresql":
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
        conn.execute(_LOCK, {"key": key})
