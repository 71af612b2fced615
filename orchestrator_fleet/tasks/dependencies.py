"""What waits for what: edges between tasks, checked when they are made, followed when a task ends."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict, Invalid
from orchestrator_fleet.store.schema import task_dependencies, tasks
from orchestrator_fleet.tasks import rows, transitions
from orchestrator_fleet.tasks.task import MAX_DEPENDENCIES, TaskRow

MAX_WALK = 10_000
NAMED = 5

_STATUSES = sa.select(tasks.c.id, tasks.c.status).where(tasks.c.id.in_(sa.bindparam("ids", expanding=True)))
_STATUSES_HELD = _STATUSES.with_for_update()
_EDGES_FROM = sa.select(task_dependencies.c.task, task_dependencies.c.depends_on).where(
    task_dependencies.c.task.in_(sa.bindparam("ids", expanding=True))
)
_WAITING = (
    sa.select(*rows.COLUMNS)
    .select_from(task_dependencies.join(tasks, tasks.c.id == task_dependencies.c.task))
    .where(
        task_dependencies.c.depends_on == sa.bindparam("ended"),
        tasks.c.status == "BLOCKED",
        tasks.c.blocked_reason == "dependency",
    )
)
_INSERT = task_dependencies.insert()
_DELETE = task_dependencies.delete().where(task_dependencies.c.task == sa.bindparam("of_task"))


def unmet(conn: Connection, depends_on: Sequence[str]) -> str | None:
    """What a task with these dependencies waits for, as a sentence; None when all are DONE. Invalid on unknown ids.

    The named tasks are held until the end of the transaction: none can end between this look and the commit.
    """
    if not depends_on:
        return None
    if len(depends_on) > MAX_DEPENDENCIES:
        raise Invalid([("depends_on", f"got {len(depends_on)} ids, wanted at most {MAX_DEPENDENCIES}")])
    found = {row.id: row.status for row in conn.execute(_STATUSES_HELD, {"ids": list(depends_on)})}
    unknown = [
        (f"depends_on[{n}]", f"there is no task {task}") for n, task in enumerate(depends_on) if task not in found
    ]
    if unknown:
        raise Invalid(unknown)
    return _sentence({task: status for task, status in found.items() if status != "DONE"})


def refuse_cycle(conn: Connection, task_id: str, depends_on: Sequence[str]) -> None:
    """Conflict `dependency_cycle`, with the path, when `task_id` would wait for itself."""
    came_from: dict[str, str] = dict.fromkeys(depends_on, task_id)
    frontier = list(came_from)
    while frontier:
        if task_id in came_from:
            raise Conflict(
                "dependency_cycle", f"these would wait for each other: {' -> '.join(_path(came_from, task_id))}"
            )
        if len(came_from) > MAX_WALK:
            raise Conflict(
                "dependency_cycle", f"{task_id}: more than {MAX_WALK} tasks stand behind it; depend on fewer"
            )
        edges = conn.execute(_EDGES_FROM, {"ids": frontier}).all()
        frontier = []
        for task, before in edges:
            if before not in came_from:
                came_from[before] = task
                frontier.append(before)


def write(conn: Connection, task_id: str, depends_on: Sequence[str]) -> None:
    """Write a new task's edges."""
    if depends_on:
        conn.execute(_INSERT, [{"task": task_id, "depends_on": before} for before in depends_on])


def rewrite(conn: Connection, task_id: str, depends_on: Sequence[str]) -> None:
    """Replace a task's edges."""
    conn.execute(_DELETE, {"of_task": task_id})
    write(conn, task_id, depends_on)


def follow(conn: Connection, ended: TaskRow, *, actor: str, now_us: int) -> list[TaskRow]:
    """After `ended` became DONE or CANCELLED: tasks that waited for it alone become TODO; answers those.

    The others that waited get the sentence of what they still wait for, when it says something new.
    """
    freed = []
    for waiting in sorted(map(rows.read, conn.execute(_WAITING, {"ended": ended.id})), key=attrgetter("id")):
        found = {row.id: row.status for row in conn.execute(_STATUSES, {"ids": waiting.depends_on})}
        condition = _sentence({task: status for task, status in found.items() if status != "DONE"})
        if condition is None:
            change = transitions.unblocked(waiting, now_us=now_us)
            freed.append(rows.apply(conn, waiting, change, now_us=now_us))
            rows.tell(conn, "task_unblocked", freed[-1], actor=actor, now_us=now_us, reason=f"{ended.id} is DONE")
        elif condition != waiting.condition:
            after = rows.apply(conn, waiting, transitions.edited(condition=condition), now_us=now_us)
            rows.tell(conn, "task_blocked", after, actor=actor, now_us=now_us, reason=condition)
    return freed


def open_ones(conn: Connection, depends_on: Sequence[str]) -> tuple[list[str], list[str]]:
    """(not ended yet, cancelled) of the dependencies."""
    if not depends_on:
        return [], []
    found = {row.id: row.status for row in conn.execute(_STATUSES, {"ids": list(depends_on)})}
    return (
        [task for task in depends_on if found[task] not in ("DONE", "CANCELLED")],
        [task for task in depends_on if found[task] == "CANCELLED"],
    )


def _sentence(statuses: dict[str, str]) -> str | None:
    cancelled = sorted(task for task, status in statuses.items() if status == "CANCELLED")
    if cancelled:
        return f"waits for {_names(cancelled)}, which was cancelled; unblock it, or cancel it too"
    return f"waits for {_names(sorted(statuses))}" if statuses else None


def _names(tasks_: list[str]) -> str:
    more = f" and {len(tasks_) - NAMED} more" if len(tasks_) > NAMED else ""
    return ", ".join(tasks_[:NAMED]) + more


def _path(came_from: dict[str, str], task_id: str) -> list[str]:
    path = [task_id]
    while not (len(path) > 1 and path[-1] == task_id):
        path.append(came_from[path[-1]])
    return path[::-1]
