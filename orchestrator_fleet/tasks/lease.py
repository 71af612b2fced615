"""How long an attempt holds its task: lengthened by beats, taken back when they stop.

An attempt whose lease ran out has *lost* it: the task goes back to the line at once, the try counts, and the old token
is good for nothing from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import LeaseLost
from orchestrator_fleet.store.schema import RUNNING, attempts, tasks
from orchestrator_fleet.tasks import rows, transitions
from orchestrator_fleet.tasks.task import Held, TaskRow

MAX_EXPIRED = 500

_BEAT = tasks.update().where(tasks.c.id == sa.bindparam("key"), tasks.c.token == sa.bindparam("by"), sa.text(RUNNING))
_EXPIRED = (
    sa.select(*rows.COLUMNS)
    .where(tasks.c.lease_until_us <= sa.bindparam("now"))
    .order_by(tasks.c.lease_until_us)
    .limit(MAX_EXPIRED)
    .with_for_update(skip_locked=True)
)
_NEXT = sa.select(sa.func.min(tasks.c.lease_until_us)).where(sa.text("lease_until_us IS NOT NULL"))
_RUNNING_THERE = (
    sa.select(*rows.COLUMNS, attempts.c.holder)
    .join(attempts, sa.and_(attempts.c.task == tasks.c.id, attempts.c.attempt == tasks.c.attempt))
    .where(
        tasks.c.orchestrator == sa.bindparam("orchestrator"),
        tasks.c.machine == sa.bindparam("machine"),
        sa.text(RUNNING),
    )
    .with_for_update()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What a daemon that says hello must drop, and which tasks went back to the line because it no longer has them."""

    lost: tuple[str, ...]
    requeued: tuple[TaskRow, ...]


def beat(conn: Connection, *, held: Sequence[Held], lease_s: float, now_us: int) -> tuple[str, ...]:
    """Hold these tasks until `lease_s` from now; answers the ids that are no longer the caller's.

    A beat is not a change of the task: no event is written and no version raised.
    """
    until_us = now_us + round(lease_s * SECOND_US)
    return tuple(
        one.task
        for one in held
        if conn.execute(_BEAT, {"key": one.task, "by": one.token, "lease_until_us": until_us}).rowcount == 0
    )


def heartbeat(conn: Connection, *, task_id: str, token: str, lease_s: float, now_us: int) -> TaskRow:
    """A beat for one task; LeaseLost when it is no longer the caller's, NotFound when there is none such."""
    task = rows.get_to_change(conn, task_id)
    fence(task, token)
    beat(conn, held=[Held(task=task_id, token=token)], lease_s=lease_s, now_us=now_us)
    return rows.get(conn, task_id)


def fence(task: TaskRow, token: str) -> None:
    """Raise LeaseLost unless `token` is the running attempt's."""
    if task.token is None or task.token != token:
        raise LeaseLost(
            f"{task.id}: this token is not the running attempt's (it is {task.status}); stop, and drop what you have"
        )


def expire_leases(conn: Connection, *, now_us: int, actor: str = "system") -> list[TaskRow]:
    """Take back tasks whose lease ran out, at most MAX_EXPIRED a call; answers them as they are now."""
    expired = [rows.read(row) for row in conn.execute(_EXPIRED, {"now": now_us})]
    return [take_back(conn, task, why="its lease ran out", actor=actor, now_us=now_us) for task in expired]


def next_lease_expiry(conn: Connection) -> int | None:
    """When the first lease runs out (microseconds); None when nothing runs."""
    return conn.execute(_NEXT).scalar()


def reconcile_held(
    conn: Connection,
    *,
    orchestrator: str,
    machine: str,
    holder: str,
    held: Sequence[Held],
    lease_s: float,
    actor: str,
    now_us: int,
) -> Reconciled:
    """Make the store agree with a daemon that says hello; `holder` is its boot and epoch, as its claims named them.

    What it holds stays its own for `lease_s` more, or is lost if the token is an old one; what the store thinks it
    runs and it does not hold goes back to the line at once. If this very process claimed it, the answer never arrived
    and nothing was tried, so that counts for nothing; else a try was lost with the process before it.
    """
    lost = beat(conn, held=held, lease_s=lease_s, now_us=now_us)
    kept = {one.task for one in held}.difference(lost)
    running = conn.execute(_RUNNING_THERE, {"orchestrator": orchestrator, "machine": machine}).all()
    there = sorted(((rows.read(row), row.holder) for row in running), key=lambda one: one[0].id)
    requeued = tuple(
        _undelivered(conn, task, actor=actor, now_us=now_us)
        if claimed_by == holder
        else take_back(conn, task, why="its daemon no longer has it", actor=actor, now_us=now_us)
        for task, claimed_by in there
        if task.id not in kept
    )
    return Reconciled(lost=lost, requeued=requeued)


def _undelivered(conn: Connection, task: TaskRow, *, actor: str, now_us: int) -> TaskRow:
    """Give back a task whose claim was written down and whose answer was lost on its way."""
    why = "its claim never reached the daemon"
    after = rows.apply(conn, task, transitions.released(task, now_us=now_us), now_us=now_us)
    run_s = rows.end_attempt(conn, task, outcome="released", now_us=now_us, error=why)
    rows.tell(conn, "task_released", after, actor=actor, now_us=now_us, outcome="released", reason=why, run_s=run_s)
    return after


def take_back(conn: Connection, task: TaskRow, *, why: str, actor: str, now_us: int) -> TaskRow:
    """End a running attempt as lease_lost: the task is TODO again at once, or BLOCKED when its tries are spent."""
    failure = transitions.Failure(
        outcome="lease_lost", message=f"attempt {task.attempt} on {task.machine or 'a client'}: {why}"
    )
    if task.failures + 1 >= task.max_attempts:
        change = transitions.exhausted(task, failure)
    else:
        change = transitions.retried(task, failure, available_at_us=now_us, now_us=now_us)
    after = rows.apply(conn, task, change, now_us=now_us)
    run_s = rows.end_attempt(conn, task, outcome="lease_lost", now_us=now_us, error=failure.message)
    rows.tell(conn, "lease_expired", after, actor=actor, now_us=now_us, outcome="lease_lost", reason=why, run_s=run_s)
    if after.status == "BLOCKED":
        rows.tell(conn, "task_blocked", after, actor=actor, now_us=now_us, reason=after.condition)
    return after
