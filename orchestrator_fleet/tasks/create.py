"""Making tasks: checked, routed, and in line (or waiting for others) in one transaction."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.store.schema import task_tags, tasks
from orchestrator_fleet.tasks import dependencies, rows, transitions, view
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.routing import Decision
from orchestrator_fleet.tasks.task import NewTask, TaskRow

MAX_REROUTED = 1_000

_INSERT_TAGS = task_tags.insert()
_DELETE_TAGS = task_tags.delete().where(task_tags.c.task == sa.bindparam("of_task"))
_UNROUTED = (
    sa.select(*rows.COLUMNS)
    .where(tasks.c.status.in_(("TODO", "BLOCKED")), tasks.c.orchestrator.is_(None))
    .order_by(tasks.c.id)
    .limit(MAX_REROUTED)
    .with_for_update(skip_locked=True)
)


def create_task(conn: Connection, *, new: NewTask, dispatch: Dispatch, actor: str, now_us: int) -> TaskRow:
    """Write a new task. Invalid on an unknown orchestrator or dependency; a task that no rule routes is kept as TODO.

    `max_attempts` comes from the task, else from the retry policy of the orchestrator that it goes to.
    """
    waits_for = _checked(conn, new, dispatch)
    draft = transitions.created(
        new,
        task_id=ids.new_id("task", now_us),
        actor=actor,
        condition=waits_for,
        waits_for_others=waits_for is not None,
        max_attempts=new.max_attempts or 1,
        now_us=now_us,
    )
    decision = dispatch.decide(conn, view.to_json(draft), now_us=now_us)
    task = msgspec.structs.replace(
        draft,
        orchestrator=decision.orchestrator,
        route=decision.rule,
        condition=waits_for or _unrouted(decision),
        max_attempts=new.max_attempts or dispatch.retry(decision.orchestrator).max_attempts,
    )
    rows.insert(conn, task)
    dependencies.write(conn, task.id, task.depends_on)
    write_tags(conn, task)
    rows.tell(conn, "task_created", task, actor=actor, now_us=now_us, routed_because=decision.reason)
    return task


def _checked(conn: Connection, new: NewTask, dispatch: Dispatch) -> str | None:
    """What the task waits for; Invalid with all that is unknown in it."""
    wrong, waits_for = [], None
    if new.orchestrator is not None and not dispatch.knows(new.orchestrator):
        wrong.append(("orchestrator", f"there is no orchestrator {new.orchestrator}"))
    try:
        waits_for = dependencies.unmet(conn, list(dict.fromkeys(new.depends_on)))
    except Invalid as problem:
        wrong += problem.errors
    if wrong:
        raise Invalid(wrong)
    return waits_for


def reroute_unrouted(conn: Connection, *, dispatch: Dispatch, actor: str, now_us: int) -> list[TaskRow]:
    """Route again what no rule took, after the rules changed; answers the tasks that found somebody.

    Looks at MAX_REROUTED tasks a call at most.
    """
    routed = []
    for task in [rows.read(row) for row in conn.execute(_UNROUTED)]:
        decision = dispatch.decide(conn, view.to_json(task), now_us=now_us)
        if decision.orchestrator is None:
            continue
        condition = task.condition if task.status == "BLOCKED" else None
        change = transitions.edited(orchestrator=decision.orchestrator, route=decision.rule, condition=condition)
        routed.append(rows.apply(conn, task, change, now_us=now_us))
        rows.tell(conn, "task_routed", routed[-1], actor=actor, now_us=now_us, reason=decision.reason)
    return routed


def write_tags(conn: Connection, task: TaskRow) -> None:
    """Write a new task's tags where they can be searched."""
    if task.tags:
        conn.execute(_INSERT_TAGS, [{"tag": tag, "task": task.id} for tag in task.tags])


def rewrite_tags(conn: Connection, task: TaskRow) -> None:
    """Replace a task's tags where they can be searched."""
    conn.execute(_DELETE_TAGS, {"of_task": task.id})
    write_tags(conn, task)


def _unrouted(decision: Decision) -> str | None:
    if decision.orchestrator is not None:
        return None
    return f"nobody gets it: {decision.reason}; assign it, or add a routing rule"
