"""Work of orchestrators that are no longer declared: whatever has not begun is routed anew."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.tasks import life, rows, transitions
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.task import TaskRow

MAX_MOVED = 1_000

_OWNERS = (
    sa.select(tasks.c.orchestrator)
    .where(tasks.c.status.in_(("TODO", "BLOCKED")), tasks.c.orchestrator.is_not(None))
    .distinct()
)
_OPEN_OF = (
    sa.select(*rows.COLUMNS)
    .where(tasks.c.status.in_(("TODO", "BLOCKED")), tasks.c.orchestrator.in_(sa.bindparam("gone", expanding=True)))
    .order_by(tasks.c.id)
    .limit(MAX_MOVED)
    .with_for_update(skip_locked=True)
)


def reroute(conn: Connection, *, dispatch: Dispatch, now_us: int) -> list[TaskRow]:
    """Route what nobody has, or what belongs to nobody declared; answers the tasks that found somebody.

    Moves MAX_MOVED tasks of the departed a call at most; repeat until `left_behind` is false.
    """
    gone = _gone(conn, dispatch)
    if gone:
        for row in conn.execute(_OPEN_OF, {"gone": gone}).all():
            task = rows.read(row)
            condition = task.condition if task.status == "BLOCKED" else f"{task.orchestrator} is no longer declared"
            change = transitions.edited(orchestrator=None, route=None, condition=condition)
            after = rows.apply(conn, task, change, now_us=now_us)
            reason = f"{task.orchestrator} is no longer declared"
            rows.tell(conn, "task_routed", after, actor="system", now_us=now_us, reason=reason)
    return life.reroute_unrouted(conn, dispatch=dispatch, actor="system", now_us=now_us)


def left_behind(conn: Connection, dispatch: Dispatch) -> bool:
    """Whether any task that has not begun belongs to an orchestrator that is not declared."""
    return bool(_gone(conn, dispatch))


def _gone(conn: Connection, dispatch: Dispatch) -> list[str]:
    return [name for (name,) in conn.execute(_OWNERS) if not dispatch.knows(name)]
