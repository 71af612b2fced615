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
from orchestrator_fleet.errors import Forbidden, LeaseLost
from orchestrator_fleet.store import counters, locks
from orchestrator_fleet.store.schema import RUNNING, tasks
from orchestrator_fleet.store.schema import attempts as table
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import attempts, limits, rows, transitions
from orchestrator_fleet.tasks.task import Held, TaskRow

MAX_EXPIRED = 500
STEPPED = "clock_set_back"
# Between two looks at the clock, and for all control planes to have looked.
ONE_STEP_US = 3 * SECOND_US

_BEAT = Statement(
    tasks.update().where(tasks.c.id == sa.bindparam("key"), tasks.c.token == sa.bindparam("by"), sa.text(RUNNING)),
    sets=("lease_until_us",),
    in_order=True,
)
_EXPIRED = (
    sa.select(*rows.COLUMNS)
    .where(sa.text(RUNNING), tasks.c.lease_until_us <= sa.bindparam("now"))
    .limit(MAX_EXPIRED)
    .with_for_update(skip_locked=True)
)
_NEXT = sa.select(sa.func.min(tasks.c.lease_until_us)).where(sa.text(RUNNING))
_LENGTHEN = (
    tasks.update()
    .where(sa.text(RUNNING), tasks.c.lease_until_us < sa.bindparam("until"))
    .values(lease_until_us=sa.bindparam("until"))
)
_SHORTEN = (
    tasks.update()
    .where(
        sa.text(RUNNING),
        tasks.c.lease_until_us > sa.bindparam("until"),
        sa.case((tasks.c.machine == "", 1), else_=0) == sa.bindparam("of_clients"),
    )
    .values(lease_until_us=sa.bindparam("until"))
)
# What lies further ahead than anything that was timed since the clock was set back.
_MOVE_LEASES = (
    tasks.update()
    .where(sa.text(RUNNING), tasks.c.lease_until_us > sa.bindparam("beyond"))
    .values(lease_until_us=tasks.c.lease_until_us + sa.bindparam("by", type_=sa.BigInteger))
)
# A failed try's wait; what somebody made available at a time of day stays at that time.
_MOVE_BACKOFFS = (
    tasks.update()
    .where(sa.text("wakes_at_us IS NOT NULL"), tasks.c.failures > 0, tasks.c.wakes_at_us > sa.bindparam("beyond"))
    .values(
        {
            column: column + sa.bindparam("by", type_=sa.BigInteger)
            for column in (tasks.c.wakes_at_us, tasks.c.ripens_at_us, tasks.c.available_at_us)
        }
    )
)
_RUNNING_THERE = (
    sa.select(*rows.COLUMNS, table.c.holder)
    .join(table, sa.and_(table.c.task == tasks.c.id, table.c.attempt == tasks.c.attempt))
    .where(
        tasks.c.orchestrator == sa.bindparam("orchestrator"),
        tasks.c.machine == sa.bindparam("machine"),
        sa.text(RUNNING),
    )
    .with_for_update()
)


def hold_all(conn: Connection, *, until_us: int) -> int:
    """Let no running attempt's lease end before `until_us`; answers how many would have."""
    return conn.execute(_LENGTHEN, {"until": until_us}).rowcount


def after_step(conn: Connection, *, by_us: int, lease_s: float, longest_s: float, now_us: int) -> None:
    """The clock was set to `now_us`, and `by_us` from what it was: what was timed before lasts as long as it was meant.

    Set forward, it would end leases whose holders live: they get time for a beat. Set back, it would hold the tasks
    of the dead, and those that wait after a failure, for as long as it was set back. What was timed after the step is
    nearer than what is looked for. Several control planes see one step: the first to come moves what is to be moved.
    """
    if by_us > 0:
        hold_all(conn, until_us=now_us + round(lease_s * SECOND_US))
    elif not _is_moved(conn, now_us):
        moved = {"by": by_us, "beyond": now_us - by_us - ONE_STEP_US}
        conn.execute(_MOVE_LEASES, moved)
        conn.execute(_MOVE_BACKOFFS, moved)
        limits.move(conn, by_us=by_us, beyond_us=moved["beyond"])
    for of_clients, seconds in ((0, lease_s), (1, longest_s)):
        conn.execute(_SHORTEN, {"until": now_us + round(seconds * SECOND_US), "of_clients": of_clients})


def _is_moved(conn: Connection, now_us: int) -> bool:
    """Whether another control plane has seen to this step."""
    if locks.alone(conn):
        return False
    counters.hold(conn, STEPPED)
    moved = 0 <= now_us - counters.get(conn, STEPPED) < ONE_STEP_US
    counters.put(conn, STEPPED, now_us)
    return moved


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
    # In one order for everybody, as the rows are held together.
    beats = [{"key": one.task, "by": one.token, "lease_until_us": until_us} for one in sorted(held, key=_task)]
    if _BEAT.many(conn, beats) == len(beats):
        return ()
    lost = {(beat["key"], beat["by"]) for beat in beats if _BEAT.run(conn, beat) == 0}
    return tuple(one.task for one in held if (one.task, one.token) in lost)


def _task(one: Held) -> str:
    return one.task


def heartbeat(
    conn: Connection, *, task_id: str, token: str, lease_s: float, now_us: int, acts_for: str | None = None
) -> TaskRow:
    """A beat for one task; LeaseLost when it is no longer the caller's, NotFound when there is none such."""
    task = rows.get_to_change(conn, task_id)
    fence(task, token, acts_for=acts_for)
    beat(conn, held=[Held(task=task_id, token=token)], lease_s=lease_s, now_us=now_us)
    return rows.get(conn, task_id)


def fence(task: TaskRow, token: str, *, acts_for: str | None = None) -> None:
    """Raise LeaseLost unless `token` is the running attempt's; Forbidden when it is of another than `acts_for`."""
    if task.token is None or task.token != token:
        raise LeaseLost(
            f"{task.id}: this token is not the running attempt's (it is {task.status}); stop, and drop what you have"
        )
    refuse_others(task, acts_for=acts_for)


def refuse_others(task: TaskRow, *, acts_for: str | None) -> None:
    """Raise Forbidden when a caller that acts for one orchestrator alone (None: for any) means another's task."""
    if acts_for is not None and task.orchestrator != acts_for:
        raise Forbidden(f"{task.id}: it is another's; the key of {acts_for} acts for {acts_for} alone")


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
    run_s = attempts.end(conn, task, outcome="released", now_us=now_us, error=why)
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
    run_s = attempts.end(conn, task, outcome="lease_lost", now_us=now_us, error=failure.message)
    rows.tell(conn, "lease_expired", after, actor=actor, now_us=now_us, outcome="lease_lost", reason=why, run_s=run_s)
    if after.status == "BLOCKED":
        rows.tell(conn, "task_blocked", after, actor=actor, now_us=now_us, reason=after.condition)
    return after
