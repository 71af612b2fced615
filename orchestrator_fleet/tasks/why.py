"""Why a task does not run, its place in line, and when it may begin.

    look     reads all that holds it, of one snapshot
    binding  the hold that counts, of several

Several things may hold a task at once, and each of them alone would. The *binding* one is that which is there longest
as things usually go, so the one to do something about: first what somebody has to end (an approval, a pause without an
end, a missing route), then what ends with something else (a dependency, a daemon that is away), then what time ends
(the last to end first), then what ends as other work does (a limit, sessions, a machine), and, when nothing holds it,
its place in line.

The estimate is made of what was: how long the orchestrator's last attempts ran. Without such, or behind something whose
end nobody knows, there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.store.schema import CLAIMABLE, RUNNING, attempts, coordinations, limit_uses, tasks
from orchestrator_fleet.tasks import gate, limits, line, queries, rows
from orchestrator_fleet.tasks.gate import Gate
from orchestrator_fleet.tasks.rules import Limit, Rules
from orchestrator_fleet.tasks.task import FINAL, TaskRow

Kind = Literal[
    "running",
    "done",
    "cancelled",
    "approval",
    "escalation",
    "manual",
    "attempts_exhausted",
    "dependency",
    "no_route",
    "pause",
    "offline",
    "quota",
    "budget",
    "schedule",
    "not_yet",
    "limit",
    "sessions",
    "machine",
    "in_line",
    "next",
]

MAX_NAMED = 20
RECENT = 20
WINDOW_US = 60 * SECOND_US

# Who ends it: somebody, something else, time, other work.
_SOMEBODY, _SOMETHING, _TIME, _WORK = range(4)
_OF_A_PERSON = frozenset({"approval", "escalation", "manual", "attempts_exhausted", "no_route"})
_OF_SOMETHING = frozenset({"dependency", "offline"})
_OF_WORK = frozenset({"limit", "sessions", "machine"})

_STATUSES = (
    sa.select(tasks.c.id, tasks.c.status, tasks.c.title)
    .where(tasks.c.id.in_(sa.bindparam("ids", expanding=True)), tasks.c.status != "DONE")
    .order_by(tasks.c.id)
)
_ASKED = (
    sa.select(coordinations.c.target, coordinations.c.hop, coordinations.c.expires_at_us)
    .where(
        coordinations.c.task == sa.bindparam("of"),
        coordinations.c.kind == "escalation",
        coordinations.c.state == "pending",
    )
    .order_by(coordinations.c.created_at_us.desc(), coordinations.c.id.desc())
    .limit(1)
)
_LINE = (
    sa.select(sa.func.count()).select_from(tasks).where(tasks.c.orchestrator == sa.bindparam("of"), sa.text(CLAIMABLE))
)
_RUNNING_OF = (
    sa.select(sa.func.count()).select_from(tasks).where(tasks.c.orchestrator == sa.bindparam("of"), sa.text(RUNNING))
)
_RUNNING_OF_POLLERS = _RUNNING_OF.where(tasks.c.machine == "")
_ATTEMPT = sa.select(attempts.c.started_at_us).where(
    attempts.c.task == sa.bindparam("of_task"), attempts.c.attempt == sa.bindparam("number")
)
# By an index whose predicate this is.
_DONE_LATELY = (
    sa.select(attempts.c.started_at_us, attempts.c.ended_at_us)
    .where(attempts.c.orchestrator == sa.bindparam("of"), sa.text("outcome = 'done'"))
    .order_by(attempts.c.ended_at_us.desc())
    .limit(RECENT)
)
_OF_KEY = sa.and_(limit_uses.c.limit_name == sa.bindparam("name"), limit_uses.c.value == sa.bindparam("of"))
_USERS = sa.select(limit_uses.c.started_at_us, limit_uses.c.task).where(_OF_KEY, sa.text("ended_at_us IS NULL"))
_STARTS = (
    sa.select(limit_uses.c.started_at_us)
    .where(_OF_KEY, limit_uses.c.started_at_us > sa.bindparam("since"))
    .order_by(limit_uses.c.started_at_us.desc())
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What the control plane knows beside the store. `offline`: why nobody is there to claim; "" when somebody is."""

    declared: bool = True
    machine: str = ""
    sessions_max: int | None = None
    offline: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One thing that holds a task. `until_us`: when it ends by itself."""

    kind: Kind
    reason: str
    until_us: int | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How many are claimed before it, of how many in its line."""

    ahead: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast an orchestrator works: the mean of its last done attempts (None: it has none), and its free places."""

    mean_run_s: float | None
    attempts: int
    slots: int | None
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """The answer. `holds` are sorted, the binding one first; empty when nothing holds it but its place in line."""

    task: TaskRow
    binding: Hold
    holds: Sequence[Hold] = ()
    place: Place | None = None
    pace: Pace | None = None
    starts_at_us: int | None = None


def look(conn: Connection, task_id: str, *, rules: Rules, around: Mapping[str, Around], now_us: int) -> Why:
    """Why the task is as it is at `now_us`; NotFound when there is none. `around`: of each orchestrator, by name."""
    task = rows.get(conn, task_id)
    if task.status in FINAL:
        ended = _ended(task)
        return Why(task=task, binding=ended)
    if task.status == "IN_PROGRESS":
        return Why(task=task, binding=_running(conn, task))
    here = around.get(task.orchestrator or "", Around(declared=False))
    held, slots = [*_own(conn, task, now_us=now_us), *_unclaimed(conn, task, here)], here.sessions_max
    if task.orchestrator is not None:
        through = gate.look(
            conn,
            orchestrator=task.orchestrator,
            machine=here.machine,
            sessions_max=here.sessions_max,
            rules=rules,
            now_us=now_us,
        )
        declared = rules.of(task.orchestrator).sessions_max
        slots = min((most for most in (declared, slots) if most is not None), default=None)
        held += _orchestrators(task, through)
        held += _limited(conn, task, rules.limits, now_us=now_us)
    holds = sorted(held, key=_lasts)
    place = _place(conn, task, now_us=now_us)
    pace = None if task.orchestrator is None else pace_of(conn, task.orchestrator, slots=slots)
    return Why(
        task=task,
        binding=holds[0] if holds else _in_line(task, place),
        holds=holds,
        place=place,
        pace=pace,
        starts_at_us=_starts_at(holds, place, pace, now_us=now_us),
    )


def pace_of(conn: Connection, orchestrator: str, *, slots: int | None = None) -> Pace:
    """How fast an orchestrator works."""
    lately = conn.execute(_DONE_LATELY, {"of": orchestrator}).all()
    mean = sum(ended_us - started_us for started_us, ended_us in lately) / len(lately) / SECOND_US if lately else None
    running = conn.execute(_RUNNING_OF, {"of": orchestrator}).scalar_one()
    return Pace(mean_run_s=mean, attempts=len(lately), slots=slots, running=running)


def to_json(why: Why) -> dict[str, Any]:
    """The answer as the API shows it."""
    return {
        "task": why.task.id,
        "status": why.task.status,
        "orchestrator": why.task.orchestrator,
        "binding": _hold_json(why.binding),
        "holds": [_hold_json(hold) for hold in why.holds],
        "place_in_line": None if why.place is None else {"ahead": why.place.ahead, "of": why.place.of},
        "estimate": None if why.starts_at_us is None else _estimate_json(why),
    }


def _hold_json(hold: Hold) -> dict[str, Any]:
    until = None if hold.until_us is None else to_rfc3339(hold.until_us)
    return {"kind": hold.kind, "reason": hold.reason, "until": until, **hold.evidence}


def _estimate_json(why: Why) -> dict[str, Any]:
    assert why.starts_at_us is not None  # noqa: S101 (asked for then alone)
    pace = why.pace
    return {
        "starts_at": to_rfc3339(why.starts_at_us),
        "based_on": {
            "mean_run_s": None if pace is None or pace.mean_run_s is None else round(pace.mean_run_s, 3),
            "attempts": 0 if pace is None else pace.attempts,
            "slots": None if pace is None else pace.slots,
            "running": 0 if pace is None else pace.running,
            "ahead": 0 if why.place is None else why.place.ahead,
        },
    }


def _ended(task: TaskRow) -> Hold:
    at = to_rfc3339(task.completed_at_us or 0)
    if task.status == "DONE":
        return Hold(kind="done", reason=f"it was done at {at}", evidence={"completed_at": at})
    return Hold(kind="cancelled", reason=f"it was cancelled at {at}", evidence={"completed_at": at})


def _running(conn: Connection, task: TaskRow) -> Hold:
    started_us = conn.execute(_ATTEMPT, {"of_task": task.id, "number": task.attempt}).scalar()
    where = f"on {task.machine}" if task.machine else "by a client over HTTP"
    since = to_rfc3339(started_us or task.updated_at_us)
    return Hold(
        kind="running",
        reason=f"attempt {task.attempt} runs {where} since {since}",
        evidence={
            "attempt": task.attempt,
            "machine": task.machine or None,
            "started_at": since,
            "lease_expires_at": None if task.lease_until_us is None else to_rfc3339(task.lease_until_us),
        },
    )


def _own(conn: Connection, task: TaskRow, *, now_us: int) -> list[Hold]:
    """What the task's own row says."""
    if task.status == "BLOCKED":
        return [_escalated(conn, task) if task.blocked_reason == "escalation" else _blocked(conn, task)]
    if task.wakes_at_us is None or task.wakes_at_us <= now_us:
        return []
    after = "its last attempt failed; it is tried again" if task.failures else "it is not to begin"
    reason = f"{after} {'at' if task.failures else 'before'} {to_rfc3339(task.wakes_at_us)}"
    evidence = {"available_at": to_rfc3339(task.wakes_at_us), "failures": task.failures}
    return [Hold(kind="not_yet", reason=reason, until_us=task.wakes_at_us, evidence=evidence)]


def _blocked(conn: Connection, task: TaskRow) -> Hold:
    said = task.condition or ""
    match task.blocked_reason:
        case "dependency":
            return _dependency(conn, task)
        case "approval":
            return Hold(kind="approval", reason=f"{said or 'it waits for an approval'}; approve or reject it")
        case "quota":
            return Hold(kind="quota", reason=said or "a provider's quota is spent", until_us=task.ripens_at_us)
        case "budget":
            reason = f"{said or 'the budget is spent'}; approve it to go past the budget"
            return Hold(kind="budget", reason=reason, until_us=task.ripens_at_us)
        case "attempts_exhausted":
            evidence = {"failures": task.failures, "max_attempts": task.max_attempts, "error": task.error}
            return Hold(kind="attempts_exhausted", reason=f"{said}; retry it to try again", evidence=evidence)
    return Hold(kind="manual", reason=f"{said or 'somebody blocked it'}; unblock it")


def _escalated(conn: Connection, task: TaskRow) -> Hold:
    """Who is asked, and when the next one is. That is not when it ends: `until_us` would say so."""
    said = task.condition or "it waits for an escalation"
    asked = conn.execute(_ASKED, {"of": task.id}).first()
    if asked is None:
        return Hold(kind="escalation", reason=f"{said}; approve or reject it")
    target, level, next_us = asked
    next_at = None if next_us is None else to_rfc3339(next_us)
    then = "" if next_at is None else f"; the next one is asked at {next_at}"
    return Hold(
        kind="escalation",
        reason=f"{said}{then}; approve or reject it",
        evidence={"asked": target, "level": level, "next_level_at": next_at},
    )


def _dependency(conn: Connection, task: TaskRow) -> Hold:
    open_ones = conn.execute(_STATUSES, {"ids": task.depends_on}).all() if task.depends_on else []
    named = [{"id": one.id, "status": one.status, "title": one.title} for one in open_ones[:MAX_NAMED]]
    return Hold(
        kind="dependency",
        reason=task.condition or "it waits for other tasks",
        evidence={
            "waits_for": named,
            "more": len(open_ones) - len(named),
            "cancelled": any(one.status == "CANCELLED" for one in open_ones),
        },
    )


def _unclaimed(conn: Connection, task: TaskRow, here: Around) -> list[Hold]:
    """Nobody has it, or nobody is there to claim it."""
    if task.orchestrator is None:
        reason = task.condition if task.status == "TODO" and task.condition else "no routing rule takes it"
        return [Hold(kind="no_route", reason=reason)]
    if not here.declared:
        return [Hold(kind="no_route", reason=f"{task.orchestrator} is not declared; assign it to one that is")]
    if here.offline and not conn.execute(_RUNNING_OF_POLLERS, {"of": task.orchestrator}).scalar_one():
        return [Hold(kind="offline", reason=here.offline, evidence={"orchestrator": task.orchestrator})]
    return []


def _orchestrators(task: TaskRow, through: Gate) -> list[Hold]:
    """What binds its orchestrator, as far as it binds this task. What the task's own row says already is left out."""
    return [
        Hold(kind=one.kind, reason=one.reason, until_us=one.again_at_us, evidence={"orchestrator": task.orchestrator})
        for one in through.bindings
        if not (one.kind == "schedule" and task.priority == "CRITICAL")
        and not (one.kind == "budget" and through.blocks_budget and task.over_budget)
        and one.kind != task.blocked_reason
    ]


def _limited(conn: Connection, task: TaskRow, declared: Sequence[Limit], *, now_us: int) -> list[Hold]:
    """The limits that are full for it, whether a claim has found that already or not."""
    found = (_full(conn, task, limit, value, now_us=now_us) for limit, value in limits.applying(task, declared))
    return [hold for hold in found if hold is not None]


def _full(conn: Connection, task: TaskRow, limit: Limit, value: str, *, now_us: int) -> Hold | None:
    key = {"name": limit.name, "of": value}
    evidence: dict[str, Any] = {"limit": limit.name, "value": value}
    if limit.max_running is not None:
        users = [task for _, task in sorted((at_us, task) for at_us, task in conn.execute(_USERS, key))]
        if len(users) >= limit.max_running:
            at = f"{limit.name}={value}"
            evidence |= {
                "max_running": limit.max_running,
                "running": users[:MAX_NAMED],
                "ahead": queries.ahead_of_parked(conn, task, at=at) if task.parked_by == at else None,
            }
            reason = f"limit {limit.name} of {value} is full: {len(users)} of {limit.max_running} run"
            return Hold(kind="limit", reason=reason, evidence=evidence)
    if limit.max_per_minute is not None:
        starts = conn.execute(_STARTS.limit(limit.max_per_minute), {**key, "since": now_us - WINDOW_US}).scalars().all()
        if len(starts) >= limit.max_per_minute:
            evidence["max_per_minute"] = limit.max_per_minute
            reason = f"limit {limit.name} of {value} is full: {len(starts)} began within a minute"
            return Hold(kind="limit", reason=reason, until_us=starts[-1] + WINDOW_US, evidence=evidence)
    return None


def _lasts(hold: Hold) -> tuple[int, int]:
    """The order of holds: see the module's text."""
    cancelled = hold.kind == "dependency" and hold.evidence.get("cancelled")
    if hold.kind in _OF_A_PERSON or cancelled:
        return _SOMEBODY, 0
    if hold.kind in _OF_SOMETHING:
        return _SOMETHING, 0
    if hold.until_us is not None:
        return _TIME, -hold.until_us
    return (_WORK if hold.kind in _OF_WORK else _SOMEBODY), 0


def _place(conn: Connection, task: TaskRow, *, now_us: int) -> Place | None:
    """Its place, if it stands in line; one whose moment has come stands there though no claim has noticed yet."""
    if task.status != "TODO" or task.orchestrator is None or task.parked_by is not None:
        return None
    if task.wakes_at_us is not None and task.wakes_at_us > now_us:
        return None
    rank = line.rank_at(priority=task.priority, waiting_since_us=task.waiting_since_us, now_us=now_us)
    ahead = queries.ahead_of(conn, task, rank=rank)
    noticed = task.wakes_at_us is None
    return Place(ahead=ahead, of=conn.execute(_LINE, {"of": task.orchestrator}).scalar_one() + (not noticed))


def _in_line(task: TaskRow, place: Place | None) -> Hold:
    if place is None:
        # Parked at a limit that has room by now: the next claim puts it back.
        return Hold(kind="next", reason=f"{task.parked_by} has room again; the next claim looks at it")
    if place.ahead == 0:
        return Hold(kind="next", reason=f"it is the next of {task.orchestrator}'s line")
    return Hold(kind="in_line", reason=f"{place.ahead} of {place.of} in {task.orchestrator}'s line come before it")


def _starts_at(holds: Sequence[Hold], place: Place | None, pace: Pace | None, *, now_us: int) -> int | None:
    """When it may begin, as far as that can be known: behind time and work, at the pace of the last attempts."""
    lasting = [_lasts(hold)[0] for hold in holds]
    if pace is None or any(one in (_SOMEBODY, _SOMETHING) for one in lasting):
        return None
    from_us = max((hold.until_us for hold in holds if hold.until_us is not None), default=now_us)
    limited = [hold for hold in holds if hold.kind == "limit" and hold.until_us is None]
    waits_s = [behind_line(0 if place is None else place.ahead, pace), *(_behind_limit(hold, pace) for hold in limited)]
    known = [one for one in waits_s if one is not None]
    return None if len(known) < len(waits_s) else from_us + round(max(known) * SECOND_US)


def behind_line(ahead: int, pace: Pace) -> float | None:
    """How long the `ahead` before it take until a place is free, in seconds; None when nobody knows. Pure."""
    if pace.slots is None:
        return 0.0 if ahead == 0 else None
    too_many = ahead - max(0, pace.slots - pace.running)
    if too_many < 0:
        return 0.0
    return None if pace.mean_run_s is None else pace.mean_run_s * (too_many + 1) / pace.slots


def _behind_limit(hold: Hold, pace: Pace) -> float | None:
    if pace.mean_run_s is None:
        return None
    return float(pace.mean_run_s * ((hold.evidence["ahead"] or 0) + 1) / hold.evidence["max_running"])
