"""The attempts at a task: a row when one begins, its outcome when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store.schema import attempts
from orchestrator_fleet.store.statement import Statement, any_of
from orchestrator_fleet.tasks import limits
from orchestrator_fleet.tasks.task import TaskRow

_BEGIN = Statement(
    attempts.insert(),
    sets=(
        "task",
        "attempt",
        "token",
        "orchestrator",
        "machine",
        "holder",
        "generation",
        "charter_version",
        "started_at_us",
    ),
)
_STARTS = Statement(
    sa.select(attempts.c.task, attempts.c.started_at_us).where(
        any_of(attempts.c.task, "ids"), attempts.c.ended_at_us.is_(None)
    )
)
_ENDED = ("ended_at_us", "outcome", "answer", "exit_code", "error", "usage")
_ENDING = attempts.update().where(
    attempts.c.task == sa.bindparam("of_task"), attempts.c.attempt == sa.bindparam("number")
)
_END = Statement(_ENDING, sets=_ENDED)
_END_ONE = Statement(_ENDING.returning(attempts.c.started_at_us), sets=_ENDED)


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How the running attempt of `task` (its row before the change) ended; `answer`: the status told to its holder."""

    task: TaskRow
    outcome: str
    answer: str | None = None
    exit_code: int | None = None
    error: str | None = None
    usage: dict[str, Any] | None = None


def begin(conn: Connection, claimed: Sequence[tuple[TaskRow, str]], *, now_us: int) -> None:
    """Write the attempts that have just begun: (the claimed row, its holder) each."""
    _BEGIN.many(conn, [_row(task, holder, now_us) for task, holder in claimed])
    limits.begin(conn, [task for task, _ in claimed if task.counts_on is not None], now_us=now_us)


def end(conn: Connection, task: TaskRow, *, outcome: str, now_us: int, error: str | None = None) -> float:
    """Close the running attempt's row; answers how long it ran, in seconds. `task` is the row before the change."""
    (run_s,) = end_all(conn, [Ended(task=task, outcome=outcome, error=error)], now_us=now_us)
    return run_s


def end_all(conn: Connection, ended: Sequence[Ended], *, now_us: int) -> list[float]:
    """Close running attempts' rows and give free what they counted on; answers how long each ran, in seconds."""
    if not ended:
        return []
    values = [_end(one, now_us) for one in ended]
    if len(ended) == 1:
        ((began_us,),) = _END_ONE.rows(conn, values[0])
        starts = [began_us]
    else:
        found = dict(_STARTS.rows(conn, {"ids": [one.task.id for one in ended]}))
        starts = [found[one.task.id] for one in ended]
        _END.many(conn, values)
    limited = [one.task for one in ended if one.task.counts_on is not None]
    if limited:
        limits.end(conn, limited, now_us=now_us)
    return [(now_us - began_us) / SECOND_US for began_us in starts]


def _end(one: Ended, now_us: int) -> dict[str, Any]:
    return {
        "of_task": one.task.id,
        "number": one.task.attempt,
        "ended_at_us": now_us,
        "outcome": one.outcome,
        "answer": one.answer,
        "exit_code": one.exit_code,
        "error": one.error,
        "usage": one.usage,
    }


def _row(task: TaskRow, holder: str, now_us: int) -> dict[str, Any]:
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
