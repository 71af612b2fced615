"""Moves ripe tasks in the line: those whose backoff is over, and those that have waited long enough to rise a class.

Called by whoever is about to claim; finds nothing, by one probe of an index, nearly always.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import counters
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.tasks import rows, transitions

BATCH = 500
MAX_BATCHES = 20
LAST_RIPENED = "last_ripened_us"

_RIPE = (
    sa.select(*rows.COLUMNS)
    .where(tasks.c.ripens_at_us <= sa.bindparam("now"))
    .order_by(tasks.c.ripens_at_us)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
)
_MOVE = tasks.update().where(tasks.c.id == sa.bindparam("key"))
_WAKES = sa.select(sa.func.min(tasks.c.wakes_at_us)).where(
    tasks.c.orchestrator == sa.bindparam("orchestrator"), sa.text("wakes_at_us IS NOT NULL")
)


def ripen(conn: Connection, *, now_us: int) -> int:
    """Move what is ripe at `now_us`; answers how many moved. At most BATCH * MAX_BATCHES a call.

    A place in line is not a change of the task: no event is written and no version raised.
    """
    moved = 0
    for _ in range(MAX_BATCHES):
        ripe = [rows.read(row) for row in conn.execute(_RIPE, {"now": now_us})]
        if ripe:
            conn.execute(_MOVE, [{**transitions.ripened(task, now_us=now_us).values, "key": task.id} for task in ripe])
            moved += len(ripe)
        if len(ripe) < BATCH:
            break
    if moved:
        counters.put(conn, LAST_RIPENED, now_us)
    return moved


def next_available(conn: Connection, orchestrator: str) -> int | None:
    """When the orchestrator's next sleeping task wakes (microseconds); None when none sleeps."""
    return conn.execute(_WAKES, {"orchestrator": orchestrator}).scalar()
