"""What an orchestrator asked of others, and they of it: looked at page by page, and answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from orchestrator_fleet.errors import Conflict, NotFound
from orchestrator_fleet.orchestrators import collaboration, coordination, delegation, escalation, passing
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.store.schema import COORDINATION_OPEN, coordinations
from orchestrator_fleet.tasks import rows
from orchestrator_fleet.tasks.task import TaskRow
from orchestrator_fleet.wire import cursor as cursors

Role = Literal["source", "target"]
Answer = Literal["accept", "reject"]

MAX_OPEN = 1_000
_NOT_ANSWERABLE = {
    "handoff": "a handoff, which is done when it is told; delegate the task on, or hand it over to somebody else",
    "escalation": "an escalation; approve, reject or unblock its task",
}

_Cursor = tuple[
    Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)], Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*$")]
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of those that match, how many match, and where the next page begins (None: this is the last)."""

    rows: Sequence[Coordination]
    total: int
    next_cursor: str | None


def page(
    conn: Connection,
    orchestrator: str,
    *,
    role: Role | None = None,
    kinds: Sequence[str] = (),
    states: Sequence[str] = (),
    cursor: str | None = None,
    limit: int,
) -> Page:
    """A page of them, the newest first, as they are by now. Invalid on a cursor that is none."""
    after = None if cursor is None else cursors.read(cursor, _Cursor)
    where = [_side(orchestrator, role)]
    if kinds:
        where.append(coordinations.c.kind.in_(kinds))
    if states:
        where.append(_in_state(conn, where, states))
    total = conn.execute(sa.select(sa.func.count()).select_from(coordinations).where(*where)).scalar_one()
    if after is not None:
        at = sa.tuple_(coordinations.c.created_at_us, coordinations.c.id)
        where.append(at < sa.tuple_(*(sa.literal(value) for value in after)))
    found = _newest(conn, where, limit + 1)
    kept = found[:limit]
    next_cursor = cursors.write((kept[-1].created_at_us, kept[-1].id)) if len(found) > limit else None
    return Page(rows=look(conn, kept), total=total, next_cursor=next_cursor)


def find(conn: Connection, of: str, orchestrator: str) -> Coordination:
    """The coordination with this id that an orchestrator has a side in, as it is by now; NotFound when it has none."""
    (now,) = look(conn, [_between(conn, of, orchestrator)])
    return now


def look(conn: Connection, ones: Sequence[Coordination]) -> list[Coordination]:
    """The same coordinations as they are by now, whatever is written down yet."""
    return escalation.look(conn, collaboration.look(conn, passing.look(conn, ones)))


def answer(
    conn: Connection, of: str, orchestrator: str, said: Answer, *, reason: str | None, actor: str, now_us: int
) -> tuple[Coordination, TaskRow]:
    """The orchestrator's yes or no to what was asked of it, with the task after it; yes said twice is said.

    NotFound when it has no side in it; Conflict `not_target`, `not_answerable`, `not_open`, `passed_on`.
    """
    one = _between(conn, of, orchestrator)
    if one.target != orchestrator:
        raise Conflict("not_target", f"{one.id}: it was asked of {one.target}, which alone can answer it")
    if one.kind == "delegation":
        do = delegation.accept if said == "accept" else delegation.reject
        return do(conn, one, reason=reason, actor=actor, now_us=now_us)
    if one.kind != "collaboration":
        raise Conflict("not_answerable", f"{one.id}: it is {_NOT_ANSWERABLE[one.kind]}")
    (now,) = look(conn, [one])
    if not now.is_open:
        raise Conflict("not_open", f"{now.id}: it is {now.state}; there is nothing left to answer")
    if said == "accept" and now.state != "accepted":
        now = collaboration.accept(conn, one, reason=reason or "", actor=actor, now_us=now_us)
    elif said == "reject":
        now = collaboration.reject(conn, one, reason=reason or "", actor=actor, now_us=now_us)
    return now, rows.get(conn, one.task)


def _between(conn: Connection, of: str, orchestrator: str) -> Coordination:
    one = coordination.find(conn, of)
    if orchestrator not in (one.source, one.target):
        raise NotFound(f"there is no coordination {of[:100]} of {orchestrator}")
    return one


def _side(orchestrator: str, role: Role | None) -> ColumnElement[bool]:
    asked, asks = coordinations.c.target == orchestrator, coordinations.c.source == orchestrator
    return asks if role == "source" else asked if role == "target" else sa.or_(asks, asked)


def _in_state(conn: Connection, where: Sequence[ColumnElement[bool]], states: Sequence[str]) -> ColumnElement[bool]:
    """In one of these states by now: some may have moved since they were written, of the newest MAX_OPEN open ones."""
    written = _newest(conn, [*where, sa.text(COORDINATION_OPEN)], MAX_OPEN)
    moved = [now for was, now in zip(written, look(conn, written), strict=True) if was.state != now.state]
    as_written = coordinations.c.state.in_(states)
    if not moved:
        return as_written
    there = [one.id for one in moved if one.state in states]
    return sa.or_(
        sa.and_(as_written, coordinations.c.id.not_in([one.id for one in moved])), coordinations.c.id.in_(there)
    )


def _newest(conn: Connection, where: Sequence[Any], most: int) -> list[Coordination]:
    newest_first = coordinations.c.created_at_us.desc(), coordinations.c.id.desc()
    found = conn.execute(sa.select(coordinations).where(*where).order_by(*newest_first).limit(most))
    return [Coordination(**row) for row in found.mappings()]
