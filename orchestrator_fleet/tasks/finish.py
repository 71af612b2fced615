"""How an attempt ends: by its own report, under its token.

The same report twice gets the same answer, so a daemon may repeat what it does not know to be written. A token that is
not the running attempt's gets LeaseLost: drop what you have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import Invalid, LeaseLost, NotFound, TaskError
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.schema import attempts as table
from orchestrator_fleet.tasks import attempts, backoff, dependencies, holds, lease, rows, spending, transitions
from orchestrator_fleet.tasks.backoff import RetryPolicy
from orchestrator_fleet.tasks.task import FINAL, MAX_ERROR_CHARS, TaskRow
from orchestrator_fleet.wire.link import MAX_RESULT_BYTES, MAX_USED, Usage
from orchestrator_fleet.wire.nesting import MAX_DEPTH, is_too_deep

REPORTED = ("done", "failed", "failed_for_good", "timeout", "crashed", "cancelled", "released", "quota")
QUOTA_WAIT_S = 300.0
MAX_QUOTA_WAIT_S = 7 * 86_400.0

_BY_TOKEN = sa.select(table).where(table.c.task == sa.bindparam("of_task"), table.c.token == sa.bindparam("by"))


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How the attempt that `token` names ended.

    `outcome` is one of REPORTED. failed, timeout and crashed are tried again after a backoff by `retry_of` (policy by
    orchestrator; `roll` 0..1 is its randomness) until the task's `max_attempts` are spent; failed_for_good is not.
    released and quota do not count; quota waits until `until_us` (None: QUOTA_WAIT_S; at most MAX_QUOTA_WAIT_S), and
    its orchestrator with it. `acts_for` is the only orchestrator that the reporter may speak for, None: any. `by`:
    see outbox.CALLER.
    """

    task_id: str
    token: str
    outcome: str
    retry_of: Callable[[str | None], RetryPolicy]
    roll: float
    actor: str
    now_us: int
    exit_code: int | None = None
    result: Any = None
    error: str = ""
    usage: Usage | None = None
    until_us: int | None = None
    acts_for: str | None = None
    by: dict[str, str | None] | None = None


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
    **more: Any,
) -> TaskRow:
    """One Report; answers the task after it."""
    report = Report(
        task_id=task_id,
        token=token,
        outcome=outcome,
        retry_of=lambda _: retry,
        roll=roll,
        actor=actor,
        now_us=now_us,
        **more,
    )
    (answer,) = finish_all(conn, [report])
    if isinstance(answer, Exception):
        raise answer
    return answer


def finish_all(conn: Connection, reports: Sequence[Report]) -> list[TaskRow | Exception]:
    """End the attempts; answers each task after it, or why the report is refused."""
    answers: dict[int, TaskRow | Exception] = {}
    waiting = dict(enumerate(reports))
    while waiting:
        # Two reports of one task see each other: the second is of the next round.
        first_of = {report.task_id: number for number, report in reversed(waiting.items())}
        numbers = sorted(first_of.values())
        some = _finish_some(conn, [waiting.pop(number) for number in numbers])
        answers.update(zip(numbers, some, strict=True))
    return [answers[number] for number in range(len(reports))]


class _Good(msgspec.Struct, frozen=True):
    """A report of the running attempt: the row before it and what it changes."""

    report: Report
    task: TaskRow
    change: transitions.Change


def _finish_some(conn: Connection, reports: Sequence[Report]) -> list[TaskRow | Exception]:
    """Reports of different tasks."""
    now_us = max(report.now_us for report in reports)
    held = rows.get_all_to_change(conn, [report.task_id for report in reports])
    answers: list[TaskRow | Exception | _Good] = []
    for report in reports:
        try:
            answers.append(_weigh(conn, held.get(report.task_id), report, now_us=now_us))
        except TaskError as problem:
            answers.append(problem)
    good = [answer for answer in answers if isinstance(answer, _Good)]
    afters = iter(_write(conn, good, now_us=now_us) if good else ())
    return [next(afters) if isinstance(answer, _Good) else answer for answer in answers]


def _weigh(conn: Connection, task: TaskRow | None, report: Report, *, now_us: int) -> TaskRow | _Good:
    """What a report changes, or the task as the same report left it before."""
    _check(report)
    if task is None:
        raise NotFound(f"there is no task {report.task_id}")
    if task.token != report.token:
        return _repeated(conn, task, report.token, report.outcome)
    lease.refuse_others(task, acts_for=report.acts_for)
    return _Good(report, task, _decide(task, report, now_us=now_us))


def _write(conn: Connection, good: Sequence[_Good], *, now_us: int) -> list[TaskRow]:
    afters = rows.apply_all(conn, [(one.task, one.change) for one in good], now_us=now_us)
    ended = [_ended(one, after) for one, after in zip(good, afters, strict=True)]
    ran_s = attempts.end_all(conn, ended, now_us=now_us)
    told = []
    for one, how, after, run_s in zip(good, ended, afters, ran_s, strict=True):
        told += _events(one.report, how, after, run_s=run_s, now_us=now_us)
    outbox.append(conn, *told)
    _settle(conn, good, now_us=now_us)
    over = [(after, one.report.actor) for one, after in zip(good, afters, strict=True) if after.status in FINAL]
    if over:
        dependencies.follow_all(conn, over, now_us=now_us)
    return afters


def _settle(conn: Connection, good: Sequence[_Good], *, now_us: int) -> None:
    """What attempts used, and the quotas that they met, are their orchestrators'."""
    used = [(one.task.orchestrator or "", one.report.usage) for one in good if one.report.usage is not None]
    if used:
        spending.settle_all(conn, used, now_us=now_us)
    # In one order for everybody, as the holds are held together.
    for one in sorted(good, key=lambda one: one.task.orchestrator or ""):
        if one.report.outcome == "quota":
            holds.put(
                conn,
                orchestrator=one.task.orchestrator or "",
                kind="quota",
                by=one.report.actor,
                reason=_text(one.report.error) or None,
                until_us=_quota_until(one.report, now_us),
                now_us=now_us,
            )


def _ended(one: _Good, after: TaskRow) -> attempts.Ended:
    report = one.report
    return attempts.Ended(
        task=one.task,
        outcome=report.outcome,
        answer=after.status,
        exit_code=report.exit_code,
        error=_text(report.error) or None,
        usage=None if report.usage is None else msgspec.structs.asdict(report.usage),
    )


_KINDS = {"done": "task_done", "released": "task_released", "cancelled": "task_cancelled", "quota": "task_quota"}


def _events(report: Report, ended: attempts.Ended, after: TaskRow, *, run_s: float, now_us: int) -> list[outbox.Event]:
    told = [
        rows.event(
            _KINDS.get(report.outcome, "task_failed"),
            after,
            actor=report.actor,
            now_us=now_us,
            outcome=report.outcome,
            exit_code=report.exit_code,
            error=ended.error,
            run_s=run_s,
            usage=ended.usage,
            by=report.by,
        )
    ]
    if after.status == "BLOCKED":
        told.append(rows.event("task_blocked", after, actor=report.actor, now_us=now_us, reason=after.condition))
    return told


def _quota_until(report: Report, now_us: int) -> int:
    """When to try again: what the report says, if that is to come, and not for ever."""
    said_us = report.until_us
    if said_us is None or said_us <= now_us:
        return now_us + round(QUOTA_WAIT_S * SECOND_US)
    return min(said_us, now_us + round(MAX_QUOTA_WAIT_S * SECOND_US))


def _decide(task: TaskRow, report: Report, *, now_us: int) -> transitions.Change:
    error = _text(report.error) or _default_error(report.outcome, report.exit_code)
    match report.outcome:
        case "done":
            return transitions.completed(task, result=report.result, now_us=now_us)
        case "released":
            return transitions.released(task, now_us=now_us)
        case "cancelled":
            return transitions.cancelled(task, now_us=now_us)
        case "quota":
            until_us = _quota_until(report, now_us)
            return transitions.waits_for_quota(task, until_us, f"{error}; waits until {to_rfc3339(until_us)}")
    failure = transitions.Failure(outcome=report.outcome, message=error)
    failures = task.failures + 1
    if report.outcome == "failed_for_good" or failures >= task.max_attempts:
        return transitions.exhausted(task, failure)
    wait_us = backoff.wait_us(report.retry_of(task.orchestrator), failures=failures, roll=report.roll)
    return transitions.retried(task, failure, available_at_us=now_us + wait_us, now_us=now_us)


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


def _check(report: Report) -> None:
    if report.outcome not in REPORTED:
        raise Invalid([("outcome", f"got {report.outcome!r}, wanted one of {', '.join(REPORTED)}")])
    if report.result is not None:
        _check_result(report.result)
    if report.usage is not None:
        used = msgspec.structs.asdict(report.usage)
        if wrong := [(f"usage.{name}", value) for name, value in used.items() if not 0 <= value <= MAX_USED]:
            raise Invalid([(name, f"got {value}, wanted 0 to {MAX_USED}") for name, value in wrong])


def _check_result(result: Any) -> None:
    if is_too_deep(result):
        raise Invalid([("result", f"is nested deeper than {MAX_DEPTH}; make it flatter")])
    size = len(msgspec.json.encode(result))
    if size > MAX_RESULT_BYTES:
        raise Invalid([("result", f"got {size} bytes as JSON, wanted at most {MAX_RESULT_BYTES}; write it to a file")])


def _text(error: str) -> str:
    """What a session said, as both databases can hold it."""
    return error[:MAX_ERROR_CHARS].replace("\0", "\ufffd")


def _default_error(outcome: str, exit_code: int | None) -> str:
    return outcome.replace("_", " ") if exit_code is None else f"{outcome.replace('_', ' ')}, exit code {exit_code}"
