"""The conflicts of one moment: what `conflicts` looks at, read in one snapshot; and what somebody decided of them.

Each kind reads by an index, and no more than its limit of rows; where there are more, the answer says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import errors
from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import NotFound
from orchestrator_fleet.orchestrators import conflicts
from orchestrator_fleet.orchestrators.conflicts import (
    NAMED,
    STOPS_IN_US,
    TYPES,
    Asked,
    Awaited,
    Conflict,
    Contested,
    Crowd,
    Due,
    Holder,
    Line,
    Session,
    Wait,
)
from orchestrator_fleet.orchestrators.coordination import HUMAN
from orchestrator_fleet.orchestrators.presence import BEAT_S, MISSED_BEATS
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import (
    CLAIMABLE,
    COORDINATION_OPEN,
    RUNNING,
    attempts,
    conflict_resolutions,
    coordinations,
    presence,
    task_dependencies,
    tasks,
)
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import line, why
from orchestrator_fleet.tasks.rules import ANYTHING_GOES, Rules
from orchestrator_fleet.wire.vps import ConflictType as Type

MAX_RUNNING = 5_000
MAX_BLOCKED = 5_000
MAX_EDGES = 20_000
MAX_ASKED = 1_000
MAX_ANCESTORS = 20
MAX_DUE = 5_000
DUE_OF_A_CLASS = 500
MAX_LINES = 2_000
COUNTED = 10_000
CHUNK = 500
RANKS = range(4)
# Who was heard of in that time before a lease ran out is connected, and is told so at its next beat.
SILENT_US = round(MISSED_BEATS * BEAT_S * SECOND_US)
# Asking above is no delegation: whoever was asked from above may well ask back.
LOOPING = ("delegation", "handoff", "collaboration")

_before = tasks.alias("before")
_lost = attempts.alias("lost")
_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)

_RUNNING_BY = (
    sa.select(tasks.c.orchestrator, tasks.c.machine, sa.func.count())
    .where(sa.text(RUNNING))
    .group_by(tasks.c.orchestrator, tasks.c.machine)
)
_SESSIONS = (
    sa.select(
        tasks.c.id, tasks.c.attempt, tasks.c.orchestrator, tasks.c.machine, attempts.c.started_at_us, tasks.c.metadata
    )
    .join(attempts, sa.and_(attempts.c.task == tasks.c.id, attempts.c.attempt == tasks.c.attempt))
    .where(tasks.c.status == "IN_PROGRESS", sa.text(f"tasks.{RUNNING}"))
)
_NEWEST = (attempts.c.started_at_us.desc(), tasks.c.id.desc())
_SESSIONS_OF = _SESSIONS.where(tasks.c.orchestrator == sa.bindparam("of")).order_by(*_NEWEST).limit(NAMED)
_SESSIONS_ON = _SESSIONS.where(tasks.c.machine == sa.bindparam("of")).order_by(*_NEWEST).limit(NAMED)
_SOME_SESSIONS = _SESSIONS.order_by(tasks.c.orchestrator, tasks.c.machine).limit(sa.bindparam("most"))
_LOST = (
    sa.select(
        tasks.c.id,
        tasks.c.orchestrator,
        tasks.c.machine,
        tasks.c.attempt,
        attempts.c.started_at_us,
        _lost.c.orchestrator.label("lost_by"),
        _lost.c.machine.label("lost_on"),
        _lost.c.attempt.label("lost_attempt"),
        _lost.c.ended_at_us.label("lost_at_us"),
    )
    .join(attempts, sa.and_(attempts.c.task == tasks.c.id, attempts.c.attempt == tasks.c.attempt))
    .join(_lost, sa.and_(_lost.c.task == tasks.c.id, _lost.c.attempt < tasks.c.attempt))
    .outerjoin(presence, presence.c.orchestrator == _lost.c.orchestrator)
    .where(
        sa.text(f"tasks.{RUNNING}"),
        _lost.c.outcome == "lease_lost",
        _lost.c.machine != "",
        sa.or_(
            presence.c.machine.is_(None),
            presence.c.machine != _lost.c.machine,
            presence.c.last_seen_us < _lost.c.ended_at_us - SILENT_US,
        ),
    )
    .limit(sa.bindparam("most"))
)
_SAID = (
    sa.select(
        tasks.c.id,
        tasks.c.status,
        tasks.c.orchestrator,
        tasks.c.machine,
        tasks.c.attempt,
        tasks.c.token,
        tasks.c.updated_at_us,
    )
    .where(tasks.c.id.in_(_IDS), tasks.c.status.in_(("TODO", "IN_PROGRESS", "BLOCKED")))
    .order_by(tasks.c.id)
)
_TRIES = sa.select(
    attempts.c.task, attempts.c.attempt, attempts.c.token, attempts.c.started_at_us, attempts.c.ended_at_us
).where(attempts.c.task.in_(_IDS))
_BLOCKED = (
    sa.select(tasks.c.id, tasks.c.orchestrator, tasks.c.blocked_reason)
    .where(tasks.c.status == "BLOCKED")
    .order_by(tasks.c.orchestrator)
    .limit(sa.bindparam("most"))
)
_WAITS = (
    sa.select(
        task_dependencies.c.task,
        _before.c.id,
        _before.c.status,
        _before.c.blocked_reason,
        _before.c.orchestrator,
        _before.c.attempt,
        _before.c.updated_at_us,
    )
    .join(_before, _before.c.id == task_dependencies.c.depends_on)
    .where(task_dependencies.c.task.in_(_IDS), _before.c.status != "DONE")
    .order_by(task_dependencies.c.task, task_dependencies.c.depends_on)
    .limit(sa.bindparam("most"))
)
_ASKED = (
    sa.select(
        coordinations.c.id,
        coordinations.c.kind,
        coordinations.c.task,
        coordinations.c.source,
        coordinations.c.target,
        coordinations.c.created_at_us,
    )
    .where(coordinations.c.kind == sa.bindparam("of"), sa.text(COORDINATION_OPEN))
    .order_by(coordinations.c.id)
    .limit(sa.bindparam("most"))
)
_PARENTS = sa.select(tasks.c.id, tasks.c.parent).where(tasks.c.id.in_(_IDS))
# The index of the line has all that is read here, and each class begins with what is due.
_DUE = Statement(
    sa.select(tasks.c.due_key_us, tasks.c.id)
    .where(
        tasks.c.orchestrator == sa.bindparam("of"),
        tasks.c.rank == sa.bindparam("class"),
        tasks.c.due_key_us < sa.literal_column(str(line.NO_DUE_US)),
        sa.text(CLAIMABLE),
    )
    .order_by(tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
    .limit(sa.bindparam("most"))
)
_BEFORE_CLASS = Statement(
    sa.select(sa.func.count()).select_from(
        sa.select(tasks.c.id)
        .where(tasks.c.orchestrator == sa.bindparam("of"), tasks.c.rank < sa.bindparam("class"), sa.text(CLAIMABLE))
        .limit(sa.literal_column(str(COUNTED)))
        .subquery("counted")
    )
)
_RESOLVED = sa.select(conflict_resolutions).where(conflict_resolutions.c.id.in_(_IDS))
_RESOLVE = conflict_resolutions.insert()

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a connected daemon says it works on: the token by task, and when it said so."""

    orchestrator: str
    machine: str
    at_us: int
    held: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What is declared, and what is known of connected daemons. `slots`: how many sessions each has room for."""

    orchestrators: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: Rules = ANYTHING_GOES
    slots: Mapping[str, int] = field(default_factory=dict)
    said: Sequence[Said] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """That somebody decided a conflict."""

    by: str
    at_us: int
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The conflicts, in the order of a list, and what was decided of them, by id.

    `truncated`: not everything was looked at, as there is too much of it.
    """

    conflicts: Sequence[Conflict]
    resolved: Mapping[str, Resolved]
    truncated: bool


class _Bounds:
    """Takes up to so many of what is found, and keeps in mind that there was more."""

    def __init__(self) -> None:
        self.were_passed = False

    def first(self, found: Iterable[T], most: int) -> list[T]:
        """The first `most` of what is found."""
        some = list(islice(found, most + 1))
        self.were_passed |= len(some) > most
        return some[:most]


def look(conn: Connection, around: Around, *, types: Sequence[Type] = TYPES, now_us: int) -> Board:
    """The conflicts of these types at `now_us`. Run it in a transaction that sees one snapshot."""
    bounds = _Bounds()
    found = [conflict for kind in TYPES if kind in types for conflict in _KINDS[kind](conn, around, bounds, now_us)]
    ordered = sorted(found, key=key)
    return Board(conflicts=ordered, resolved=_resolved(conn, [one.id for one in ordered]), truncated=bounds.were_passed)


def key(one: Conflict) -> tuple[int, int, str]:
    """Their order: by type, then the oldest first, what has no beginning last."""
    return TYPES.index(one.type), line.NO_DUE_US if one.since_us is None else one.since_us, one.id


def resolve(
    conn: Connection, conflict_id: str, around: Around, *, note: str, actor: str, now_us: int
) -> dict[str, Any]:
    """Keep that somebody decided it; the conflict as it is then.

    NotFound when no such conflict stands now, Conflict `already_resolved` when somebody did before.
    """
    locks.hold(conn, f"conflict:{conflict_id}")
    types = [kind for kind in TYPES if conflict_id.startswith(f"{kind}-")]
    board = look(conn, around, types=types, now_us=now_us)
    one = next((one for one in board.conflicts if one.id == conflict_id), None)
    if one is None:
        raise NotFound(f"no conflict {conflict_id[:100]} stands now; it may be over")
    if before := board.resolved.get(one.id):
        when = to_rfc3339(before.at_us)
        raise errors.Conflict("already_resolved", f"{one.id}: {before.by} decided it at {when}")
    now = Resolved(by=actor, at_us=now_us, note=note or None)
    shown = to_json(one, now)
    conn.execute(
        _RESOLVE,
        {"id": one.id, "kind": one.type, "evidence": one.evidence, "actor": actor, "note": now.note, "at_us": now_us},
    )
    alone = one.orchestrators[0] if len(one.orchestrators) == 1 else None
    event = Event(at_us=now_us, kind="conflict_resolved", actor=actor, orchestrator=alone, data={"conflict": shown})
    outbox.append(conn, event)
    return shown


def to_json(one: Conflict, resolved: Resolved | None) -> dict[str, Any]:
    """A conflict as the API shows it."""
    decided = None
    if resolved is not None:
        decided = {"by": resolved.by, "at": to_rfc3339(resolved.at_us), "note": resolved.note}
    return {
        "id": one.id,
        "type": one.type,
        "orchestrators": list(one.orchestrators),
        "tasks": list(one.tasks),
        "evidence": dict(one.evidence),
        "since": None if one.since_us is None else to_rfc3339(one.since_us),
        "suggestion": {"action": one.suggestion.action, "text": one.suggestion.text},
        "resolved": decided,
    }


def _resolved(conn: Connection, ids: Sequence[str]) -> dict[str, Resolved]:
    return {
        row.id: Resolved(by=row.actor, at_us=row.at_us, note=row.note)
        for some in _chunks(ids)
        for row in conn.execute(_RESOLVED, {"ids": some})
    }


def _double_ownership(conn: Connection, around: Around, bounds: _Bounds, now_us: int) -> Iterator[Conflict]:
    del now_us
    contested: dict[str, Contested] = {}
    for one in [*_not_told(conn, bounds), *_going_on(conn, around, bounds)]:
        before = contested.get(one.task)
        known = {holder.attempt for holder in before.holders} if before else set()
        holders = [*(before.holders if before else ()), *(new for new in one.holders if new.attempt not in known)]
        contested[one.task] = Contested(task=one.task, owner=one.owner, runs=one.runs, holders=holders)
    return conflicts.double_ownership(contested.values())


def _not_told(conn: Connection, bounds: _Bounds) -> Iterator[Contested]:
    """Tasks that run again while nobody has heard of the daemon that lost them: its session may go on."""
    for row in bounds.first(conn.execute(_LOST, {"most": MAX_RUNNING + 1}), MAX_RUNNING):
        holder = Holder(
            orchestrator=row.lost_by,
            machine=row.lost_on,
            attempt=row.lost_attempt,
            since_us=row.lost_at_us,
            reason="its lease ran out, and its daemon was not heard of there since, so nobody told it to stop",
        )
        runs = Session(
            task=row.id,
            attempt=row.attempt,
            orchestrator=row.orchestrator,
            machine=row.machine or "",
            started_at_us=row.started_at_us,
        )
        yield Contested(task=row.id, owner=row.orchestrator, runs=runs, holders=[holder])


def _going_on(conn: Connection, around: Around, bounds: _Bounds) -> Iterator[Contested]:
    """Tasks that a connected daemon says it works on, though they were another's for long when it said so."""
    said = bounds.first(((task, token, one) for one in around.said for task, token in one.held.items()), MAX_RUNNING)
    by_task: dict[str, list[tuple[str, Said]]] = defaultdict(list)
    for task, token, one in said:
        by_task[task].append((token, one))
    rows = [row for some in _chunks(list(by_task)) for row in conn.execute(_SAID, {"ids": some})]
    odd = [
        (row, token, one)
        for row in rows
        for token, one in by_task[row.id]
        if row.token != token and row.updated_at_us + STOPS_IN_US < one.at_us
    ]
    tries: dict[str, list[Any]] = defaultdict(list)
    for some in _chunks(list(dict.fromkeys(row.id for row, _, _ in odd))):
        for try_ in conn.execute(_TRIES, {"ids": some}):
            tries[try_.task].append(try_)
    for row, token, one in odd:
        lost = next((try_ for try_ in tries[row.id] if try_.token == token), None)
        runs = next((try_ for try_ in tries[row.id] if try_.token == row.token), None)
        if lost is None:
            continue  # it was never given this task
        holder = Holder(
            orchestrator=one.orchestrator,
            machine=one.machine,
            attempt=lost.attempt,
            since_us=lost.ended_at_us or row.updated_at_us,
            reason=f"its daemon said at {to_rfc3339(one.at_us)} that it still runs",
        )
        session = None
        if runs is not None:
            session = Session(
                task=row.id,
                attempt=row.attempt,
                orchestrator=row.orchestrator,
                machine=row.machine or "",
                started_at_us=runs.started_at_us,
            )
        yield Contested(task=row.id, owner=row.orchestrator, runs=session, holders=[holder])


def _dependency_deadlock(conn: Connection, around: Around, bounds: _Bounds, now_us: int) -> Iterator[Conflict]:
    del now_us
    blocked = bounds.first(conn.execute(_BLOCKED, {"most": MAX_BLOCKED + 1}), MAX_BLOCKED)
    owners = {row.id: row.orchestrator for row in blocked if row.blocked_reason == "dependency"}
    edges = (
        row for some in _chunks(list(owners)) for row in conn.execute(_WAITS, {"ids": some, "most": MAX_EDGES + 1})
    )
    waits = [
        Wait(
            task=row.task,
            owner=owners[row.task],
            awaited=Awaited(
                task=row.id,
                status=row.status,
                blocked_reason=row.blocked_reason,
                orchestrator=row.orchestrator,
                attempt=row.attempt,
                changed_at_us=row.updated_at_us,
            ),
        )
        for row in bounds.first(edges, MAX_EDGES)
    ]
    return conflicts.dependency_deadlock(waits, declared=around.orchestrators)


def _delegation_loop(conn: Connection, around: Around, bounds: _Bounds, now_us: int) -> Iterator[Conflict]:
    del around, now_us
    rows = [
        row
        for kind in LOOPING
        for row in bounds.first(conn.execute(_ASKED, {"of": kind, "most": MAX_ASKED + 1}), MAX_ASKED)
        if row.target is not None and not row.target.startswith(HUMAN)
    ]
    families = _families(conn, {row.task for row in rows})
    return conflicts.delegation_loop(
        Asked(
            id=row.id,
            kind=row.kind,
            task=row.task,
            family=families[row.task],
            source=row.source,
            target=row.target,
            created_at_us=row.created_at_us,
        )
        for row in rows
    )


def _families(conn: Connection, task_ids: Iterable[str]) -> dict[str, str]:
    """The topmost task above each, a step at a time for all of them."""
    top = {task: task for task in task_ids}
    for _ in range(MAX_ANCESTORS):
        asked = sorted(set(top.values()))
        rows = (row for some in _chunks(asked) for row in conn.execute(_PARENTS, {"ids": some}))
        parents = {row.id: row.parent for row in rows if row.parent is not None}
        if not parents:
            break
        top = {task: parents.get(above, above) for task, above in top.items()}
    return top


def _same_branch(conn: Connection, around: Around, bounds: _Bounds, now_us: int) -> Iterator[Conflict]:
    del now_us
    found = bounds.first(conn.execute(_SOME_SESSIONS, {"most": MAX_RUNNING + 1}), MAX_RUNNING)
    workspaces = {name: spec.get("workspace") or {} for name, spec in around.orchestrators.items()}
    return conflicts.same_branch((_session(row) for row in found), workspaces=workspaces)


def _over_capacity(conn: Connection, around: Around, bounds: _Bounds, now_us: int) -> Iterator[Conflict]:
    del bounds, now_us
    of: dict[str, int] = defaultdict(int)
    on: dict[str, int] = defaultdict(int)
    for orchestrator, machine, running in conn.execute(_RUNNING_BY):
        of[orchestrator] += running
        on[machine or ""] += running
    rules = around.rules
    most_of = {name: own.sessions_max for name, own in rules.orchestrators.items() if own.sessions_max is not None}
    crowds = [
        Crowd(kind="orchestrator", name=name, running=of[name], most=most, newest=_newest(conn, _SESSIONS_OF, name))
        for name, most in most_of.items()
        if of[name] > most
    ]
    crowds += [
        Crowd(kind="machine", name=name, running=on[name], most=most, newest=_newest(conn, _SESSIONS_ON, name))
        for name, most in rules.sessions_on.items()
        if on[name] > most
    ]
    return conflicts.over_capacity(crowds)


def _newest(conn: Connection, query: sa.Select[Any], name: str) -> list[Session]:
    return [_session(row) for row in conn.execute(query, {"of": name})]


def _session(row: Any) -> Session:
    return Session(
        task=row.id,
        attempt=row.attempt,
        orchestrator=row.orchestrator,
        machine=row.machine or "",
        started_at_us=row.started_at_us,
        metadata=row.metadata if isinstance(row.metadata, dict) else {},
    )


def _deadline_collision(conn: Connection, around: Around, bounds: _Bounds, now_us: int) -> Iterator[Conflict]:
    left = MAX_DUE
    lines = []
    for name in bounds.first(around.orchestrators, MAX_LINES):
        due = _due(conn, name, bounds, most=left)
        left -= len(due)
        if due:
            declared, free = around.rules.of(name).sessions_max, around.slots.get(name)
            slots = min((most for most in (declared, free) if most is not None), default=None)
            lines.append(Line(orchestrator=name, due=due, pace=why.pace_of(conn, name, slots=slots)))
    return conflicts.deadline_collision(lines, now_us=now_us)


def _due(conn: Connection, name: str, bounds: _Bounds, *, most: int) -> list[Due]:
    """What is due of a line, with how many come before each: those of the classes before, and those due sooner."""
    due: list[Due] = []
    for rank in RANKS:
        room = min(DUE_OF_A_CLASS, most - len(due))
        found = bounds.first(_DUE.rows(conn, {"of": name, "class": rank, "most": room + 1}), room)
        if found:
            ((before,),) = _BEFORE_CLASS.rows(conn, {"of": name, "class": rank}) if rank else ((0,),)
            due += [Due(task=task, due_at_us=at_us, ahead=before + place) for place, (at_us, task) in enumerate(found)]
    return due


_KINDS: Mapping[Type, Callable[[Connection, Around, _Bounds, int], Iterator[Conflict]]] = {
    "double_ownership": _double_ownership,
    "dependency_deadlock": _dependency_deadlock,
    "delegation_loop": _delegation_loop,
    "same_branch": _same_branch,
    "over_capacity": _over_capacity,
    "deadline_collision": _deadline_collision,
}


def _chunks(ids: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), CHUNK):
        yield list(ids[start : start + CHUNK])
