"""Holds: why an orchestrator claims nothing, whatever stands in its line. A pause is a person's, quota a provider's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.schema import holds, tasks
from orchestrator_fleet.store.statement import Statement

Kind = Literal["pause", "quota"]

MAX_REASON_CHARS = 4_000
MAX_ENDED = 500
_BEGINS: Mapping[Kind, str] = {"pause": "orchestrator_paused", "quota": "orchestrator_quota"}
_ENDS = "orchestrator_resumed"


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """One hold. `until_us` None: until somebody lifts it; else it is over by itself at that moment."""

    orchestrator: str
    kind: Kind
    by: str
    reason: str | None
    at_us: int
    until_us: int | None


_COLUMNS = tuple(holds.c[name] for name in Hold.__struct_fields__)
_OF = holds.c.orchestrator == sa.bindparam("of")
_KEY = sa.and_(_OF, holds.c.kind == sa.bindparam("of_kind"))
_FIND = Statement(sa.select(*_COLUMNS).where(_OF).order_by(holds.c.kind))
_ALL = sa.select(*_COLUMNS).order_by(holds.c.orchestrator, holds.c.kind)
_OVER = sa.select(*_COLUMNS).where(holds.c.until_us <= sa.bindparam("now")).order_by(holds.c.until_us).limit(MAX_ENDED)
_NEXT = sa.select(sa.func.min(holds.c.until_us))
_INSERT = holds.insert()
_DELETE = holds.delete().where(_KEY)
_LET_GO = (
    tasks.update()
    .where(
        tasks.c.orchestrator == sa.bindparam("of"),
        tasks.c.status == "BLOCKED",
        tasks.c.blocked_reason == sa.bindparam("for_a"),
        tasks.c.ripens_at_us > sa.bindparam("now"),
    )
    .values(ripens_at_us=sa.bindparam("now"))
)


def put(
    conn: Connection, *, orchestrator: str, kind: Kind, by: str, reason: str | None, until_us: int | None, now_us: int
) -> bool:
    """Hold an orchestrator; whether that changed anything.

    A pause again with another reason or end is changed to it. Of two ends of quota the later counts.
    """
    locks.hold(conn, _lock(orchestrator))
    reason = reason[:MAX_REASON_CHARS] if reason else None
    before = next((hold for hold in in_force(find(conn, orchestrator), now_us) if hold.kind == kind), None)
    new = Hold(orchestrator=orchestrator, kind=kind, by=by, reason=reason, at_us=now_us, until_us=until_us)
    if before is not None and not _is_news(before, new):
        return False
    conn.execute(_DELETE, {"of": orchestrator, "of_kind": kind})
    conn.execute(_INSERT, msgspec.structs.asdict(new))
    until = None if until_us is None else to_rfc3339(until_us)
    _tell(conn, _BEGINS[kind], new, actor=by, now_us=now_us, reason=reason, until=until)
    return True


def lift(
    conn: Connection, *, orchestrator: str, by: str, reason: str | None, now_us: int, kind: Kind = "pause"
) -> bool:
    """End a hold, and with a quota's the wait of the tasks that met it; whether there was one."""
    locks.hold(conn, _lock(orchestrator))
    held = next((hold for hold in find(conn, orchestrator) if hold.kind == kind), None)
    if held is None:
        return False
    _end(conn, held, actor=by, reason=reason, now_us=now_us)
    if kind == "quota":
        let_go(conn, orchestrator=orchestrator, reason="quota", now_us=now_us)
    return held in in_force([held], now_us)


def let_go(conn: Connection, *, orchestrator: str, reason: Literal["quota", "budget"], now_us: int) -> None:
    """Let the tasks that a spent quota or budget holds wait no longer: the next claim puts them in line."""
    conn.execute(_LET_GO, {"of": orchestrator, "for_a": reason, "now": now_us})


def find(conn: Connection, orchestrator: str) -> list[Hold]:
    """The holds on an orchestrator, also those that are over by now: see `in_force`."""
    return [
        Hold(**dict(zip(Hold.__struct_fields__, row, strict=True))) for row in _FIND.rows(conn, {"of": orchestrator})
    ]


def find_all(conn: Connection, now_us: int) -> dict[str, list[Hold]]:
    """All holds in force, by orchestrator."""
    found: dict[str, list[Hold]] = {}
    every = [Hold(**row) for row in conn.execute(_ALL).mappings()]
    for hold in in_force(every, now_us):
        found.setdefault(hold.orchestrator, []).append(hold)
    return found


def in_force(found: Sequence[Hold], now_us: int) -> list[Hold]:
    """Those that hold at `now_us`. Pure."""
    return [hold for hold in found if hold.until_us is None or hold.until_us > now_us]


def ended(conn: Connection, now_us: int) -> list[Hold]:
    """Take away the holds that are over by themselves, each with its event; answers them, MAX_ENDED a call."""
    over = [Hold(**row) for row in conn.execute(_OVER, {"now": now_us}).mappings()]
    locks.hold(conn, *(_lock(hold.orchestrator) for hold in over))
    gone = [hold for hold in over if hold in find(conn, hold.orchestrator)]
    for hold in gone:
        _end(conn, hold, actor="system", reason=None, now_us=now_us)
    return gone


def next_end(conn: Connection) -> int | None:
    """When the next hold is over by itself (microseconds); None when none ends so."""
    return conn.execute(_NEXT).scalar()


def _is_news(before: Hold, new: Hold) -> bool:
    if new.kind == "quota":
        return before.until_us is not None and (new.until_us is None or new.until_us > before.until_us)
    return (before.reason, before.until_us) != (new.reason, new.until_us)


def _end(conn: Connection, hold: Hold, *, actor: str, reason: str | None, now_us: int) -> None:
    conn.execute(_DELETE, {"of": hold.orchestrator, "of_kind": hold.kind})
    _tell(conn, _ENDS, hold, actor=actor, now_us=now_us, reason=reason)


def _tell(conn: Connection, event: str, hold: Hold, *, actor: str, now_us: int, **data: Any) -> None:
    said = {name: value for name, value in data.items() if value is not None}
    outbox.append(
        conn,
        outbox.Event(
            at_us=now_us,
            kind=event,
            orchestrator=hold.orchestrator,
            actor=actor,
            data={"kind": hold.kind, **said},
        ),
    )


def _lock(orchestrator: str) -> str:
    return f"hold:{orchestrator}"
