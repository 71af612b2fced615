"""Limits per key: how many tasks run, or begin in a minute, for each value of a CEL expression over the task.

A claim asks for the key of each task it could take, and counts the rows of `limit_uses` for its value. A task whose
limit is full is *parked* (`parked_by` is `limit=value`), which takes it out of the index that is the line: no later
claim walks over it again.

    claim ── room ──▶ runs, with a row of limit_uses for each limit that applies to it
      │                 │
      │ full            │ ends: the row is closed, and so many are called up as places came free,
      ▼                 ▼ the first of the line of each orchestrator that has some parked there
    parked ◀──────── called up, in line again: whoever claims next asks anew

What is called up may be cancelled, edited or paused before it is claimed, and a limit per minute has room again by
time alone. So `call_up` puts places and parked tasks together once more: a claim that found nothing runs it for its
orchestrator, and a loop for all of them. It costs a look for each full key, however many tasks are parked there.

A key that is null, or can't be evaluated, means that the limit does not apply to the task. What a running attempt
counts on was decided when it began (`counts_on`); a change of rules decides it anew (`recount`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.schema import CLAIMABLE, RUNNING, attempts, limit_uses, tasks
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import view
from orchestrator_fleet.tasks.rules import Limit, Rules
from orchestrator_fleet.tasks.task import TaskRow

MAX_VALUE_CHARS = 200
WINDOW_US = 60 * SECOND_US
BATCH = 500
MAX_KEYS = 10_000
MAX_ORCHESTRATORS = 10_000
_DIGEST_CHARS = 16

_LOCK = "limits"
# Of no key in particular: who ends an attempt holds rows of tasks by then, and many who each lock several keys, one
# after the other, would wait for each other in circles.
_PARKED = "parked_by IS NOT NULL"
_MOVE = (
    limit_uses.update()
    .where(limit_uses.c.started_at_us > sa.bindparam("beyond"))
    .values(started_at_us=limit_uses.c.started_at_us + sa.bindparam("by", type_=sa.BigInteger))
)
_RUNNING_NOW = Statement(
    sa.select(sa.func.count())
    .select_from(limit_uses)
    .where(
        limit_uses.c.limit_name == sa.bindparam("name"),
        limit_uses.c.value == sa.bindparam("of"),
        sa.text("ended_at_us IS NULL"),
    )
)
# A clock that is not quite another's is tolerated, one that was set back does not keep a limit shut until it is there
# again.
_IN_WINDOW = sa.and_(
    limit_uses.c.limit_name == sa.bindparam("name"),
    limit_uses.c.value == sa.bindparam("of"),
    limit_uses.c.started_at_us > sa.bindparam("since"),
    limit_uses.c.started_at_us <= sa.bindparam("until"),
)
_STARTED = Statement(sa.select(sa.func.count()).select_from(limit_uses).where(_IN_WINDOW))
_STARTS = Statement(
    sa.select(limit_uses.c.started_at_us)
    .where(_IN_WINDOW)
    .order_by(limit_uses.c.started_at_us.desc())
    .limit(sa.bindparam("most"))
)
_PARK = Statement(
    tasks.update().where(tasks.c.id == sa.bindparam("key"), sa.text("status = 'TODO'")), sets=("parked_by",)
)
_USE = Statement(limit_uses.insert(), sets=("limit_name", "value", "task", "attempt", "started_at_us"))
_CLOSE = Statement(
    limit_uses.update().where(
        limit_uses.c.task == sa.bindparam("of_task"),
        limit_uses.c.attempt == sa.bindparam("number"),
        limit_uses.c.ended_at_us.is_(None),
    ),
    sets=("ended_at_us",),
)
_FIRST = Statement(
    sa.select(tasks.c.id, tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us)
    .where(tasks.c.parked_by == sa.bindparam("at"), tasks.c.orchestrator == sa.bindparam("of"), sa.text(_PARKED))
    .order_by(tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_HEAD = Statement(
    sa.select(tasks.c.id, tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us)
    .where(tasks.c.orchestrator == sa.bindparam("of"), sa.text(CLAIMABLE))
    .order_by(tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
    .limit(1)
)
_UNPARK = Statement(
    tasks.update().where(tasks.c.id == sa.bindparam("key"), sa.text("status = 'TODO'")), sets=("parked_by",)
)
_ANY_PARKED = sa.select(tasks.c.id).where(sa.text(_PARKED)).limit(1)
_BEGAN = sa.select(attempts.c.started_at_us).where(
    attempts.c.task == sa.bindparam("of_task"), attempts.c.attempt == sa.bindparam("number")
)
_SOME_PARKED = sa.select(tasks.c.id).where(sa.text(_PARKED)).limit(BATCH).with_for_update(skip_locked=True)
_SOME_RUNNING = (
    sa.select(*(tasks.c[name] for name in TaskRow.__struct_fields__))
    .where(sa.text(RUNNING), tasks.c.id > sa.bindparam("after"))
    .order_by(tasks.c.id)
    .limit(BATCH)
    .with_for_update()
)
_COUNTS_ON = Statement(tasks.update().where(tasks.c.id == sa.bindparam("key"), sa.text(RUNNING)), sets=("counts_on",))
_DROP_USES = Statement(
    limit_uses.delete().where(
        limit_uses.c.task == sa.bindparam("of_task"), limit_uses.c.attempt == sa.bindparam("number")
    )
)
_OLD = (
    sa.select(limit_uses.c.task, limit_uses.c.attempt)
    .where(limit_uses.c.ended_at_us < sa.bindparam("before"), sa.text("ended_at_us IS NOT NULL"))
    .limit(BATCH)
)


def _distinct_keys(*, of_one: bool) -> Statement:
    """Each value of `parked_by` once, by a probe of the index for each and not by a walk over all that are parked."""
    parked = sa.select(tasks.c.parked_by).where(sa.text(_PARKED)).order_by(tasks.c.parked_by).limit(1)
    keys = sa.select(parked.scalar_subquery().label("key")).cte("keys", recursive=True)
    following = parked.where(tasks.c.parked_by > keys.c.key).correlate(keys).scalar_subquery()
    keys = keys.union_all(sa.select(following).where(keys.c.key.is_not(None)))
    query = sa.select(keys.c.key).where(keys.c.key.is_not(None)).limit(MAX_KEYS)
    if of_one:
        of_it = sa.exists().where(
            tasks.c.parked_by == keys.c.key, tasks.c.orchestrator == sa.bindparam("of"), sa.text(_PARKED)
        )
        query = query.where(of_it)
    return Statement(query)


def _distinct_orchestrators() -> Statement:
    """Each orchestrator that has a task parked at a key, in the same way."""
    parked = (
        sa.select(tasks.c.orchestrator)
        .where(tasks.c.parked_by == sa.bindparam("at"), tasks.c.orchestrator.is_not(None), sa.text(_PARKED))
        .order_by(tasks.c.orchestrator)
        .limit(1)
    )
    names = sa.select(parked.scalar_subquery().label("name")).cte("names", recursive=True)
    following = parked.where(tasks.c.orchestrator > names.c.name).correlate(names).scalar_subquery()
    names = names.union_all(sa.select(following).where(names.c.name.is_not(None)))
    return Statement(sa.select(names.c.name).where(names.c.name.is_not(None)).limit(MAX_ORCHESTRATORS))


_KEYS, _KEYS_OF_ONE = _distinct_keys(of_one=False), _distinct_keys(of_one=True)
_ORCHESTRATORS = _distinct_orchestrators()


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedOut:
    """Of a piece of the line: whose limits have room, with what each will count on; and how many were parked."""

    taken: Sequence[tuple[TaskRow, list[list[str]] | None]]
    parked: int = 0


def applying(task: TaskRow, limits: Sequence[Limit]) -> list[tuple[Limit, str]]:
    """The limits that apply to a task, with its value for each. Pure."""
    if not limits:
        return []
    context = {"task": {name: value for name, value in view.to_json(task).items() if value is not None}}
    found = ((limit, _value(limit, context)) for limit in limits)
    return [(limit, value) for limit, value in found if value is not None]


def sort_out(conn: Connection, line: Sequence[TaskRow], *, rules: Rules, most: int, now_us: int) -> SortedOut:
    """Take up to `most` tasks of the line whose limits all have room, in its order, and park those before the last.

    The tasks are held by the caller. Those that are taken count on each other.
    """
    if not rules.limits:
        return SortedOut(taken=[(task, None) for task in line[:most]])
    locks.hold(conn, _LOCK)
    rooms: dict[tuple[str, str], int] = {}
    taken: list[tuple[TaskRow, list[list[str]] | None]] = []
    parked: list[dict[str, str]] = []
    for task in line:
        if len(taken) >= most:
            break
        keys = applying(task, rules.limits)
        for limit, value in keys:
            if (limit.name, value) not in rooms:
                rooms[limit.name, value] = _room(conn, limit, value, now_us)
        full = next((_at(limit.name, value) for limit, value in keys if rooms[limit.name, value] <= 0), None)
        if full is not None:
            parked.append({"key": task.id, "parked_by": full})
            continue
        for limit, value in keys:
            rooms[limit.name, value] -= 1
        taken.append((task, [[limit.name, value] for limit, value in keys] or None))
    if parked:
        _PARK.many(conn, parked)
    return SortedOut(taken=taken, parked=len(parked))


def begin(conn: Connection, taken: Sequence[TaskRow], now_us: int) -> None:
    """Count attempts that begin now, where their `counts_on` says; the rows are those after the claim."""
    uses = [_use(task, limit, value, now_us) for task in taken for limit, value in task.counts_on or ()]
    if uses:
        _USE.many(conn, uses)


def end(conn: Connection, ended: Sequence[TaskRow], *, now_us: int) -> None:
    """Count attempts no longer, and call up who waits for their places; the rows are those before the end."""
    freed = Counter(_at(limit, value) for task in ended for limit, value in task.counts_on or ())
    if not freed:
        return
    locks.hold(conn, _LOCK)
    over = [task for task in ended if task.counts_on]
    _CLOSE.many(conn, [{"of_task": task.id, "number": task.attempt, "ended_at_us": now_us} for task in over])
    for at, places in sorted(freed.items()):
        for (orchestrator,) in _ORCHESTRATORS.rows(conn, {"at": at}):
            _call(conn, at, orchestrator, most=places, now_us=now_us)


def call_up(conn: Connection, *, rules: Rules, now_us: int) -> int:
    """Put back in line whoever is parked at a limit that has room after all; answers how many.

    Of each orchestrator only what comes before the first of its line: what stands there may be what was called up
    already. An event `limit_freed` wakes those who wait for it.
    """
    if not any_are_parked(conn):
        return 0
    locks.hold(conn, _LOCK)
    called = 0
    for at, room in _with_room(conn, [key for (key,) in _KEYS.rows(conn, {})], rules, now_us):
        for (orchestrator,) in _ORCHESTRATORS.rows(conn, {"at": at}):
            first = _FIRST.rows(conn, {"at": at, "of": orchestrator, "most": 1})
            head = _HEAD.rows(conn, {"of": orchestrator})
            if first and (not head or _place(first[0]) < _place(head[0])):
                called += _call(conn, at, orchestrator, most=room, now_us=now_us)
    return called


def call_up_for(conn: Connection, orchestrator: str, *, rules: Rules, most: int, now_us: int) -> int:
    """The same for one orchestrator whose line has no more: it gets what waits at limits with room, `most` of each."""
    keys = [key for (key,) in _KEYS_OF_ONE.rows(conn, {"of": orchestrator})]
    if not keys:
        return 0
    locks.hold(conn, _LOCK)
    return sum(
        len(_unpark_first(conn, at, orchestrator, most=min(room, most)))
        for at, room in _with_room(conn, keys, rules, now_us)
    )


def any_are_parked(conn: Connection) -> bool:
    """Whether any task is parked at all."""
    return conn.execute(_ANY_PARKED).first() is not None


def where_parked(conn: Connection, orchestrator: str) -> str | None:
    """A full limit (`limit=value`) at which the orchestrator has tasks parked; None when it has none."""
    return next((at for (at,) in _KEYS_OF_ONE.rows(conn, {"of": orchestrator})), None)


def next_opening(conn: Connection, orchestrator: str, rules: Rules, now_us: int) -> int | None:
    """When time alone gives room to a limit at which the orchestrator has tasks parked (microseconds)."""
    by_time = {limit.name: limit for limit in rules.limits if limit.max_per_minute is not None}
    if not by_time:
        return None
    moments = []
    for (at,) in _KEYS_OF_ONE.rows(conn, {"of": orchestrator}):
        name, _, value = at.partition("=")
        limit = by_time.get(name)
        if limit is not None and (moment := _opens_at(conn, limit, value, now_us)) is not None:
            moments.append(moment)
    return min(moments, default=None)


def unpark_all(conn: Connection, now_us: int) -> bool:  # noqa: ARG001 (as all that change tasks)
    """After a change of rules: put BATCH parked tasks back in line; whether there may be more."""
    some = conn.execute(_SOME_PARKED).scalars().all()
    if some:
        _UNPARK.many(conn, [{"key": task, "parked_by": None} for task in some])
    return len(some) == BATCH


def recount(conn: Connection, *, rules: Rules, after: str = "") -> str | None:
    """After a change of rules: decide anew what BATCH running attempts count on, those whose task comes after `after`.

    Answers the task to go on after, None when that was the last.
    """
    some = [TaskRow(*row) for row in conn.execute(_SOME_RUNNING, {"after": after})]
    locks.hold(conn, _LOCK)  # after the rows, as who claims or ends an attempt takes them
    for task in some:
        counts_on = [[limit.name, value] for limit, value in applying(task, rules.limits)] or None
        if counts_on == task.counts_on:
            continue
        began_us = conn.execute(_BEGAN, {"of_task": task.id, "number": task.attempt}).scalar_one()
        _DROP_USES.run(conn, {"of_task": task.id, "number": task.attempt})
        _COUNTS_ON.run(conn, {"key": task.id, "counts_on": counts_on})
        begin(conn, [msgspec.structs.replace(task, counts_on=counts_on)], began_us)
    return some[-1].id if len(some) == BATCH else None


def move(conn: Connection, *, by_us: int, beyond_us: int) -> None:
    """After the clock was set back: what began later than `beyond_us` began that much earlier."""
    conn.execute(_MOVE, {"by": by_us, "beyond": beyond_us})


def forget(conn: Connection, now_us: int) -> int:
    """Drop rows of attempts that ended so long ago that no limit asks for them; answers how many, BATCH at most."""
    old = conn.execute(_OLD, {"before": now_us - 2 * WINDOW_US}).all()
    if old:
        _DROP_USES.many(conn, [{"of_task": task, "number": attempt} for task, attempt in old])
    return len(old)


def _value(limit: Limit, context: Mapping[str, Any]) -> str | None:
    """The value of a limit's key, None where it does not apply."""
    try:
        value = limit.key.execute(context)
    except Exception:  # noqa: BLE001 (the evaluator raises many kinds, and all mean: the limit does not apply)
        return None
    return None if value is None else _text(value)


def _text(value: Any) -> str:
    """A value as text that a database holds; long ones stay different from each other."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace("\0", "?")
    if len(text) <= MAX_VALUE_CHARS:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]
    return f"{text[: MAX_VALUE_CHARS - _DIGEST_CHARS - 1]}~{digest}"


def _at(limit: str, value: str) -> str:
    return f"{limit}={value}"


def _room(conn: Connection, limit: Limit, value: str, now_us: int) -> int:
    """How many more may begin now."""
    rooms: list[int] = []
    if limit.max_running is not None:
        ((running,),) = _RUNNING_NOW.rows(conn, {"name": limit.name, "of": value})
        rooms.append(limit.max_running - running)
    if limit.max_per_minute is not None:
        ((started,),) = _STARTED.rows(conn, _window(limit, value, now_us))
        rooms.append(limit.max_per_minute - started)
    return min(rooms)


def _opens_at(conn: Connection, limit: Limit, value: str, now_us: int) -> int | None:
    """When enough starts will have left the minute; None when it is not they that fill the limit."""
    assert limit.max_per_minute is not None  # noqa: S101 (asked for such limits alone)
    latest = _STARTS.rows(conn, {**_window(limit, value, now_us), "most": limit.max_per_minute})
    return int(latest[-1][0]) + WINDOW_US if len(latest) == limit.max_per_minute else None


def _window(limit: Limit, value: str, now_us: int) -> dict[str, Any]:
    return {"name": limit.name, "of": value, "since": now_us - WINDOW_US, "until": now_us + WINDOW_US}


def _with_room(conn: Connection, keys: Sequence[str], rules: Rules, now_us: int) -> Iterator[tuple[str, int]]:
    """(key, room) of those that have any; one of a limit that is no longer declared has plenty."""
    declared = {limit.name: limit for limit in rules.limits}
    for at in keys:
        name, _, value = at.partition("=")
        room = _room(conn, declared[name], value, now_us) if name in declared else BATCH
        if room > 0:
            yield at, min(room, BATCH)


def _call(conn: Connection, at: str, orchestrator: str, *, most: int, now_us: int) -> int:
    """Put the first of an orchestrator's tasks that are parked at a key back in line, and say so."""
    called = _unpark_first(conn, at, orchestrator, most=most)
    if called:
        name, _, value = at.partition("=")
        outbox.append(
            conn,
            outbox.Event(
                at_us=now_us,
                kind="limit_freed",
                orchestrator=orchestrator,
                actor="system",
                data={"limit": name, "value": value},
            ),
        )
    return len(called)


def _unpark_first(conn: Connection, at: str, orchestrator: str, *, most: int) -> list[str]:
    first = [task for task, *_ in _FIRST.rows(conn, {"at": at, "of": orchestrator, "most": most})]
    if first:
        _UNPARK.many(conn, [{"key": task, "parked_by": None} for task in first])
    return first


def _place(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*row[1:], row[0])


def _use(task: TaskRow, limit: str, value: str, now_us: int) -> dict[str, Any]:
    return {"limit_name": limit, "value": value, "task": task.id, "attempt": task.attempt, "started_at_us": now_us}
