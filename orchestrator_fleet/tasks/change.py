"""What people (and rules) do to a task: cancel, block, unblock, approve, assign, edit, retry, purge, say how it goes.

Each takes the running attempt away from its holder where the change needs that, and answers it as `Stopped`, so that
the caller can tell the daemon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict, Forbidden, Invalid, InvalidTransition
from orchestrator_fleet.store.schema import task_dependencies, tasks
from orchestrator_fleet.tasks import attempts, create, dependencies, lease, line, rows, transitions
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.routing import ASSIGNED
from orchestrator_fleet.tasks.task import FINAL, BlockedReason, Changed, NewTask, Status, TaskRow

EDITABLE = frozenset(
    {
        "title",
        "description",
        "priority",
        "discipline",
        "tags",
        "due_at_us",
        "available_at_us",
        "estimate_s",
        "depends_on",
        "metadata",
        "max_attempts",
    }
)

_APPROVABLE = ", ".join(sorted(reason for reason in transitions.APPROVABLE if reason))
_PURGE = tasks.delete().where(tasks.c.id == sa.bindparam("key"))
_NEEDED_BY = sa.select(task_dependencies.c.task).where(task_dependencies.c.depends_on == sa.bindparam("key")).limit(1)


def cancel(conn: Connection, *, task_id: str, reason: str | None, actor: str, now_us: int) -> Changed:
    """TODO, IN_PROGRESS or BLOCKED -> CANCELLED; what waited for it says so from now on."""
    task = rows.get_to_change(conn, task_id)
    after = rows.apply(conn, task, transitions.cancelled(task, now_us=now_us), now_us=now_us)
    run_s = _end(conn, task, outcome="cancelled", reason=reason, now_us=now_us)
    rows.tell(
        conn,
        "task_cancelled",
        after,
        actor=actor,
        now_us=now_us,
        was=task,
        reason=reason,
        run_s=run_s,
    )
    dependencies.follow(conn, after, actor=actor, now_us=now_us)
    return Changed(task=after, stopped=rows.stopped(task))


def block(
    conn: Connection, *, task_id: str, blocked_reason: BlockedReason, reason: str | None, actor: str, now_us: int
) -> Changed:
    """TODO or IN_PROGRESS -> BLOCKED; `reason` is the sentence that people read."""
    task = rows.get_to_change(conn, task_id)
    change = transitions.blocked(task, reason=blocked_reason, condition=reason)
    after = rows.apply(conn, task, change, now_us=now_us)
    run_s = _end(conn, task, outcome="released", reason=reason, now_us=now_us)
    rows.tell(
        conn,
        "task_blocked",
        after,
        actor=actor,
        now_us=now_us,
        was=task,
        reason=reason,
        run_s=run_s,
    )
    return Changed(task=after, stopped=rows.stopped(task))


def unblock(conn: Connection, *, task_id: str, reason: str | None, actor: str, now_us: int) -> TaskRow:
    """BLOCKED -> TODO. Dependencies that were cancelled are waived; Conflict while others are open."""
    task = rows.get_to_change(conn, task_id)
    change = transitions.unblocked(task, now_us=now_us)
    return _free(conn, task, change, "task_unblocked", reason=reason, actor=actor, now_us=now_us)


def approve(conn: Connection, *, task_id: str, reason: str | None, actor: str, now_us: int) -> TaskRow:
    """BLOCKED -> TODO, by somebody's yes; a task that a spent budget holds may go past it from then on.

    Conflict `not_awaiting_approval` when nobody's yes is awaited, `dependency_unmet` as for `unblock`.
    """
    task = rows.get_to_change(conn, task_id)
    _refuse_not_awaiting(task)
    change = transitions.approved(task, now_us=now_us)
    return _free(conn, task, change, "task_approved", reason=reason, actor=actor, now_us=now_us)


def reject(conn: Connection, *, task_id: str, reason: str | None, actor: str, now_us: int) -> TaskRow:
    """BLOCKED -> CANCELLED, by somebody's no. Conflict `not_awaiting_approval` when nobody's is awaited."""
    task = rows.get_to_change(conn, task_id)
    _refuse_not_awaiting(task)
    after = rows.apply(conn, task, transitions.cancelled(task, now_us=now_us), now_us=now_us)
    rows.tell(conn, "task_rejected", after, actor=actor, now_us=now_us, was=task, reason=reason)
    dependencies.follow(conn, after, actor=actor, now_us=now_us)
    return after


def release(conn: Connection, *, task_id: str, reason: str | None, actor: str, now_us: int) -> Changed:
    """IN_PROGRESS -> TODO by somebody other than its holder; the try does not count."""
    task = rows.get_to_change(conn, task_id)
    after = rows.apply(conn, task, transitions.released(task, now_us=now_us), now_us=now_us)
    run_s = _end(conn, task, outcome="released", reason=reason, now_us=now_us)
    rows.tell(
        conn,
        "task_released",
        after,
        actor=actor,
        now_us=now_us,
        was=task,
        reason=reason,
        run_s=run_s,
    )
    return Changed(task=after, stopped=rows.stopped(task))


def assign(
    conn: Connection,
    *,
    task_id: str,
    orchestrator: str,
    reason: str | None,
    actor: str,
    now_us: int,
    route: str = ASSIGNED,
) -> Changed:
    """Give an open task to an orchestrator (that the caller knows to exist); `route` is one of routing.NAMED.

    One in progress is taken from its holder first, unless it is that orchestrator's already.
    """
    task = rows.get_to_change(conn, task_id)
    _refuse_final(task)
    if task.orchestrator == orchestrator:
        return Changed(task=task)
    stopped = None
    if task.status == "IN_PROGRESS":
        changed = release(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us)
        task, stopped = changed.task, changed.stopped
    condition = task.condition if task.status == "BLOCKED" else None
    change = transitions.edited(orchestrator=orchestrator, route=route, condition=condition)
    after = rows.apply(conn, task, change, now_us=now_us)
    rows.tell(conn, "task_routed", after, actor=actor, now_us=now_us, was=task, reason=reason)
    return Changed(task=after, stopped=stopped)


def update_task(
    conn: Connection,
    *,
    task_id: str,
    fields: Mapping[str, Any],
    version: int | None,
    actor: str,
    now_us: int,
    reason: str | None = None,
) -> TaskRow:
    """Change some of EDITABLE; `version` is the one the caller saw (None: whatever it is now).

    Conflict `stale` when the task moved on, `final` when it has ended, `in_progress` when a running task would get
    other dependencies. New dependencies may block it, and the end of the last may free it.
    """
    if "depends_on" in fields:
        dependencies.hold_edges(conn)
    task = rows.get_to_change(conn, task_id)
    unknown = sorted(fields.keys() - EDITABLE)
    if unknown:
        raise Invalid([(name, "can't be edited") for name in unknown])
    _refuse_stale(task, version)
    _refuse_final(task)
    changed = {name: value for name, value in fields.items() if getattr(task, name) != value}
    if not changed:
        return task
    after = rows.apply(conn, task, transitions.Change(_edited(task, changed, now_us)), now_us=now_us)
    if "tags" in changed:
        create.rewrite_tags(conn, after)
    rows.tell(
        conn,
        "task_updated",
        after,
        actor=actor,
        now_us=now_us,
        was=task,
        fields=sorted(changed),
        reason=reason,
    )
    return _wait_anew(conn, after, actor=actor, now_us=now_us) if "depends_on" in changed else after


def refuse_others(conn: Connection, *, task_id: str, acts_for: str | None, actor: str) -> None:
    """Raise Forbidden when the caller acts for one orchestrator alone, and the task is neither its nor made by it."""
    if acts_for is None:
        return
    task = rows.get_to_change(conn, task_id)
    if task.created_by != actor:
        lease.refuse_others(task, acts_for=acts_for)


def refuse_own_yes(conn: Connection, *, task_id: str, acts_for: str | None) -> None:
    """Raise Forbidden when an orchestrator would put back in line what waits for somebody else's yes."""
    if acts_for is None:
        return
    task = rows.get_to_change(conn, task_id)
    if task.status == "BLOCKED" and task.blocked_reason in transitions.APPROVABLE:
        raise Forbidden(f"{task.id}: it waits for somebody's yes, which can't come from {acts_for}")


def at_version(conn: Connection, *, task_id: str, version: int | None) -> TaskRow:
    """The task, held until the end of the transaction; Conflict `stale` unless it is at `version` (None: any)."""
    task = rows.get_to_change(conn, task_id)
    _refuse_stale(task, version)
    return task


def set_status(
    conn: Connection, *, task_id: str, status: Status, reason: str | None, actor: str, now_us: int
) -> Changed:
    """What a person's PUT of `status` means; InvalidTransition names the legal ones."""
    task = rows.get_to_change(conn, task_id)
    if status == task.status:
        return Changed(task=task)
    match status:
        case "CANCELLED":
            return cancel(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us)
        case "BLOCKED":
            return block(conn, task_id=task_id, blocked_reason="manual", reason=reason, actor=actor, now_us=now_us)
        case "TODO" if task.status == "BLOCKED":
            return Changed(task=unblock(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us))
        case "TODO":
            return release(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us)
        case "IN_PROGRESS":
            transitions.check(task, status)
            raise InvalidTransition(f"{task.id}: only a claim makes a task IN_PROGRESS; poll for it, or assign it")
    after = rows.apply(conn, task, transitions.completed(task, result=task.result, now_us=now_us), now_us=now_us)
    # Somebody else said that it is done: the attempt did not, and its own report comes too late.
    run_s = _end(conn, task, outcome="released", reason=reason, now_us=now_us)
    rows.tell(
        conn,
        "task_done",
        after,
        actor=actor,
        now_us=now_us,
        was=task,
        outcome="done",
        reason=reason,
        run_s=run_s,
    )
    dependencies.follow(conn, after, actor=actor, now_us=now_us)
    return Changed(task=after, stopped=rows.stopped(task))


def retry(
    conn: Connection, *, task_id: str, dispatch: Dispatch, reason: str | None, actor: str, now_us: int
) -> TaskRow:
    """Again: a DONE or CANCELLED task becomes a new one that names it as parent; a BLOCKED one is redriven.

    The new task goes where the old one was, if that orchestrator still exists, and waits for nobody.
    """
    task = rows.get_to_change(conn, task_id)
    if task.status == "BLOCKED":
        return unblock(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us)
    if task.status not in FINAL:
        raise InvalidTransition(f"{task.id}: it is {task.status}; only DONE, CANCELLED and BLOCKED tasks are retried")
    owner = task.orchestrator if task.orchestrator is not None and dispatch.knows(task.orchestrator) else None
    again = NewTask(
        title=task.title,
        description=task.description,
        priority=task.priority,
        orchestrator=owner,
        discipline=task.discipline,
        tags=tuple(task.tags),
        estimate_s=task.estimate_s,
        parent=task.id,
        metadata=task.metadata,
        max_attempts=task.max_attempts,
    )
    return create.create_task(conn, new=again, dispatch=dispatch, actor=actor, now_us=now_us)


def progress(
    conn: Connection, *, task_id: str, token: str, message: str, actor: str, now_us: int, acts_for: str | None = None
) -> TaskRow:
    """The running attempt says how it goes: an event, nothing more. LeaseLost when the token is an old one."""
    task = rows.get_to_change(conn, task_id)
    lease.fence(task, token, acts_for=acts_for)
    rows.tell(conn, "task_progress", task, actor=actor, now_us=now_us, message=message)
    return task


def purge(conn: Connection, *, task_id: str, actor: str, now_us: int) -> None:
    """Remove a final task with its attempts and logs; that it was stays in the events."""
    task = rows.get_to_change(conn, task_id)
    if task.status not in FINAL:
        raise Conflict("not_final", f"{task.id}: it is {task.status}; cancel it first")
    needed_by = conn.execute(_NEEDED_BY, {"key": task_id}).scalar()
    if needed_by is not None:
        raise Conflict("needed", f"{task.id}: {needed_by} depends on it; purge that first")
    conn.execute(_PURGE, {"key": task_id})
    rows.tell(conn, "task_purged", task, actor=actor, now_us=now_us)


def _free(
    conn: Connection,
    task: TaskRow,
    change: transitions.Change,
    kind: str,
    *,
    reason: str | None,
    actor: str,
    now_us: int,
) -> TaskRow:
    """BLOCKED -> TODO by `change`, with the event `kind`, unless it waits for others."""
    values = dict(change.values)
    waiting, cancelled = dependencies.open_ones(conn, task.depends_on)
    if waiting:
        raise Conflict(
            "dependency_unmet",
            f"{task.id}: it waits for {', '.join(waiting[: dependencies.NAMED])}; complete or cancel those first",
        )
    if cancelled:
        values["depends_on"] = [one for one in task.depends_on if one not in cancelled]
        dependencies.rewrite(conn, task.id, values["depends_on"])
    after = rows.apply(conn, task, transitions.Change(values), now_us=now_us)
    rows.tell(conn, kind, after, actor=actor, now_us=now_us, was=task, reason=reason)
    return after


def _edited(task: TaskRow, changed: Mapping[str, Any], now_us: int) -> dict[str, Any]:
    # Limits go by what a task says: whatever it says now, the next claim looks again.
    values = {**changed, "parked_by": None}
    if "due_at_us" in changed:
        values["due_key_us"] = line.due_key_us(changed["due_at_us"])
    if "priority" in changed or "available_at_us" in changed:
        moved = transitions.moved_in_line(
            task,
            priority=changed.get("priority", task.priority),
            available_at_us=changed.get("available_at_us", task.available_at_us),
            now_us=now_us,
        )
        values |= moved.values
    for name in ("tags", "depends_on"):
        if name in values:
            values[name] = list(dict.fromkeys(values[name]))
    return values


def _wait_anew(conn: Connection, task: TaskRow, *, actor: str, now_us: int) -> TaskRow:
    """After its dependencies were edited: write the edges, and block or free the task as they say."""
    if task.status == "IN_PROGRESS":
        raise Conflict("in_progress", f"{task.id}: it is running; its dependencies can't change now")
    condition = dependencies.unmet(conn, task.depends_on)
    dependencies.refuse_cycle(conn, task.id, task.depends_on)
    dependencies.rewrite(conn, task.id, task.depends_on)
    waits = task.status == "BLOCKED" and task.blocked_reason == "dependency"
    if condition is None and waits:
        after = rows.apply(conn, task, transitions.unblocked(task, now_us=now_us), now_us=now_us)
        rows.tell(conn, "task_unblocked", after, actor=actor, now_us=now_us, reason="its dependencies were edited")
        return after
    if condition is not None and task.status == "TODO":
        change = transitions.blocked(task, reason="dependency", condition=condition)
        after = rows.apply(conn, task, change, now_us=now_us)
        rows.tell(conn, "task_blocked", after, actor=actor, now_us=now_us, was=task, reason=condition)
        return after
    if condition is not None and task.blocked_reason in ("quota", "budget"):
        # Time alone would put it in line; from now on it waits for more than that.
        change = transitions.Change({"blocked_reason": "dependency", "condition": condition, "ripens_at_us": None})
        after = rows.apply(conn, task, change, now_us=now_us)
        rows.tell(conn, "task_blocked", after, actor=actor, now_us=now_us, was=task, reason=condition)
        return after
    if condition is not None and waits and condition != task.condition:
        return rows.apply(conn, task, transitions.edited(condition=condition), now_us=now_us)
    return task


def _end(conn: Connection, task: TaskRow, *, outcome: str, reason: str | None, now_us: int) -> float | None:
    """Close the running attempt, if one runs. `task` is the row before the change."""
    if task.status != "IN_PROGRESS":
        return None
    return attempts.end(conn, task, outcome=outcome, now_us=now_us, error=reason)


def _refuse_final(task: TaskRow) -> None:
    if task.status in FINAL:
        raise Conflict("final", f"{task.id}: it is {task.status}, which is final; retry it to get a new one")


def _refuse_stale(task: TaskRow, version: int | None) -> None:
    if version is not None and version != task.version:
        got = f"got {version}" if version > 0 else "got one that it never had"
        raise Conflict("stale", f"{task.id}: it is at version {task.version}, {got}; read it again")


def _refuse_not_awaiting(task: TaskRow) -> None:
    if task.status == "BLOCKED" and task.blocked_reason in transitions.APPROVABLE:
        return
    what = f"BLOCKED/{task.blocked_reason}" if task.status == "BLOCKED" else task.status
    raise Conflict(
        "not_awaiting_approval",
        f"{task.id}: it is {what}; only tasks BLOCKED for {_APPROVABLE} are approved or rejected",
    )
