"""Reading and writing the rows of tasks: the one place where a Change becomes SQL, with its event beside it.

What runs at every claim and finish takes many rows at once, and costs a fixed number of statements for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict, NotFound
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.store.statement import Statement, any_of
from orchestrator_fleet.tasks import view
from orchestrator_fleet.tasks.task import Stopped, TaskRow
from orchestrator_fleet.tasks.transitions import Change

COLUMNS = tuple(tasks.c[name] for name in TaskRow.__struct_fields__)
_WIDTH = len(COLUMNS)

_ONE = sa.select(*COLUMNS).where(tasks.c.id == sa.bindparam("id"))
_LOOK = Statement(_ONE)
_SOME = sa.select(*COLUMNS).where(any_of(tasks.c.id, "ids")).order_by(tasks.c.id)
_LOOK_SOME = Statement(_SOME)
_HOLD = Statement(_ONE.with_for_update())
_HOLD_SOME = Statement(_SOME.with_for_update())
_ALWAYS_MOVES = frozenset({"updated_at", "version"})
_INSERT = Statement(tasks.insert(), sets=TaskRow.__struct_fields__)
_UPDATE = tasks.update().where(tasks.c.id == sa.bindparam("key"), tasks.c.version == sa.bindparam("seen"))


def read(row: Sequence[Any]) -> TaskRow:
    """A selected row that begins with COLUMNS, as a value."""
    return TaskRow(*row[:_WIDTH])


def get(conn: Connection, task_id: str) -> TaskRow:
    """The task; NotFound when there is none."""
    return _found(conn, _LOOK, task_id)


def get_all(conn: Connection, task_ids: Iterable[str]) -> dict[str, TaskRow]:
    """Those of the tasks that there are, by id, in the order of their ids."""
    wanted = sorted({one for one in task_ids if "\0" not in one})
    found = _LOOK_SOME.rows(conn, {"ids": wanted}) if wanted else ()
    return {task.id: task for task in (TaskRow(*row) for row in found)}


def get_to_change(conn: Connection, task_id: str) -> TaskRow:
    """The task, held until the end of the transaction; NotFound when there is none."""
    return _found(conn, _HOLD, task_id)


def get_all_to_change(conn: Connection, task_ids: Sequence[str]) -> dict[str, TaskRow]:
    """Those of the tasks that there are, by id, held until the end of the transaction."""
    wanted = [one for one in task_ids if "\0" not in one]
    # A list is a table to the database, which costs a lone caller more than its row.
    found = _HOLD.rows(conn, {"id": wanted[0]}) if len(wanted) == 1 else _HOLD_SOME.rows(conn, {"ids": wanted})
    return {task.id: task for task in (TaskRow(*row) for row in found)}


def insert_all(conn: Connection, new: Sequence[TaskRow]) -> None:
    """Write new tasks' rows."""
    _INSERT.many_of(conn, new)


def apply(conn: Connection, task: TaskRow, change: Change, *, now_us: int) -> TaskRow:
    """Write a change onto the version that was read; Conflict when somebody changed the task meanwhile."""
    (after,) = apply_all(conn, [(task, change)], now_us=now_us)
    return after


def apply_all(conn: Connection, changes: Sequence[tuple[TaskRow, Change]], *, now_us: int) -> list[TaskRow]:
    """Write changes, a statement for each kind of them; Conflict when any task was changed meanwhile."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    after = []
    for task, change in changes:
        values = {**change.values, "updated_at_us": now_us, "version": task.version + 1}
        after.append(msgspec.structs.replace(task, **values))
        kinds.setdefault(tuple(values), []).append({**values, "key": task.id, "seen": task.version})
    for columns, rows in kinds.items():
        if _update(columns).many(conn, rows) != len(rows):
            names = ", ".join(row["key"] for row in rows[:5])
            raise Conflict(
                "changed_meanwhile", f"{names}: changed by somebody else in the meantime; read again and repeat"
            )
    return after


@lru_cache(maxsize=256)
def _update(columns: tuple[str, ...]) -> Statement:
    return Statement(_UPDATE, sets=columns)


def tell(
    conn: Connection, kind: str, task: TaskRow, *, actor: str, now_us: int, was: TaskRow | None = None, **data: Any
) -> None:
    """Write the event of a change; `data` is what the kind needs beside the task, None values left out.

    With `was`, the task before it, the event also says what was replaced.
    """
    before = None if was is None else _replaced(was, task)
    outbox.append(conn, event(kind, task, actor=actor, now_us=now_us, before=before, **data))


def _replaced(was: TaskRow, now: TaskRow) -> dict[str, Any]:
    """The values that a change has replaced, as the API shows them."""
    before, after = view.to_json(was), view.to_json(now)
    return {name: value for name, value in before.items() if value != after.get(name) and name not in _ALWAYS_MOVES}


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


def _found(conn: Connection, query: Statement, task_id: str) -> TaskRow:
    # PostgreSQL doesn't even look for a text that it could not hold.
    found = [] if "\0" in task_id else query.rows(conn, {"id": task_id})
    if not found:
        raise NotFound(f"there is no task {task_id}")
    return TaskRow(*found[0])
