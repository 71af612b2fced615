"""How an attempt ends: by its own report, under its token.

The same report twice gets the same answer, so a daemon may repeat what it does not know to be written. A token that is
not the running attempt's gets LeaseLost: drop what you have.
"""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Invalid, LeaseLost
from orchestrator_fleet.store.schema import attempts
from orchestrator_fleet.tasks import backoff, dependencies, rows, transitions
from orchestrator_fleet.tasks.backoff import RetryPolicy
from orchestrator_fleet.tasks.task import MAX_ERROR_CHARS, TaskRow
from orchestrator_fleet.wire.link import MAX_RESULT_BYTES, MAX_USED, Usage
from orchestrator_fleet.wire.nesting import MAX_DEPTH, is_too_deep

REPORTED = ("done", "failed", "failed_for_good", "timeout", "crashed", "cancelled", "released")

_BY_TOKEN = sa.select(attempts).where(
    attempts.c.task == sa.bindparam("of_task"), attempts.c.token == sa.bindparam("by")
)


def finish(
    conn: Connection,
    *,
    task_id: str,
    token: str,
    outcome: str,
    retry: RetryPolicy,
    roll: float,
    actor: str,
    now_us: int,
    exit_code: int | None = None,
    result: Any = None,
    error: str = "",
    usage: Usage | None = None,
) -> TaskRow:
    """End the attempt that `token` names; answers the task after it.

    `outcome` is one of REPORTED. failed, timeout and crashed are tried again after `retry`'s backoff (`roll` 0..1 is
    its randomness) until the task's `max_attempts` are spent; failed_for_good is not; released does not count.
    """
    _check(outcome, result, usage)
    task = rows.get_to_change(conn, task_id)
    if task.token != token:
        return _repeated(conn, task, token, outcome)
    change, kind = _decide(
        task,
        outcome=outcome,
        result=result,
        error=error or _default_error(outcome, exit_code),
        retry=retry,
        roll=roll,
        now_us=now_us,
    )
    after = rows.apply(conn, task, change, now_us=now_us)
    run_s = rows.end_attempt(
        conn,
        task,
        outcome=outcome,
        now_us=now_us,
        answer=after.status,
        exit_code=exit_code,
        error=error[:MAX_ERROR_CHARS] or None,
        usage=None if usage is None else msgspec.structs.asdict(usage),
    )
    rows.tell(
        conn,
        kind,
        after,
        actor=actor,
        now_us=now_us,
        outcome=outcome,
        exit_code=exit_code,
        error=error[:MAX_ERROR_CHARS] or None,
        run_s=run_s,
        usage=usage and msgspec.structs.asdict(usage),
    )
    if after.status == "BLOCKED":
        rows.tell(conn, "task_blocked", after, actor=actor, now_us=now_us, reason=after.condition)
    if after.status in ("DONE", "CANCELLED"):
        dependencies.follow(conn, after, actor=actor, now_us=now_us)
    return after


def _decide(
    task: TaskRow, *, outcome: str, result: Any, error: str, retry: RetryPolicy, roll: float, now_us: int
) -> tuple[transitions.Change, str]:
    match outcome:
        case "done":
            return transitions.completed(task, result=result, now_us=now_us), "task_done"
        case "released":
            return transitions.released(task, now_us=now_us), "task_released"
        case "cancelled":
            return transitions.cancelled(task, now_us=now_us), "task_cancelled"
    failure = transitions.Failure(outcome=outcome, message=error)
    failures = task.failures + 1
    if outcome == "failed_for_good" or failures >= task.max_attempts:
        return transitions.exhausted(task, failure), "task_failed"
    available_at_us = now_us + backoff.wait_us(retry, failures=failures, roll=roll)
    return transitions.retried(task, failure, available_at_us=available_at_us, now_us=now_us), "task_failed"


def _repeated(conn: Connection, task: TaskRow, token: str, outcome: str) -> TaskRow:
    attempt = conn.execute(_BY_TOKEN, {"of_task": task.id, "by": token}).one_or_none()
    if attempt is not None and attempt.outcome == outcome:
        return task if attempt.answer is None else msgspec.structs.replace(task, status=attempt.answer)
    if attempt is None:
        raise LeaseLost(f"{task.id}: this token was never given for it; stop, and drop what you have")
    raise LeaseLost(
        f"{task.id}: attempt {attempt.attempt} is over ({attempt.outcome}) and the task is {task.status};"
        " stop, and drop what you have"
    )


def _check(outcome: str, result: Any, usage: Usage | None) -> None:
    if outcome not in REPORTED:
        raise Invalid([("outcome", f"got {outcome!r}, wanted one of {', '.join(REPORTED)}")])
    if is_too_deep(result):
        raise Invalid([("result", f"is nested deeper than {MAX_DEPTH}; make it flatter")])
    used = {} if usage is None else msgspec.structs.asdict(usage)
    if wrong := [(f"usage.{name}", value) for name, value in used.items() if not 0 <= value <= MAX_USED]:
        raise Invalid([(name, f"got {value}, wanted 0 to {MAX_USED}") for name, value in wrong])
    size = 0 if result is None else len(msgspec.json.encode(result))
    if size > MAX_RESULT_BYTES:
        raise Invalid([("result", f"got {size} bytes as JSON, wanted at most {MAX_RESULT_BYTES}; write it to a file")])


def _default_error(outcome: str, exit_code: int | None) -> str:
    return outcome.replace("_", " ") if exit_code is None else f"{outcome.replace('_', ' ')}, exit code {exit_code}"
