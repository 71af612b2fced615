"""What waits for what: edges between tasks, checked when they are made, followed when a task ends.

A task that waits is BLOCKED/dependency, and its `condition` names the newest few that it waits for: those usually end
last, so the sentence of a task that waits for a thousand is not rewritten a thousand times.

Where several may write at once (PostgreSQL): who makes an edge holds the tasks it leads to, so that none ends unseen;
who ends a task holds those that wait for it before looking what else they wait for; who adds edges to a task that
exists holds all edges, since two that are each fine alone may close a ring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict, Invalid
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.schema import task_dependencies, tasks
from orchestrator_fleet.store.statement import Statement, any_of
from orchestrator_fleet.tasks import rows, transitions
from orchestrator_fleet.tasks.task import MAX_DEPENDENCIES, TaskRow

NAMED = 5
PATH_END = 10  # steps of a ring that an error shows, from each of its ends

_DONE: sa.ColumnClause[str] = sa.literal_column("'DONE'")
_CANCELLED: sa.ColumnClause[str] = sa.literal_column("'CANCELLED'")
_OF_A_CANCELLED = "which was cancelled; unblock it, or cancel it too"

_STATUSES = Statement(sa.select(tasks.c.id, tasks.c.status).where(any_of(tasks.c.id, "ids")))
_STATUSES_HELD = Statement(
    sa.select(tasks.c.id, tasks.c.status)
    .where(any_of(tasks.c.id, "ids"))
    .order_by(tasks.c.id)
    .with_for_update(read=True)
)
_EDGES_TO = sa.select(task_dependencies.c.depends_on, task_dependencies.c.task)
_WAITING = Statement(_EDGES_TO.where(any_of(task_dependencies.c.depends_on, "ended")))
_WAITING_FOR_ONE = Statement(_EDGES_TO.where(task_dependencies.c.depends_on == sa.bindparam("ended")))
_INSERT = Statement(task_dependencies.insert(), sets=("task", "depends_on"))
_DELETE = Statement(task_dependencies.delete().where(task_dependencies.c.task == sa.bindparam("of_task")))
# The status that an edge leads to. As a value and not a join: always by the primary key, whatever a planner thinks.
_before = tasks.alias("before")
_THERE = sa.select(_before.c.status).where(_before.c.id == task_dependencies.c.depends_on).scalar_subquery()


def _newest(which: sa.ColumnElement[bool]) -> Statement:
    """(task, names of its newest NAMED + 1 dependencies among `which`, joined by commas) for each of `ids`.

    Walks a task's edges from the newest and stops at the last one that is named, however many there are.
    """
    few = (
        sa.select(task_dependencies.c.depends_on)
        .where(task_dependencies.c.task == tasks.c.id, which)
        .order_by(task_dependencies.c.depends_on.desc())
        .limit(sa.literal_column(str(NAMED + 1)))
        .correlate(tasks)
        .subquery("few")
    )
    comma: Any = sa.literal_column("','")  # a plain text would be put in at each execution
    names = sa.select(sa.func.aggregate_strings(few.c.depends_on, comma)).scalar_subquery()
    return Statement(sa.select(tasks.c.id, names).where(any_of(tasks.c.id, "ids")))


_NEWEST_LEFT = _newest(_THERE != _DONE)
_NEWEST_CANCELLED = _newest(_THERE == _CANCELLED)


def unmet(conn: Connection, depends_on: Sequence[str]) -> str | None:
    """What a task with these dependencies waits for, as a sentence; None when all are DONE. Invalid on unknown ids.

    The named tasks are held until the end of the transaction: none can end between this look and the commit.
    """
    (found,) = unmet_all(conn, [depends_on])
    if isinstance(found, Invalid):
        raise found
    return found


def unmet_all(conn: Connection, wanted: Sequence[Sequence[str]]) -> list[str | Invalid | None]:
    """The same for the dependencies of many tasks at once; what is wrong with one of them is its answer."""
    ids = {one for depends_on in wanted if len(depends_on) <= MAX_DEPENDENCIES for one in depends_on}
    statuses = dict(_STATUSES_HELD.rows(conn, {"ids": list(ids)})) if ids else {}
    return [_unmet(depends_on, statuses) for depends_on in wanted]


def _unmet(depends_on: Sequence[str], statuses: Mapping[str, str]) -> str | Invalid | None:
    if len(depends_on) > MAX_DEPENDENCIES:
        return Invalid([("depends_on", f"got {len(depends_on)} ids, wanted at most {MAX_DEPENDENCIES}")])
    unknown = [
        (f"depends_on[{n}]", f"there is no task {task}") for n, task in enumerate(depends_on) if task not in statuses
    ]
    if unknown:
        return Invalid(unknown)
    cancelled = [task for task in depends_on if statuses[task] == "CANCELLED"]
    return _sentence((task for task in depends_on if statuses[task] != "DONE"), cancelled=cancelled)


def write(conn: Connection, task_id: str, depends_on: Sequence[str]) -> None:
    """Write a new task's edges."""
    write_all(conn, [(task_id, depends_on)])


def write_all(conn: Connection, edges: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Write the edges of new tasks: (the task, what it depends on)."""
    new = [{"task": task, "depends_on": before} for task, depends_on in edges for before in depends_on]
    if new:
        _INSERT.many(conn, new)


def rewrite(conn: Connection, task_id: str, depends_on: Sequence[str]) -> None:
    """Replace a task's edges."""
    _DELETE.run(conn, {"of_task": task_id})
    write(conn, task_id, depends_on)


def follow(conn: Connection, ended: TaskRow, *, actor: str, now_us: int) -> list[TaskRow]:
    """`follow_all` for one task."""
    return follow_all(conn, [(ended, actor)], now_us=now_us)


def follow_all(conn: Connection, ended: Sequence[tuple[TaskRow, str]], *, now_us: int) -> list[TaskRow]:
    """After tasks became DONE or CANCELLED: those that waited for nothing else become TODO; answers these.

    `ended` is (the row after its end, who ended it), all of it written already. The others that waited get the sentence
    of what they still wait for, when it says something new.
    """
    if not ended:
        return []
    names = [task.id for task, _ in ended]
    alone = len(names) == 1  # see rows.get_all_to_change
    waiting_for = _WAITING_FOR_ONE.rows(conn, {"ended": names[0]}) if alone else _WAITING.rows(conn, {"ended": names})
    if not waiting_for:
        return []
    by = {task.id: number for number, (task, _) in enumerate(ended)}
    causes: dict[str, list[int]] = {}
    for before, task in waiting_for:
        causes.setdefault(task, []).append(by[before])
    # Held before it is asked what they wait for: who ends another of those at the same moment asks after us.
    held = rows.get_all_to_change(conn, list(causes))
    waiting = [task for task in held.values() if task.status == "BLOCKED" and task.blocked_reason == "dependency"]
    asked = {"ids": [task.id for task in waiting]}
    still = _names_by_task(_NEWEST_LEFT.rows(conn, asked))
    cancelled = {}
    if any(task.status == "CANCELLED" for task, _ in ended):
        cancelled = _names_by_task(_NEWEST_CANCELLED.rows(conn, asked))

    free, told_anew = [], []
    for task in waiting:
        task_, actor = ended[max(causes[task.id])]
        if not still[task.id]:
            free.append((task, transitions.unblocked(task, now_us=now_us), actor, f"{task_.id} is DONE"))
            continue
        condition = _sentence(still[task.id], cancelled=cancelled.get(task.id, ()))
        known = task.condition or ""
        if condition != known and (cancelled.get(task.id) or not known.endswith(_OF_A_CANCELLED)):
            told_anew.append((task, transitions.edited(condition=condition), actor, condition))
    events: list[outbox.Event] = []
    freed: list[TaskRow] = []
    for kind, changes in (("task_unblocked", free), ("task_blocked", told_anew)):
        after = rows.apply_all(conn, [(task, change) for task, change, _, _ in changes], now_us=now_us)
        freed += after if kind == "task_unblocked" else []
        events += [
            rows.event(kind, task, actor=actor, now_us=now_us, reason=reason)
            for task, (_, _, actor, reason) in zip(after, changes, strict=True)
        ]
    outbox.append(conn, *events)
    return freed


def hold_edges(conn: Connection) -> None:
    """Let nobody else add edges to tasks that exist until the transaction ends.

    Taken before any task is held: two who would make each other's task wait stand in each other's way else.
    """
    locks.hold(conn, "dependencies")


def refuse_cycle(conn: Connection, task_id: str, depends_on: Sequence[str]) -> None:
    """Conflict `dependency_cycle`, with the path, when `task_id` would wait for itself.

    Whatever stands behind it is looked at, but for what is behind a DONE task: all of that has ended, and `task_id`
    has not. Takes `hold_edges`, which the caller has better taken before.
    """
    if not depends_on:
        return
    hold_edges(conn)
    if task_id in depends_on:
        raise _ring([task_id, task_id])
    behind = _BEHIND.get(conn.dialect.name, _BEHIND[""])
    if not behind.has.rows(conn, {"starts": list(depends_on), "sought": task_id}):
        return
    leads_to: dict[str, list[str]] = {}
    for task, one in behind.edges.rows(conn, {"starts": list(depends_on)}):
        leads_to.setdefault(task, []).append(one)
    raise _ring(_shortest(leads_to, task_id, depends_on))


@dataclass(frozen=True, slots=True)
class _Behind:
    """Whether `sought` stands behind any of `starts`; all edges that go out from what stands behind them."""

    has: Statement
    edges: Statement


def _behind(*, lateral: bool) -> _Behind:
    """`lateral`: step from each task by itself.

    PostgreSQL, which can't know how many tasks a step leads to, would else read the whole table at every step.
    """
    edge = task_dependencies
    behind = (
        sa.select(tasks.c.id).where(any_of(tasks.c.id, "starts"), tasks.c.status != _DONE).cte("behind", recursive=True)
    )
    step = sa.select(edge.c.depends_on.label("id")).where(edge.c.task == behind.c.id, _THERE != _DONE)
    if lateral:
        one = step.correlate(behind).offset(sa.literal_column("0")).lateral("step")
        behind = behind.union(sa.select(one.c.id).select_from(behind.join(one, sa.true())))
    else:
        behind = behind.union(step)
    return _Behind(
        has=Statement(
            sa.select(behind.c.id).where(behind.c.id == sa.bindparam("sought")).limit(sa.literal_column("1"))
        ),
        edges=Statement(sa.select(edge.c.task, edge.c.depends_on).join(behind, behind.c.id == edge.c.task)),
    )


_BEHIND = {"": _behind(lateral=False), "postgresql": _behind(lateral=True)}


def _shortest(leads_to: Mapping[str, Sequence[str]], task_id: str, starts: Sequence[str]) -> list[str]:
    """The shortest way from `task_id` over one of `starts` back to it."""
    came_from, frontier = dict.fromkeys(starts, task_id), list(starts)
    while task_id not in came_from:
        reached = [(one, task) for task in frontier for one in leads_to.get(task, ()) if one not in came_from]
        came_from |= dict(reversed(reached))
        frontier = list(dict.fromkeys(one for one, _ in reached))
    path = [task_id, came_from[task_id]]
    while path[-1] != task_id:
        path.append(came_from[path[-1]])
    return path[::-1]


def _ring(path: Sequence[str]) -> Conflict:
    if len(path) > 2 * PATH_END:
        between = f"({len(path) - 2 * PATH_END} more)"
        path = [*path[:PATH_END], between, *path[-PATH_END:]]
    return Conflict("dependency_cycle", f"these would wait for each other: {' -> '.join(path)}")


def open_ones(conn: Connection, depends_on: Sequence[str]) -> tuple[list[str], list[str]]:
    """(not ended yet, cancelled) of the dependencies."""
    if not depends_on:
        return [], []
    statuses = dict(_STATUSES.rows(conn, {"ids": list(depends_on)}))
    return (
        [task for task in depends_on if statuses[task] not in ("DONE", "CANCELLED")],
        [task for task in depends_on if statuses[task] == "CANCELLED"],
    )


def _names_by_task(found: Iterable[tuple[str, str | None]]) -> dict[str, list[str]]:
    return {task: names.split(",") if names else [] for task, names in found}


def _sentence(waits_for: Iterable[str], *, cancelled: Iterable[str] = ()) -> str | None:
    gone, left = sorted(cancelled), sorted(waits_for)
    if gone:
        return f"waits for {_named(gone)}, {_OF_A_CANCELLED}"
    return f"waits for {_named(left)}" if left else None


def _named(ids: Sequence[str]) -> str:
    return ", ".join(ids[-NAMED:]) + (" and others" if len(ids) > NAMED else "")
