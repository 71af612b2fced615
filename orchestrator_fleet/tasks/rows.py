"""Reading and writing the rows of a task: the one place where a Change becomes SQL, with its event beside it.

Statements are made once and compiled once; the columns that a Change sets are part of SQLAlchemy's cache key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict, NotFound
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.schema import attempts, tasks
from orchestrator_fleet.tasks import view
from orchestrator_fleet.tasks.task import Stopped, TaskRow
from orchestrator_fleet.tasks.transitions import Change

COLUMNS = tuple(tasks.c[name] for name in TaskRow.__struct_fields__)

_ONE = sa.select(*COLUMNS).where(tasks.c.id == sa.bindparam("id"))
_ONE_TO_CHANGE = _ONE.with_for_update()
_INSERT = tasks.insert()
_UPDATE = tasks.update().where(tasks.c.id == sa.bindparam("key"), tasks.c.version == sa.bindparam("seen"))
_END_ATTEMPT = (
    attempts.update()
    .where(attempts.c.task == sa.bindparam("of_task"), attempts.c.attempt == sa.bindparam("number"))
    .returning(attempts.c.started_at_us)
)


def read(row: Sequence[Any]) -> TaskRow:
    """A selected row that begins with COLUMNS, as a value."""
    return TaskRow(*row[: len(COLUMNS)])


def get(conn: Connection, task_id: str) -> TaskRow:
    """The task; NotFound when there is none."""
    return _found(_look(conn, _ONE, task_id), task_id)


def get_to_change(conn: Connection, task_id: str) -> TaskRow:
    """The task, held until the end of the transaction; NotFound when there is none."""
    return _found(_look(conn, _ONE_TO_CHANGE, task_id), task_id)


def insert(conn: Connection, task: TaskRow) -> None:
    """Write a new task's row."""
    conn.execute(_INSERT, msgspec.structs.asdict(task))


def apply(conn: Connection, task: TaskRow, change: Change, *, now_us: int) -> TaskRow:
    """Write a change onto the version that was read; Conflict when somebody changed the task meanwhile."""
    (after,) = apply_all(conn, [(task, change)], now_us=now_us)
    return after


def apply_all(conn: Connection, changes: Sequence[tuple[TaskRow, Change]], *, now_us: int) -> list[TaskRow]:
    """Write changes that set the same columns, in one statement; Conflict when any task was changed meanwhile."""
    if not changes:
        return []
    stamped = [
        (task, {**change.values, "updated_at_us": now_us, "version": task.version + 1}) for task, change in changes
    ]
    written = conn.execute(_UPDATE, [{**values, "key": task.id, "seen": task.version} for task, values in stamped])
    if written.rowcount != len(changes):
        names = ", ".join(task.id for task, _ in changes)
        raise Conflict("changed_meanwhile", f"{names}: changed by somebody else in the meantime; read again and repeat")
    return [msgspec.structs.replace(task, **values) for task, values in stamped]


def tell(conn: Connection, kind: str, task: TaskRow, *, actor: str, now_us: int, **data: Any) -> None:
    """Write the event of a change; `data` is what the kind needs beside the task, None values left out."""
    outbox.append(conn, event(kind, task, actor=actor, now_us=now_us, **data))


def event(kind: str, task: TaskRow, *, actor: str, now_us: int, **data: Any) -> outbox.Event:
    """The event of a change, with the task as it is after it."""
    return outbox.Event(
        at_us=now_us,
        kind=kind,
        task=task.id,
        attempt=task.attempt or None,
        orchestrator=task.orchestrator,
        machine=task.machine,
        actor=actor,
        generation=task.generation,
        charter_version=task.charter_version,
        route=task.route,
        data={"task": view.to_json(task), **{name: value for name, value in data.items() if value is not None}},
    )


def end_attempt(conn: Connection, task: TaskRow, *, outcome: str, now_us: int, **values: Any) -> float:
    """Close the running attempt's row; answers how long it ran, in seconds. `task` is the row before the change."""
    ended = {"of_task": task.id, "number": task.attempt, "outcome": outcome, "ended_at_us": now_us, **values}
    started_us: int = conn.execute(_END_ATTEMPT, ended).scalar_one()
    return (now_us - started_us) / 1e6


def stopped(task: TaskRow) -> Stopped | None:
    """The attempt that runs now and is about to be ended from outside; None when none runs."""
    if task.status != "IN_PROGRESS" or task.token is None or task.orchestrator is None:
        return None
    return Stopped(
        task=task.id,
        token=task.token,
        attempt=task.attempt,
        orchestrator=task.orchestrator,
        machine=task.machine or "",
    )


def _look(conn: Connection, query: sa.Select[Any], task_id: str) -> sa.Row[Any] | None:
    # PostgreSQL doesn't even look for a text that it could not hold.
    return None if "\0" in task_id else conn.execute(query, {"id": task_id}).one_or_none()


def _found(row: sa.Row[Any] | None, task_id: str) -> TaskRow:
    if row is None:
        raise NotFound(f"there is no task {task_id}")
    return read(row)
