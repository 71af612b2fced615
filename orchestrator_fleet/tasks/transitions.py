"""Which status may follow which, and what each change sets. Pure; `rows.apply` writes what is decided here.

              ┌──────── released, lease lost, retried ────────┐
              ▼                                               │
    ────▶   TODO ──────────────── claimed ──────────▶ IN_PROGRESS ──── completed ──▶ DONE
            ▲  │                                        │     │
  unblocked │  │ blocked                        blocked │     │ cancelled
            │  ▼                                        │     ▼
          BLOCKED ◀─────────────────────────────────────┘  CANCELLED   (also from TODO and BLOCKED)

A TODO task may be *parked* (`parked_by`): a claim found it behind a full limit and took it out of line. Whatever
changes the task puts it back, since its limits may be others now; the next claim looks again.

Each legal change is one function here, so that no caller can set a status and forget a column that goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from orchestrator_fleet.errors import InvalidTransition
from orchestrator_fleet.tasks import line
from orchestrator_fleet.tasks.task import MAX_ERROR_CHARS, BlockedReason, NewTask, Priority, Status, TaskRow

LEGAL: Mapping[Status, tuple[Status, ...]] = MappingProxyType(
    {
        "TODO": ("IN_PROGRESS", "BLOCKED", "CANCELLED"),
        "IN_PROGRESS": ("DONE", "TODO", "BLOCKED", "CANCELLED"),
        "BLOCKED": ("TODO", "CANCELLED"),
        "DONE": (),
        "CANCELLED": (),
    }
)

APPROVABLE: frozenset[BlockedReason | None] = frozenset({"approval", "escalation", "budget"})

_OWNED = frozenset(
    {"status", "blocked_reason", "attempt", "failures", "token", "lease_until_us", "started_at_us", "completed_at_us"}
    | {"rank", "waiting_since_us", "wakes_at_us", "ripens_at_us", "version", "updated_at_us"}
    | {"parked_by", "counts_on", "over_budget"}
)
_OWN_TIME: frozenset[BlockedReason | None] = frozenset({"quota", "budget"})  # what time alone unblocks


class Change(msgspec.Struct, frozen=True):
    """New values of some columns of one task, all that goes with one legal change."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a try ended that did not end well."""

    outcome: str
    message: str


def check(task: TaskRow, to: Status) -> None:
    """Raise InvalidTransition, naming the legal ones, unless `task` may become `to`."""
    if to not in LEGAL[task.status]:
        legal = ", ".join(LEGAL[task.status])
        cure = f"from {task.status} it may become {legal}" if legal else f"{task.status} is final"
        raise InvalidTransition(f"{task.id}: {task.status} can't become {to}; {cure}")


def created(
    new: NewTask,
    *,
    task_id: str,
    actor: str,
    condition: str | None,
    waits_for_others: bool,
    max_attempts: int,
    now_us: int,
) -> TaskRow:
    """The first row: TODO in its place in line, or BLOCKED/dependency while it waits for others. Not routed yet."""
    since_us = max(now_us, new.available_at_us or now_us)
    place = line.place(
        priority=new.priority, waiting_since_us=since_us, available_at_us=new.available_at_us, now_us=now_us
    )
    return TaskRow(
        id=task_id,
        title=new.title,
        description=new.description,
        priority=new.priority,
        status="BLOCKED" if waits_for_others else "TODO",
        blocked_reason="dependency" if waits_for_others else None,
        condition=condition,
        orchestrator=new.orchestrator,
        discipline=new.discipline,
        tags=list(dict.fromkeys(new.tags)),
        due_at_us=new.due_at_us,
        available_at_us=new.available_at_us,
        estimate_s=new.estimate_s,
        depends_on=list(dict.fromkeys(new.depends_on)),
        parent=new.parent,
        metadata=new.metadata,
        route=None,
        attempt=0,
        failures=0,
        max_attempts=max_attempts,
        created_by=actor,
        created_at_us=now_us,
        updated_at_us=now_us,
        started_at_us=None,
        completed_at_us=None,
        result=None,
        error=None,
        version=1,
        generation=None,
        charter_version=None,
        token=None,
        lease_until_us=None,
        machine=None,
        rank=place.rank,
        due_key_us=line.due_key_us(new.due_at_us),
        waiting_since_us=place.waiting_since_us,
        wakes_at_us=None if waits_for_others else place.wakes_at_us,
        ripens_at_us=None if waits_for_others else place.ripens_at_us,
    )


def claimed(
    task: TaskRow,
    *,
    token: str,
    lease_until_us: int,
    machine: str,
    generation: str | None,
    charter_version: str | None,
    now_us: int,
    counts_on: list[list[str]] | None = None,
) -> Change:
    """TODO -> IN_PROGRESS: a new attempt holds it, and counts on these `[limit, value]`."""
    check(task, "IN_PROGRESS")
    return Change(
        {
            "status": "IN_PROGRESS",
            "condition": None,
            "attempt": task.attempt + 1,
            "token": token,
            "lease_until_us": lease_until_us,
            "machine": machine,
            "generation": generation,
            "charter_version": charter_version,
            "started_at_us": task.started_at_us if task.started_at_us is not None else now_us,
            "wakes_at_us": None,
            "ripens_at_us": None,
            "parked_by": None,
            "counts_on": counts_on or None,
        }
    )


def completed(task: TaskRow, *, result: Any, now_us: int) -> Change:
    """IN_PROGRESS -> DONE."""
    check(task, "DONE")
    return Change({**_ended("DONE", now_us), "result": result, "error": None})


def released(task: TaskRow, *, now_us: int) -> Change:
    """IN_PROGRESS -> TODO, untouched: the attempt does not count against `max_attempts`."""
    _check_runs(task, "TODO")
    return Change(_queued(task, available_at_us=None, now_us=now_us))


def retried(task: TaskRow, failure: Failure, *, available_at_us: int, now_us: int) -> Change:
    """IN_PROGRESS -> TODO after a failed try that was not the last; claimable from `available_at_us`."""
    _check_runs(task, "TODO")
    return Change(
        {
            **_queued(task, available_at_us=available_at_us, now_us=now_us),
            "available_at_us": available_at_us,
            "failures": task.failures + 1,
            "error": _error(failure, retryable=True),
        }
    )


def exhausted(task: TaskRow, failure: Failure) -> Change:
    """IN_PROGRESS -> BLOCKED/attempts_exhausted: the tries are spent, or the failure is for good."""
    _check_runs(task, "BLOCKED")
    spent = task.failures + 1
    final = failure.outcome == "failed_for_good"
    why = "failed for good" if final else f"{spent} of {task.max_attempts} attempts failed"
    return Change(
        {
            **_blocked("attempts_exhausted", f"{why}: {failure.message}"[:MAX_ERROR_CHARS]),
            "failures": spent,
            "error": _error(failure, retryable=False),
        }
    )


def cancelled(task: TaskRow, *, now_us: int) -> Change:
    """TODO, IN_PROGRESS or BLOCKED -> CANCELLED."""
    check(task, "CANCELLED")
    return Change(_ended("CANCELLED", now_us))


def blocked(task: TaskRow, *, reason: BlockedReason, condition: str | None) -> Change:
    """TODO or IN_PROGRESS -> BLOCKED, with the reason that programs read and the condition that people read."""
    check(task, "BLOCKED")
    return Change(_blocked(reason, condition))


def waits_for_quota(task: TaskRow, until_us: int, message: str) -> Change:
    """IN_PROGRESS -> BLOCKED/quota until `until_us`; no try is spent."""
    _check_runs(task, "BLOCKED")
    return Change({**_blocked("quota", message[:MAX_ERROR_CHARS]), "ripens_at_us": until_us})


def waits_for_budget(task: TaskRow, until_us: int | None, message: str) -> Change:
    """TODO or IN_PROGRESS -> BLOCKED/budget, until somebody approves it or, at `until_us`, the budget has room."""
    check(task, "BLOCKED")
    return Change({**_blocked("budget", message[:MAX_ERROR_CHARS]), "ripens_at_us": until_us})


def approved(task: TaskRow, *, now_us: int) -> Change:
    """BLOCKED/approval, /escalation or /budget -> TODO, the last of them past any budget from now on."""
    if task.status != "BLOCKED" or task.blocked_reason not in APPROVABLE:
        held = f"BLOCKED/{task.blocked_reason}" if task.status == "BLOCKED" else task.status
        raise InvalidTransition(f"{task.id}: it is {held}, which waits for nobody's approval")
    change = unblocked(task, now_us=now_us)
    return Change({**change.values, "over_budget": task.over_budget or task.blocked_reason == "budget"})


def unblocked(task: TaskRow, *, now_us: int) -> Change:
    """BLOCKED -> TODO. It joins the line now, and with all its tries if they were spent (a redrive)."""
    if task.status != "BLOCKED":
        raise InvalidTransition(f"{task.id}: it is {task.status}, not BLOCKED; there is nothing to unblock")
    values = _queued(task, available_at_us=task.available_at_us, waiting_since_us=now_us, now_us=now_us)
    return Change({**values, "failures": 0 if task.blocked_reason == "attempts_exhausted" else task.failures})


def edited(**values: Any) -> Change:
    """New values of descriptive columns; never of those that a change of status or place owns."""
    owned = _OWNED & values.keys()
    if owned:
        raise ValueError(f"edited: {', '.join(sorted(owned))} belong to the transitions; use those")
    return Change({**values, "parked_by": None})


def moved_in_line(task: TaskRow, *, priority: Priority, available_at_us: int | None, now_us: int) -> Change:
    """A change of priority or availability; a TODO task also takes its new place."""
    values: dict[str, Any] = {"priority": priority, "available_at_us": available_at_us, "parked_by": None}
    if task.status == "TODO":
        values |= _place(
            priority=priority,
            waiting_since_us=_waiting_since(task, available_at_us, now_us),
            available_at_us=available_at_us,
            now_us=now_us,
        )
    return Change(values)


def ripened(task: TaskRow, *, now_us: int) -> Change:
    """A task whose moment has come: TODO wakes, or rises a class; BLOCKED/quota or /budget is TODO again."""
    if task.status == "BLOCKED" and task.blocked_reason in _OWN_TIME:
        return Change(_queued(task, available_at_us=task.available_at_us, now_us=now_us))
    if task.status != "TODO":
        raise InvalidTransition(f"{task.id}: it is {task.status}; only TODO tasks stand in line")
    return Change(
        _place(
            priority=task.priority,
            waiting_since_us=task.waiting_since_us,
            available_at_us=task.wakes_at_us,
            now_us=now_us,
        )
    )


def _check_runs(task: TaskRow, to: Status) -> None:
    check(task, to)
    if task.status != "IN_PROGRESS":
        raise InvalidTransition(f"{task.id}: it is {task.status}; only an attempt IN_PROGRESS can end")


def _waiting_since(task: TaskRow, available_at_us: int | None, now_us: int) -> int:
    if available_at_us == task.available_at_us:
        return task.waiting_since_us
    return min(task.waiting_since_us, now_us) if available_at_us is None else max(task.created_at_us, available_at_us)


def _place(*, priority: Priority, waiting_since_us: int, available_at_us: int | None, now_us: int) -> dict[str, Any]:
    place = line.place(
        priority=priority, waiting_since_us=waiting_since_us, available_at_us=available_at_us, now_us=now_us
    )
    return {
        "rank": place.rank,
        "waiting_since_us": place.waiting_since_us,
        "wakes_at_us": place.wakes_at_us,
        "ripens_at_us": place.ripens_at_us,
    }


def _queued(
    task: TaskRow, *, available_at_us: int | None, now_us: int, waiting_since_us: int | None = None
) -> dict[str, Any]:
    return {
        "status": "TODO",
        "blocked_reason": None,
        "condition": None,
        "token": None,
        "lease_until_us": None,
        "parked_by": None,
        "counts_on": None,
        **_place(
            priority=task.priority,
            waiting_since_us=task.waiting_since_us if waiting_since_us is None else waiting_since_us,
            available_at_us=available_at_us,
            now_us=now_us,
        ),
    }


def _out_of_line(status: Status) -> dict[str, Any]:
    return {
        "status": status,
        "token": None,
        "lease_until_us": None,
        "wakes_at_us": None,
        "ripens_at_us": None,
        "parked_by": None,
        "counts_on": None,
    }


def _ended(status: Status, now_us: int) -> dict[str, Any]:
    return {**_out_of_line(status), "blocked_reason": None, "condition": None, "completed_at_us": now_us}


def _blocked(reason: BlockedReason, condition: str | None) -> dict[str, Any]:
    return {**_out_of_line("BLOCKED"), "blocked_reason": reason, "condition": condition}


def _error(failure: Failure, *, retryable: bool) -> dict[str, Any]:
    return {"message": failure.message[:MAX_ERROR_CHARS], "outcome": failure.outcome, "retryable": retryable}
