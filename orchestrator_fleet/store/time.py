"""What time it is, where the store is: several control planes on one database go by one clock."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SystemClock

_NOW = sa.text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")


def now_us(conn: Connection) -> int:
    """Microseconds since 1970 UTC: of the database's machine, which for SQLite is this one."""
    if conn.dialect.name == "postgresql":
        return int(conn.execute(_NOW).scalar_one())
    return SystemClock().now_us()
