"""Letting an orchestrator rest, at a person's word, and letting it work again."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import RUNNING, tasks
from orchestrator_fleet.tasks import gate, holds, life, rows
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
    # A claim that looked before us has ended, and its session is among those that run.
    locks.hold(conn, gate.claims_of(orchestrator))
    changed = holds.put(
        conn, orchestrator=orchestrator, kind="pause", by=actor, reason=reason, until_us=until_us, now_us=now_us
    )
    why = f"{orchestrator} was deactivated" + (f": {reason}" if reason else "")
    ended = 0 if drain else _take_away(conn, orchestrator=orchestrator, why=why, actor=actor, now_us=now_us)
    return changed or bool(ended)


def activate(conn: Connection, *, orchestrator: str, reason: str | None, actor: str, now_us: int) -> bool:
    """Let it claim again, whether it was paused or waited for a quota; whether that changed anything."""
    lifted = [
        holds.lift(conn, orchestrator=orchestrator, kind=kind, by=actor, reason=reason, now_us=now_us)
        for kind in _LIFTED
    ]
    return any(lifted)


def stop_sessions(conn: Connection, *, orchestrator: str, reason: str | None, actor: str, now_us: int) -> int:
    """Take away what runs: it stands in line again, no try spent, and may be claimed at once; how many there were."""
    locks.hold(conn, gate.claims_of(orchestrator))
    why = f"the sessions of {orchestrator} were stopped" + (f": {reason}" if reason else "")
    return _take_away(conn, orchestrator=orchestrator, why=why, actor=actor, now_us=now_us)


def is_paused(conn: Connection, orchestrator: str, *, now_us: int) -> bool:
    """Whether somebody lets it rest."""
    return any(hold.kind == "pause" for hold in holds.in_force(holds.find(conn, orchestrator), now_us))


def running(conn: Connection, orchestrator: str) -> list[str]:
    """The tasks that it has in progress, by id."""
    return list(conn.execute(_RUNNING_OF, {"of": orchestrator}).scalars())


def _take_away(conn: Connection, *, orchestrator: str, why: str, actor: str, now_us: int) -> int:
    held = rows.get_all_to_change(conn, running(conn, orchestrator))
    # One that ended, or was moved, while we waited for its row is nobody's to take.
    taken = [task.id for task in held.values() if task.status == "IN_PROGRESS" and task.orchestrator == orchestrator]
    for task_id in taken:
        life.release(conn, task_id=task_id, reason=why, actor=actor, now_us=now_us)
    return len(taken)
