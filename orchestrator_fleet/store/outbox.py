"""The outbox: what happened, written in the transaction that made it happen.

`data` of a task's event is `{"task": <the task as the API shows it, after the change>, ...}`, and beside it, as the
kind needs: `reason`; at an attempt's end `outcome`, `exit_code`, `run_s`, `usage`, `error`.
Read by `history` (in order of `seq`, exactly once by its cursor), by the event streams and by `GET /tasks/{id}/events`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import events

MAX_READ = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `seq` is 0 until it is read back."""

    at_us: int
    kind: str
    actor: str
    task: str | None = None
    attempt: int | None = None
    orchestrator: str | None = None
    machine: str | None = None
    generation: str | None = None
    charter_version: str | None = None
    route: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    seq: int = 0


_COLUMNS = tuple(column.name for column in events.c if column.name != "seq")
_INSERT = events.insert()
_AFTER = (
    sa.select(events).where(events.c.seq > sa.bindparam("after")).order_by(events.c.seq).limit(sa.bindparam("most"))
)
_LAST = sa.select(sa.func.max(events.c.seq))


def append(conn: Connection, *new: Event) -> None:
    """Write events, in order, in the caller's transaction.

    `seq` grows in the order of commits: SQLite has one writer, and PostgreSQL's writers queue here, since a reader
    that follows `seq` would otherwise step over a row whose transaction was slower than its successor's.
    """
    if not new:
        return
    locks.hold(conn, "outbox")
    conn.execute(_INSERT, [{name: getattr(event, name) for name in _COLUMNS} for event in new])


def read_after(conn: Connection, seq: int, limit: int = MAX_READ) -> Sequence[Event]:
    """Events with a greater `seq`, in order, at most `limit`."""
    return [Event(**row) for row in conn.execute(_AFTER, {"after": seq, "most": min(limit, MAX_READ)}).mappings()]


def last_seq(conn: Connection) -> int:
    """The newest event's `seq`; 0 when there is none."""
    return conn.execute(_LAST).scalar() or 0
