"""What each orchestrator has before it: counts and running sessions, read in one snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.orchestrators import actions, attendance
from orchestrator_fleet.orchestrators.actions import Action
from orchestrator_fleet.orchestrators.presence import Seen
from orchestrator_fleet.store.schema import attempts, tasks
from orchestrator_fleet.tasks import holds
from orchestrator_fleet.tasks.holds import Hold

OPEN = ("TODO", "IN_PROGRESS", "BLOCKED")

_COUNTS = (
    sa.select(
        tasks.c.orchestrator,
        tasks.c.status,
        sa.func.count(),
        sa.func.count().filter(tasks.c.due_at_us < sa.bindparam("now")),
    )
    .where(tasks.c.status.in_(OPEN), tasks.c.orchestrator.in_(sa.bindparam("names", expanding=True)))
    .group_by(tasks.c.orchestrator, tasks.c.status)
)
_RUNNING = (
    sa.select(attempts.c.orchestrator, attempts.c.task, attempts.c.attempt, attempts.c.started_at_us)
    .join(tasks, sa.and_(tasks.c.id == attempts.c.task, tasks.c.attempt == attempts.c.attempt))
    .where(tasks.c.status == "IN_PROGRESS", tasks.c.orchestrator.in_(sa.bindparam("names", expanding=True)))
    .order_by(attempts.c.started_at_us, attempts.c.task)
)


@dataclass(slots=True, kw_only=True)
class Work:
    """One orchestrator's work. `open` is everything not ended: waiting, in progress and blocked."""

    open: int = 0
    in_progress: int = 0
    blocked: int = 0
    overdue: int = 0
    sessions: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Work, last presence, holds and actions that go on, of orchestrators, by name, as of one moment."""

    work: Mapping[str, Work]
    seen: Mapping[str, Seen]
    held: Mapping[str, Sequence[Hold]]
    actions: Mapping[str, Sequence[Action]]


def look(conn: Connection, names: Sequence[str], *, now_us: int) -> Board:
    """Read the board of these orchestrators."""
    work = {name: Work() for name in names}
    for name, status, count, overdue in conn.execute(_COUNTS, {"names": list(names), "now": now_us}):
        one = work[name]
        one.open += count
        one.overdue += overdue
        if status == "IN_PROGRESS":
            one.in_progress = count
        elif status == "BLOCKED":
            one.blocked = count
    for row in conn.execute(_RUNNING, {"names": list(names)}):
        work[row.orchestrator].sessions.append(
            {
                "id": f"{row.task}.{row.attempt}",
                "task": row.task,
                "since": to_rfc3339(row.started_at_us),
                "state": "running",
                "tokens": None,
            }
        )
    acting: dict[str, list[Action]] = {}
    for action in actions.open_of(conn, names):
        acting.setdefault(action.orchestrator, []).append(action)
    return Board(work=work, seen=attendance.last_seen(conn), held=holds.find_all(conn, now_us), actions=acting)
