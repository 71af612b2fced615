"""Delegating: a task goes to another orchestrator, which takes it by claiming it or sends it back.

              ┌──▶ rejected    by the target: the task is its source's again, in the same transaction
    pending ──┼──▶ accepted    the target claimed it, said so, or passed it on
              ├──▶ done        the task is done
              └──▶ expired     it was cancelled, or moved on another way

What follows from the task alone is in `passing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.orchestrators import coordination, passing
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.tasks import life, rows
from orchestrator_fleet.tasks.routing import DELEGATED, RETURNED
from orchestrator_fleet.tasks.task import TaskRow


def delegate(
    conn: Connection,
    *,
    task_id: str,
    source: str,
    target: str,
    note: str | None,
    fields: Mapping[str, Any],
    actor: str,
    now_us: int,
    wrong: Sequence[tuple[str, str]] = (),
) -> tuple[Coordination, TaskRow]:
    """Give a task of `source` to `target`; `fields` are edited first, as by `life.update_task`.

    What runs is released: its session is told to stop, and its token is good for nothing. What is refused, and how
    `wrong` is told: see `passing.check`.
    """
    passed = passing.check(conn, task_id=task_id, source=source, target=target, wrong=wrong, now_us=now_us)
    by: dict[str, Any] = {"task_id": task_id, "actor": actor, "now_us": now_us}
    passing.pass_on(conn, passed, target=target, actor=actor, now_us=now_us)
    if fields:
        life.update_task(conn, fields=fields, version=None, **by)
    reason = f"delegated to {target} by {source}"
    task = life.assign(conn, orchestrator=target, reason=reason, route=DELEGATED, **by).task
    one = coordination.ask(
        conn,
        task,
        kind="delegation",
        source=source,
        target=target,
        hop=passed.hop,
        note=note,
        actor=actor,
        now_us=now_us,
        tell_source=True,
    )
    return one, task


def accept(
    conn: Connection, one: Coordination, *, reason: str | None, actor: str, now_us: int
) -> tuple[Coordination, TaskRow]:
    """The target's yes; said twice it is said. Conflict `not_open`."""
    now, task, _ = _hold(conn, one, now_us=now_us)
    if now.state == "pending":
        now = coordination.move(conn, now, "accepted", task, reason=reason, actor=actor, now_us=now_us)
    return now, task


def reject(
    conn: Connection, one: Coordination, *, reason: str | None, actor: str, now_us: int
) -> tuple[Coordination, TaskRow]:
    """The target's no: the task goes back to who delegated it, released first if it runs.

    Conflict `not_open`, and `passed_on` when the target has passed it on itself: who has it says no first.
    """
    now, task, chain = _hold(conn, one, now_us=now_us)
    if task.orchestrator != now.target or any(passing.is_under_way(link) for link in chain):
        raise Conflict("passed_on", f"{now.id}: {now.target} has passed {task.id} on; who was asked says no first")
    why = f"{now.target} rejected it" + (f": {reason}" if reason else "")
    task = life.assign(
        conn, task_id=task.id, orchestrator=now.source, reason=why, route=RETURNED, actor=actor, now_us=now_us
    ).task
    return coordination.move(conn, now, "rejected", task, reason=reason, actor=actor, now_us=now_us), task


def _hold(conn: Connection, one: Coordination, *, now_us: int) -> tuple[Coordination, TaskRow, Sequence[Coordination]]:
    """An open delegation as it is by now, with its task, held, and all of that task's coordinations."""
    task = rows.get_to_change(conn, one.task)
    task, chain = passing.settle(conn, task, coordination.of_task(conn, task.id), now_us=now_us)
    now = next(link for link in chain if link.id == one.id)
    if not now.is_open:
        told = f", as {now.reason}" if now.reason else ""
        raise Conflict("not_open", f"{now.id}: it is {now.state}{told}; there is nothing left to answer")
    return now, task, chain
