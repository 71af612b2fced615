"""The outbox: what happened, written in the transaction that made it happen.

`data` of a task's event is `{"task": <the task as the API shows it, after the change>, ...}`, and beside it, as the
kind needs: `reason`; at an attempt's end `outcome`, `exit_code`, `run_s`, `usage`, `error`; `before`, what a change has
replaced; `by`, the owner and address of the key that asked over HTTP.
Read by `history` (in order of `seq`, exactly once by its cursor), by the event streams and by `GET /tasks/{id}/events`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import events
from orchestrator_fleet.store.statement import Statement

MAX_READ = 10_000
T = TypeVar("T")


class Event(msgspec.Struct, frozen=True, kw_only=True):
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
    data: dict[str, Any] = {}
    seq: int = 0


# Who asked for what is written now, over HTTP: `{"owner": ..., "address": ...}`; None for daemons and our own loops.
CALLER: ContextVar[dict[str, str | None] | None] = ContextVar("caller", default=None)
_BY = "caller"

CHANNEL = "fleet_events"
PENDING = "outbox"

_COLUMNS = tuple(column.name for column in events.c if column.name != "seq")
_INSERT = Statement(events.insert(), sets=_COLUMNS)
_AFTER = (
    sa.select(events).where(events.c.seq > sa.bindparam("after")).order_by(events.c.seq).limit(sa.bindparam("most"))
)
_LAST = sa.select(sa.func.max(events.c.seq))
_NEWEST_AT = sa.select(events.c.at_us).order_by(events.c.seq.desc()).limit(1)

# The lock, the rows in order, the news to other processes: in one round trip. A row's `seq` is drawn when the row
# leaves the join, so after the lock is held. The rows come as one JSON text, which costs the driver nothing; a value of
# PostgreSQL's type `json` keeps its text to the letter.
_TYPES = {"at_us": "bigint", "attempt": "integer", "data": "json"}
_WRITE = f"""
WITH held AS MATERIALIZED (SELECT pg_advisory_xact_lock({locks.key("outbox")})),
     written AS (
       INSERT INTO events ({", ".join(_COLUMNS)})
       SELECT {", ".join(f"one.{name}" for name in _COLUMNS)}
       FROM held,
            ROWS FROM (json_to_recordset(%s::json) AS ({
    ", ".join(f"{name} {_TYPES.get(name, 'text')}" for name in _COLUMNS)
}))
              WITH ORDINALITY AS one ({", ".join(_COLUMNS)}, place)
       ORDER BY one.place
       RETURNING seq)
SELECT pg_notify('{CHANNEL}', '') FROM (SELECT max(seq) FROM written) AS last
"""  # noqa: S608 (made of the names of the table's columns)
# It reads what is inside that JSON all the same, and stops at a NUL, which its texts can't hold: where there is one, an
# event's data comes as a text in the JSON, and is none of its business.
_NUL = "\\u0000"
_WRITE_AS_TEXT = _WRITE.replace("data json", "data text")


def as_called(fn: Callable[[Connection], T]) -> Callable[[Connection], T]:
    """`fn`, to be run in another thread: its events say who is the CALLER here."""
    caller = CALLER.get()
    if caller is None:
        return fn

    def called(conn: Connection) -> T:
        conn.info[_BY] = caller
        try:
            return fn(conn)
        finally:
            del conn.info[_BY]

    return called


def append(conn: Connection, *new: Event) -> None:
    """Write events, in order, in the caller's transaction.

    `seq` grows in the order of commits, since a reader that follows `seq` would otherwise step over a row whose
    transaction was slower than its successor's. SQLite has one writer. PostgreSQL's writers queue for it, holding
    whatever they have locked; so they do it last, in `write_pending`, and wait for nothing after that.
    """
    if not new:
        return
    if (caller := conn.info.get(_BY)) is not None:
        new = tuple(msgspec.structs.replace(event, data={**event.data, "by": caller}) for event in new)
    pending: list[Event] | None = conn.info.get(PENDING)
    if pending is not None:
        pending.extend(new)
        return
    locks.hold(conn, "outbox")
    _INSERT.many_of(conn, new)


def write_pending(conn: Connection) -> None:
    """What a PostgreSQL store does before each commit: write what was appended, and tell whoever listens."""
    pending: list[Event] = conn.info[PENDING]
    if not pending:
        return
    raw = conn.connection.dbapi_connection
    assert raw is not None  # noqa: S101 (a connection that runs a transaction has one)
    cursor = raw.cursor()
    try:
        text = msgspec.json.encode(pending).decode()
        if _NUL in text:
            told = [{**msgspec.structs.asdict(one), "data": msgspec.json.encode(one.data).decode()} for one in pending]
            cursor.execute(_WRITE_AS_TEXT, (msgspec.json.encode(told).decode(),))
        else:
            cursor.execute(_WRITE, (text,))
    finally:
        cursor.close()
    pending.clear()


def read_after(conn: Connection, seq: int, limit: int = MAX_READ) -> Sequence[Event]:
    """Events with a greater `seq`, in order, at most `limit`."""
    return [Event(**row) for row in conn.execute(_AFTER, {"after": seq, "most": min(limit, MAX_READ)}).mappings()]


def last_seq(conn: Connection) -> int:
    """The newest event's `seq`; 0 when there is none."""
    return conn.execute(_LAST).scalar() or 0


def newest_at(conn: Connection) -> int:
    """When the newest event happened (microseconds); 0 when there is none."""
    return conn.execute(_NEWEST_AT).scalar() or 0
