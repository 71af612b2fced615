"""Moves tasks whose moment has come: a backoff is over, a class is reached by waiting, a quota or budget has room.

Called by whoever is about to claim; finds nothing, by one probe of an index, nearly always.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import counters, outbox
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import rows, transitions
from orchestrator_fleet.tasks.task import TaskRow

BATCH = 500
MAX_BATCHES = 20
LAST_RIPENED = "last_ripened_us"

_PLACE = ("rank", "waiting_since_us", "wakes_at_us", "ripens_at_us")
_RIPE = Statement(
    sa.select(*rows.COLUMNS)
    .where(tasks.c.ripens_at_us <= sa.bindparam("now"))
    .order_by(tasks.c.ripens_at_us)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
# Without the rows: it runs at each claim, and nearly always there are none.
_ANY = Statement(
    sa.select(tasks.c.id).where(tasks.c.ripens_at_us <= sa.bindparam("now")).order_by(tasks.c.ripens_at_us).limit(1)
)
_MOVE = Statement(tasks.update().where(tasks.c.id == sa.bindparam("key")), sets=_PLACE)
_WAKES = Statement(
    sa.select(sa.func.min(tasks.c.wakes_at_us)).where(
        tasks.c.orchestrator == sa.bindparam("orchestrator"), sa.text("wakes_at_us IS NOT NULL")
    )
)


def ripen(conn: Connection, *, now_us: int) -> int:
    """Move what is ripe at `now_us`; answers how many moved. At most BATCH * MAX_BATCHES a call.

    A place in line is not a change of the task: no event is written and no version raised. That a BLOCKED task is
    TODO again is one.
    """
    moved = 0
    for _ in range(MAX_BATCHES):
        if not _ANY.rows(conn, {"now": now_us}):
            break
        ripe = [TaskRow(*row) for row in _RIPE.rows(conn, {"now": now_us})]
        if ripe:
            _move([task for task in ripe if task.status == "TODO"], conn, now_us=now_us)
            _free([task for task in ripe if task.status == "BLOCKED"], conn, now_us=now_us)
            moved += len(ripe)
        if len(ripe) < BATCH:
            break
    if moved:
        counters.put(conn, LAST_RIPENED, now_us)
    return moved


def next_available(conn: Connection, orchestrator: str) -> int | None:
    """When the orchestrator's next sleeping task wakes (microseconds); None when none sleeps."""
    ((wakes_us,),) = _WAKES.rows(conn, {"orchestrator": orchestrator})
    return None if wakes_us is None else int(wakes_us)


def _move(waiting: Sequence[TaskRow], conn: Connection, *, now_us: int) -> None:
    if waiting:
        _MOVE.many(conn, [{**transitions.ripened(task, now_us=now_us).values, "key": task.id} for task in waiting])


def _free(blocked: Sequence[TaskRow], conn: Connection, *, now_us: int) -> None:
    reasons = {"quota": "its quota has room again", "budget": "its budget has room again"}
    freed = rows.apply_all(conn, [(task, transitions.ripened(task, now_us=now_us)) for task in blocked], now_us=now_us)
    outbox.append(
        conn,
        *(
            rows.event(
                "task_unblocked", after, actor="system", now_us=now_us, reason=reasons.get(before.blocked_reason or "")
            )
            for before, after in zip(blocked, freed, strict=True)
        ),
    )
