"""The same done to many tasks: each by itself, so that one that is refused leaves the others done.

A call does at most MAX_BULK tasks, since all of them are one transaction of the store's one writer; whoever has more
calls again with the cursor of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection

from orchestrator_fleet.errors import TaskError
from orchestrator_fleet.tasks import change, queries, rows
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.queries import Filters
from orchestrator_fleet.tasks.task import Priority, TaskRow
from orchestrator_fleet.wire.http import MAX_BULK

Action = Literal["cancel", "retry", "assign", "priority"]
_OPEN = ("TODO", "IN_PROGRESS", "BLOCKED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do to each. `orchestrator` goes with assign, `priority` with priority.

    `acts_for` is the only orchestrator whose tasks, beside those it made, the caller may change; None: any.
    """

    action: Action
    reason: str | None = None
    orchestrator: str | None = None
    priority: Priority | None = None
    acts_for: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one task: itself after it (of a retry: the new one, perhaps), or the error that refused it."""

    id: str
    task: TaskRow | None = None
    changed: bool = False
    error: TaskError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The tasks of one call, how many match that were not looked at before, and the cursor of the next call."""

    ids: tuple[str, ...]
    matched: int
    next_cursor: str | None


def meant(filters: Filters, action: Action) -> Filters:
    """The filter as it is meant: one that names no status means the tasks that the action is for.

    BLOCKED ones are retried (else everything that was ever done would be done again), open ones are cancelled, assigned
    and given another priority.
    """
    if filters.status:
        return filters
    return replace(filters, status=("BLOCKED",) if action == "retry" else _OPEN)


def choose(conn: Connection, *, filters: Filters, cursor: str = "") -> Chosen:
    """The first MAX_BULK tasks behind `cursor` that match, in the order of their ids.

    It may look at many rows, so it is for a reader. Whoever then changes them asks `queries.still_match` again.
    """
    ids, matched = queries.ids_of(conn, filters=filters, after=cursor, limit=MAX_BULK)
    return Chosen(ids=tuple(ids), matched=matched, next_cursor=ids[-1] if matched > len(ids) else None)


def do(
    conn: Connection,
    ids: Sequence[str],
    order: Order,
    *,
    dispatch: Dispatch,
    actor: str,
    now_us: int,
    dry_run: bool = False,
) -> list[Result]:
    """Do it to each of `ids`, answered in their order; with `dry_run` all is undone again, answers and all."""
    with savepoint(conn, undo=dry_run):
        # In one order for everybody: two that each hold what the other wants next would wait for ever.
        done = {
            task_id: each(
                conn, task_id, lambda one: _do(conn, one, order, dispatch=dispatch, actor=actor, now_us=now_us)
            )
            for task_id in sorted(set(ids))
        }
    return [done[task_id] for task_id in dict.fromkeys(ids)]


def each(conn: Connection, task_id: str, act: Callable[[TaskRow], TaskRow]) -> Result:
    """Do `act` to one task; what it has written is undone when it is refused."""
    try:
        with savepoint(conn):
            before = rows.get_to_change(conn, task_id)
            after = act(before)
    except TaskError as error:
        return Result(id=task_id, error=error)
    return Result(id=task_id, task=after, changed=(after.id, after.version) != (before.id, before.version))


@contextmanager
def savepoint(conn: Connection, *, undo: bool = False) -> Iterator[None]:
    """What is written inside is undone when it raises, and with `undo` in any case."""
    mark = conn.begin_nested()
    kept = False
    try:
        yield
        kept = not undo
    finally:
        if kept:
            mark.commit()
        else:
            mark.rollback()


def _do(conn: Connection, task: TaskRow, order: Order, *, dispatch: Dispatch, actor: str, now_us: int) -> TaskRow:
    known: dict[str, Any] = {"task_id": task.id, "actor": actor, "now_us": now_us}
    change.refuse_others(conn, task_id=task.id, acts_for=order.acts_for, actor=actor)
    match order.action:
        case "cancel":
            return change.cancel(conn, reason=order.reason, **known).task
        case "retry":
            change.refuse_own_yes(conn, task_id=task.id, acts_for=order.acts_for)
            return change.retry(conn, dispatch=dispatch, reason=order.reason, **known)
        case "assign":
            return change.assign(conn, orchestrator=order.orchestrator or "", reason=order.reason, **known).task
        case "priority":
            return change.update_task(
                conn, fields={"priority": order.priority}, version=None, reason=order.reason, **known
            )
