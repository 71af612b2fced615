"""Letting an orchestrator rest, at a person's word, and letting it work again."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store.schema import RUNNING, tasks
from orchestrator_fleet.tasks import holds, life
from orchestrator_fleet.tasks.holds import Kind

_LIFTED: tuple[Kind, ...] = ("pause", "quota")
_RUNNING_OF = (
    sa.select(tasks.c.id).where(tasks.c.orchestrator == sa.bindparam("of"), sa.text(RUNNING)).order_by(tasks.c.id)
)


def deactivate(
    conn: Connection,
    *,
    orchestrator: str,
    reason: str | None,
    until_us: int | None,
    drain: bool,
    actor: str,
    now_us: int,
) -> bool:
    """Let it claim nothing until `until_us` (None: until it is activated); whether that changed anything.

    What runs goes on to its end; without `drain` it is taken away and stands in line again, no try spent.
    """
    changed = holds.put(
        conn, orchestrator=orchestrator, kind="pause", by=actor, reason=reason, until_us=until_us, now_us=now_us
    )
    taken = [] if drain else conn.execute(_RUNNING_OF, {"of": orchestrator}).scalars().all()
    why = f"{orchestrator} was deactivated" + (f": {reason}" if reason else "")
    for task_id in taken:
        life.release(conn, task_id=task_id, reason=why, actor=actor, now_us=now_us)
    return changed or bool(taken)


def activate(conn: Connection, *, orchestrator: str, reason: str | None, actor: str, now_us: int) -> bool:
    """Let it claim again, whether it was paused or waited for a quota; whether that changed anything."""
    lifted = [
        holds.lift(conn, orchestrator=orchestrator, kind=kind, by=actor, reason=reason, now_us=now_us)
        for kind in _LIFTED
    ]
    return any(lifted)
