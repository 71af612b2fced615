"""Looking at tasks: one, a page of many, the events of one, its place in line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection

from orchestrator_fleet.store import counters
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import CLAIMABLE, attempts, events, task_tags, tasks
from orchestrator_fleet.tasks import line, ripen, rows
from orchestrator_fleet.tasks.task import PRIORITIES, TaskRow
from orchestrator_fleet.wire import cursor as cursors
from orchestrator_fleet.wire.cursor import SAME_SORT

MAX_LIMIT = 100
MAX_EVENTS = 1_000
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
NoNul = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*$")]
Sort = Literal["claim", "priority", "due_at", "created_at", "updated_at"]
SORTS: tuple[Sort, ...] = ("claim", "priority", "due_at", "created_at", "updated_at")

_ESCAPE = "/"
_LIKE_ESCAPED = str.maketrans({sign: _ESCAPE + sign for sign in ("%", "_", _ESCAPE)})
_CLASS = sa.case({priority: number for number, priority in enumerate(PRIORITIES)}, value=tasks.c.priority)
_ANY_RIPE = sa.select(sa.literal(1)).where(tasks.c.ripens_at_us <= sa.bindparam("as_of")).limit(1)
_EVENTS = (
    sa.select(events)
    .where(events.c.task == sa.bindparam("of_task"), events.c.seq > sa.bindparam("after"))
    .order_by(events.c.seq)
    .limit(sa.bindparam("most"))
)
_COUNT_EVENTS = sa.select(sa.func.count()).select_from(events).where(events.c.task == sa.bindparam("of_task"))
_ATTEMPTS = sa.select(attempts).where(attempts.c.task == sa.bindparam("of_task")).order_by(attempts.c.attempt)
_BEFORE = sa.tuple_(tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id) < sa.tuple_(
    sa.bindparam("rank", type_=sa.Integer),
    sa.bindparam("due", type_=sa.BigInteger),
    sa.bindparam("created", type_=sa.BigInteger),
    sa.bindparam("id", type_=sa.Text),
)
_COUNT_OF = sa.select(sa.func.count()).select_from(tasks).where(tasks.c.orchestrator == sa.bindparam("orchestrator"))
_AHEAD = _COUNT_OF.where(sa.text(CLAIMABLE), _BEFORE)
_AHEAD_OF_PARKED = _COUNT_OF.where(tasks.c.parked_by == sa.bindparam("at"), sa.text("parked_by IS NOT NULL"), _BEFORE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What to list; an empty field means any. Several words in one field mean any of them."""

    status: tuple[str, ...] = ()
    blocked_reason: tuple[str, ...] = ()
    priority: tuple[str, ...] = ()
    orchestrator: tuple[str, ...] = ()
    discipline: tuple[str, ...] = ()
    tag: tuple[str, ...] = ()
    q: str = ""
    due_before_us: int | None = None
    due_after_us: int | None = None
    created_after_us: int | None = None
    unrouted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of the tasks that match, how many match, and where the next page begins (None: this is the last)."""

    rows: tuple[TaskRow, ...]
    total: int
    next_cursor: str | None


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    """Where a page ended: the last row's key, under which order, and as of when ranks were computed."""

    sort: str
    descending: bool
    as_of_us: Int64
    key: list[Int64 | NoNul]


def get_task(conn: Connection, task_id: str) -> TaskRow:
    """The task; NotFound when there is none."""
    return rows.get(conn, task_id)


def list_tasks(
    conn: Connection,
    *,
    filters: Filters,
    now_us: int,
    sort: Sort = "claim",
    descending: bool = False,
    cursor: str | None = None,
    limit: int = 20,
) -> Page:
    """A page in a total order with an id tie-break, so that writers make no row appear twice or be stepped over.

    `sort="claim"` is the order of the line as it is at the first page's time, tasks that wait longer risen; the
    cursor carries that time. Invalid on a cursor that is not of this sort.
    """
    limit = max(1, min(limit, MAX_LIMIT))
    begin = _read_cursor(cursor, sort=sort, descending=descending) if cursor else None
    as_of_us = begin.as_of_us if begin else now_us
    key = _key(conn, sort, as_of_us)
    where = _where(filters)
    total = conn.execute(sa.select(sa.func.count()).select_from(tasks).where(*where)).scalar_one()
    page = sa.select(*rows.COLUMNS, *key).where(*where).limit(limit + 1)
    if begin:
        last = sa.tuple_(*(sa.literal(value) for value in begin.key))
        page = page.where(sa.tuple_(*key) < last if descending else sa.tuple_(*key) > last)
    page = page.order_by(*(column.desc() if descending else column.asc() for column in key))
    found = conn.execute(page).all()
    more = len(found) > limit
    kept = found[:limit]
    width = len(rows.COLUMNS)
    next_cursor = cursors.write(_Cursor(sort, descending, as_of_us, list(kept[-1][width:]))) if more else None
    return Page(rows=tuple(TaskRow(*row[:width]) for row in kept), total=total, next_cursor=next_cursor)


def ids_of(conn: Connection, *, filters: Filters, after: str = "", limit: int = MAX_LIMIT) -> tuple[list[str], int]:
    """(ids in their own order that come after `after`, at most `limit`; how many come after it in all)."""
    where = [*_where(filters), *([tasks.c.id > after] if after else [])]
    total = conn.execute(sa.select(sa.func.count()).select_from(tasks).where(*where)).scalar_one()
    found = conn.execute(sa.select(tasks.c.id).where(*where).order_by(tasks.c.id).limit(limit))
    return [task for (task,) in found], total


def still_match(conn: Connection, task_ids: Sequence[str], *, filters: Filters) -> list[str]:
    """Those of the tasks that match, in the order given."""
    found = conn.execute(sa.select(tasks.c.id).where(tasks.c.id.in_(task_ids), *_where(filters))) if task_ids else ()
    matching = {task for (task,) in found}
    return [task for task in task_ids if task in matching]


def events_of(conn: Connection, *, task_id: str, after_seq: int = 0, limit: int = MAX_EVENTS) -> Sequence[Event]:
    """What happened to a task, oldest first. NotFound when there is none such."""
    rows.get(conn, task_id)
    found = conn.execute(_EVENTS, {"of_task": task_id, "after": after_seq, "most": min(limit, MAX_EVENTS)})
    return [Event(**row) for row in found.mappings()]


def count_events(conn: Connection, task_id: str) -> int:
    """How many events a task has."""
    return conn.execute(_COUNT_EVENTS, {"of_task": task_id}).scalar_one()


def attempts_of(conn: Connection, task_id: str) -> list[dict[str, Any]]:
    """Every try at a task, oldest first, as columns of the table `attempts`, without the token."""
    found = conn.execute(_ATTEMPTS, {"of_task": task_id}).mappings()
    return [{name: value for name, value in row.items() if name != "token"} for row in found]


def ahead_in_line(conn: Connection, task: TaskRow) -> int | None:
    """How many tasks of its orchestrator are claimed before it; None when it does not stand in line."""
    if task.status != "TODO" or task.wakes_at_us is not None or task.parked_by is not None or task.orchestrator is None:
        return None
    return ahead_of(conn, task, rank=task.rank)


def ahead_of(conn: Connection, task: TaskRow, *, rank: int) -> int:
    """How many tasks of its orchestrator's line are claimed before it, were it there with this rank."""
    return conn.execute(_AHEAD, _placed(task, rank)).scalar_one()


def ahead_of_parked(conn: Connection, task: TaskRow, *, at: str) -> int:
    """How many tasks of its orchestrator that are parked at the same limit (`limit=value`) come before it."""
    return conn.execute(_AHEAD_OF_PARKED, {**_placed(task, task.rank), "at": at}).scalar_one()


def _placed(task: TaskRow, rank: int) -> dict[str, Any]:
    place = {"rank": rank, "due": task.due_key_us, "created": task.created_at_us, "id": task.id}
    return {"orchestrator": task.orchestrator, **place}


def count_by_status(conn: Connection, orchestrator: str | None = None) -> dict[str, int]:
    """How many tasks have each status; of one orchestrator, or of all."""
    query = sa.select(tasks.c.status, sa.func.count().label("many")).group_by(tasks.c.status)
    if orchestrator is not None:
        query = query.where(tasks.c.orchestrator == orchestrator)
    return {row.status: row.many for row in conn.execute(query)}


def _key(conn: Connection, sort: Sort, as_of_us: int) -> tuple[ColumnElement[Any], ...]:
    """The columns that make the order total. None of them is ever NULL."""
    match sort:
        case "claim":
            return (_rank(conn, as_of_us), tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
        case "priority":
            return (_CLASS, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
        case "due_at":
            return (tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
        case "created_at":
            return (tasks.c.created_at_us, tasks.c.id)
        case "updated_at":
            return (tasks.c.updated_at_us, tasks.c.id)


def _rank(conn: Connection, as_of_us: int) -> ColumnElement[Any]:
    """The rank as of a time: the stored one when nothing was or became ripe since, which an index gives in order."""
    moved_since = counters.get(conn, ripen.LAST_RIPENED) > as_of_us
    if not moved_since and conn.execute(_ANY_RIPE, {"as_of": as_of_us}).first() is None:
        return tasks.c.rank
    as_of = sa.literal(as_of_us, sa.BigInteger)
    waited = sa.case((as_of > tasks.c.waiting_since_us, as_of - tasks.c.waiting_since_us), else_=0)
    risen = _CLASS - waited // line.AGING_US
    awake = sa.or_(tasks.c.wakes_at_us.is_(None), tasks.c.wakes_at_us <= as_of)
    return sa.case(
        (sa.or_(tasks.c.status != "TODO", sa.not_(awake)), tasks.c.rank),
        (risen < 0, 0),
        else_=risen,
    )


def _where(filters: Filters) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    for column, words in (
        (tasks.c.status, filters.status),
        (tasks.c.blocked_reason, filters.blocked_reason),
        (tasks.c.priority, filters.priority),
        (tasks.c.orchestrator, filters.orchestrator),
        (tasks.c.discipline, filters.discipline),
    ):
        if words:
            conditions.append(column.in_(words))
    if filters.tag:
        conditions.append(sa.exists().where(task_tags.c.task == tasks.c.id, task_tags.c.tag.in_(filters.tag)))
    if filters.q:
        # Both sides are lowered by the database, each in its own way: SQLite knows only ASCII.
        text = sa.func.lower(f"%{filters.q.translate(_LIKE_ESCAPED)}%")
        conditions.append(
            sa.or_(
                sa.func.lower(tasks.c.title).like(text, escape=_ESCAPE),
                sa.func.lower(tasks.c.description).like(text, escape=_ESCAPE),
                tasks.c.id == filters.q,
            )
        )
    if filters.due_before_us is not None:
        conditions.append(tasks.c.due_at_us < filters.due_before_us)
    if filters.due_after_us is not None:
        conditions.append(tasks.c.due_at_us > filters.due_after_us)
    if filters.created_after_us is not None:
        conditions.append(tasks.c.created_at_us > filters.created_after_us)
    if filters.unrouted:
        conditions.append(tasks.c.orchestrator.is_(None))
    return conditions


def _read_cursor(text: str, *, sort: str, descending: bool) -> _Cursor:
    cursor: _Cursor = cursors.read(text, _Cursor, of=SAME_SORT)
    widths = {"claim": 4, "priority": 4, "due_at": 3, "created_at": 2, "updated_at": 2}
    shape = [int] * (widths[sort] - 1) + [str]
    if (cursor.sort, cursor.descending) != (sort, descending) or [type(value) for value in cursor.key] != shape:
        raise cursors.wrong(of=SAME_SORT)
    return cursor
