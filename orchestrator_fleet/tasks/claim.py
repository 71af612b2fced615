"""Taking tasks: the first of the line become the caller's, each under a lease and a fencing token.

One transaction decides it all: what is ripe moves up, running attempts are counted against the session limit, the
first claimable rows of the orchestrator's line are taken, their attempts and events written. On SQLite the store's
single writer makes it atomic; on PostgreSQL a lock named after the orchestrator and the row locks do.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.schema import CLAIMABLE, RUNNING, attempts, tasks
from orchestrator_fleet.tasks import ripen, rows, transitions
from orchestrator_fleet.tasks.task import Grant, TaskRow

MAX_CLAIM = 50

_RUNNING = (
    sa.select(sa.func.count())
    .select_from(tasks)
    .where(tasks.c.orchestrator == sa.bindparam("orchestrator"), sa.text(RUNNING))
)
_LINE = (
    sa.select(*rows.COLUMNS)
    .where(tasks.c.orchestrator == sa.bindparam("orchestrator"), sa.text(CLAIMABLE))
    .order_by(tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
_BEGIN_ATTEMPT = attempts.insert()


def claim(
    conn: Connection,
    *,
    orchestrator: str,
    machine: str,
    holder: str,
    limit: int,
    lease_s: float,
    sessions_max: int | None,
    generation: str | None,
    charter_version: str | None,
    actor: str,
    now_us: int,
) -> list[Grant]:
    """Take up to `limit` (at most MAX_CLAIM) tasks of the orchestrator's line; [] when there is none or no free slot.

    `machine` and `holder` (boot and epoch of the daemon) say who runs the attempts; `machine` is "" for a client that
    polls over HTTP. `sessions_max` None: no limit of running attempts.
    """
    ripen.ripen(conn, now_us=now_us)
    limit = min(limit, MAX_CLAIM)
    if sessions_max is not None:
        locks.hold(conn, f"claim:{orchestrator}")
        limit = min(limit, sessions_max - running(conn, orchestrator))
    if limit <= 0:
        return []
    line = [rows.read(row) for row in conn.execute(_LINE, {"orchestrator": orchestrator, "most": limit})]
    if not line:
        return []
    lease_until_us = now_us + round(lease_s * SECOND_US)
    changes = [
        (
            task,
            transitions.claimed(
                task,
                token=ids.new_token(),
                lease_until_us=lease_until_us,
                machine=machine,
                generation=generation,
                charter_version=charter_version,
                now_us=now_us,
            ),
        )
        for task in line
    ]
    taken = rows.apply_all(conn, changes, now_us=now_us)
    conn.execute(_BEGIN_ATTEMPT, [_attempt(task, holder=holder, now_us=now_us) for task in taken])
    outbox.append(conn, *(rows.event("task_claimed", task, actor=actor, now_us=now_us) for task in taken))
    return [
        Grant(task=task, token=task.token or "", attempt=task.attempt, lease_until_us=lease_until_us) for task in taken
    ]


def running(conn: Connection, orchestrator: str) -> int:
    """How many attempts of the orchestrator run now."""
    return conn.execute(_RUNNING, {"orchestrator": orchestrator}).scalar_one()


def _attempt(task: TaskRow, *, holder: str, now_us: int) -> dict[str, object]:
    return {
        "task": task.id,
        "attempt": task.attempt,
        "token": task.token,
        "orchestrator": task.orchestrator,
        "machine": task.machine,
        "holder": holder,
        "generation": task.generation,
        "charter_version": task.charter_version,
        "started_at_us": now_us,
    }
