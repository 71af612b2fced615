"""What an orchestrator has before it, in numbers."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.tasks import why
from orchestrator_fleet.tasks.task import PRIORITIES, STATUSES, Status

OPEN: tuple[Status, ...] = ("TODO", "IN_PROGRESS", "BLOCKED")

# Every status is named, since that is what the index begins with.
_COUNTS = (
    sa.select(tasks.c.status, sa.func.count())
    .where(tasks.c.status.in_(STATUSES), tasks.c.orchestrator == sa.bindparam("of"))
    .group_by(tasks.c.status)
)
_OPEN = (
    sa.select(
        tasks.c.priority,
        sa.func.count(),
        sa.func.count().filter(tasks.c.due_at_us < sa.bindparam("now")),
        sa.func.min(tasks.c.created_at_us),
        sa.func.coalesce(sa.func.sum(tasks.c.estimate_s), 0.0),
        sa.func.count(tasks.c.estimate_s),
    )
    .where(tasks.c.status.in_(OPEN), tasks.c.orchestrator == sa.bindparam("of"))
    .group_by(tasks.c.priority)
)


def metrics(conn: Connection, orchestrator: str, *, now_us: int) -> dict[str, Any]:
    """The numbers of all of an orchestrator's tasks, whatever a list beside them is filtered by.

    `total` and `by_status` count every task it ever got, and `completion_rate` is the share of them that is DONE (None
    without any). `by_priority`, `overdue`, `oldest_age_s` and `estimate_s` are of what is open. The estimate is the
    sum of what the tasks say; one that says nothing counts with the mean of the orchestrator's last attempts. It is
    None where nothing is open, or nothing is known.
    """
    by_status = dict.fromkeys(STATUSES, 0) | {row[0]: row[1] for row in conn.execute(_COUNTS, {"of": orchestrator})}
    rows = conn.execute(_OPEN, {"of": orchestrator, "now": now_us}).all()
    total, open_ = sum(by_status.values()), sum(row[1] for row in rows)
    oldest_us = min((row[3] for row in rows), default=None)
    return {
        "total": total,
        "by_status": by_status,
        "by_priority": dict.fromkeys(PRIORITIES, 0) | {row[0]: row[1] for row in rows},
        "completion_rate": by_status["DONE"] / total if total else None,
        "overdue": sum(row[2] for row in rows),
        "oldest_age_s": None if oldest_us is None else max(0, now_us - oldest_us) / SECOND_US,
        "estimate_s": _estimate(
            conn, orchestrator, said_s=sum(row[4] for row in rows), said=sum(row[5] for row in rows), open_=open_
        ),
    }


def _estimate(conn: Connection, orchestrator: str, *, said_s: float, said: int, open_: int) -> float | None:
    silent = open_ - said
    mean_s = why.pace_of(conn, orchestrator).mean_run_s if silent else None
    if not open_ or (not said and mean_s is None):
        return None
    return float(said_s) + silent * (mean_s or 0.0)
