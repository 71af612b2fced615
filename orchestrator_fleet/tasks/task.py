"""What a task is, inside: values that the deciding and the applying modules hand to each other.

What is made at every creation, claim and finish is a msgspec struct and not a dataclass: a struct is made and replaced
ten times faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from orchestrator_fleet.tasks.rules import Rules

Status = Literal["TODO", "IN_PROGRESS", "BLOCKED", "DONE", "CANCELLED"]
Priority = Literal["CRITICAL", "HIGH", "MEDIUM", "LOW"]
BlockedReason = Literal["dependency", "approval", "escalation", "quota", "budget", "attempts_exhausted", "manual"]

STATUSES: tuple[Status, ...] = ("TODO", "IN_PROGRESS", "BLOCKED", "DONE", "CANCELLED")
PRIORITIES: tuple[Priority, ...] = ("CRITICAL", "HIGH", "MEDIUM", "LOW")
FINAL: frozenset[str] = frozenset({"DONE", "CANCELLED"})

MAX_ERROR_CHARS = 4_000
MAX_DEPENDENCIES = 1_000


class TaskRow(msgspec.Struct, frozen=True):
    """A row of the table `tasks`; the fields stand in the order of its columns. Times are microseconds (`*_us`).

    `attempt` counts every try, `failures` those that count against `max_attempts`. `error` is
    `{"message", "outcome", "retryable"}` of the last failed try. `condition` says what holds the task, for people.
    """

    id: str
    title: str
    description: str
    priority: Priority
    status: Status
    blocked_reason: BlockedReason | None
    condition: str | None
    orchestrator: str | None
    discipline: str | None
    tags: list[str]
    due_at_us: int | None
    available_at_us: int | None
    estimate_s: float | None
    depends_on: list[str]
    parent: str | None
    metadata: dict[str, Any]
    route: str | None
    attempt: int
    failures: int
    max_attempts: int
    created_by: str
    created_at_us: int
    updated_at_us: int
    started_at_us: int | None
    completed_at_us: int | None
    result: Any
    error: dict[str, Any] | None
    version: int
    generation: str | None
    charter_version: str | None
    token: str | None
    lease_until_us: int | None
    machine: str | None
    rank: int
    due_key_us: int
    waiting_since_us: int
    wakes_at_us: int | None
    ripens_at_us: int | None
    parked_by: str | None = None
    counts_on: list[list[str]] | None = None
    over_budget: bool = False
    coordinated: bool = False


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """What a task is made from. `max_attempts` None: the orchestrator's retry policy says."""

    title: str
    description: str = ""
    priority: Priority = "MEDIUM"
    orchestrator: str | None = None
    discipline: str | None = None
    tags: tuple[str, ...] = ()
    due_at_us: int | None = None
    available_at_us: int | None = None
    estimate_s: float | None = None
    depends_on: tuple[str, ...] = ()
    parent: str | None = None
    metadata: dict[str, Any] = {}
    max_attempts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An attempt that somebody runs: the task and its fencing token."""

    task: str
    token: str


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody wants up to `limit` tasks of an orchestrator's line.

    `machine` and `holder` (boot and epoch of the daemon) say who runs the attempts; `machine` is "" for a client that
    polls over HTTP. `sessions_max` is what the claimant has room for (None: it does not say); what is declared binds
    as well, through `rules`.
    """

    orchestrator: str
    limit: int
    lease_s: float
    actor: str
    rules: Rules
    now_us: int
    machine: str = ""
    holder: str = ""
    sessions_max: int | None = None
    generation: str | None = None
    charter_version: str | None = None


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """What an Ask got. Without grants, `reason` says why for people, and `again_at_us` when time alone changes that."""

    grants: tuple[Grant, ...] = ()
    reason: str = ""
    again_at_us: int | None = None


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A claimed task. The token goes with every later write of the attempt."""

    task: TaskRow
    token: str
    attempt: int
    lease_until_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """An attempt that was ended from outside: whoever runs it must be told to stop."""

    task: str
    token: str
    attempt: int
    orchestrator: str
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A task after a change, and the attempt that the change ended, if one ran."""

    task: TaskRow
    stopped: Stopped | None = None
