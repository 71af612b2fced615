"""Whether an orchestrator may begin anything now, and how much: pause, quota, budget, sessions, hours.

`look` reads what the rules need and no more, `decide` decides. The same answer serves the claim, a poll's `reason`,
and `why`.

A budget counts what ended attempts used and, for each that runs, what one used on average. A task begins while that
is under the budget; so a budget is passed by what tasks use beyond the average, and never by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.spec import hours
from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import RUNNING, tasks
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import holds, spending
from orchestrator_fleet.tasks.holds import Hold
from orchestrator_fleet.tasks.rules import NO_RULES, Budget, Hours, OrchestratorRules, Rules
from orchestrator_fleet.tasks.spending import NOTHING, Spent
from orchestrator_fleet.tasks.task import Ask

Kind = Literal["pause", "quota", "budget", "sessions", "machine", "schedule"]

PLENTY = 1_000_000

_RUNNING = sa.select(sa.func.count()).select_from(tasks).where(sa.text(RUNNING))
_RUNNING_OF = Statement(_RUNNING.where(tasks.c.orchestrator == sa.bindparam("of")))
_RUNNING_ON = Statement(_RUNNING.where(tasks.c.machine == sa.bindparam("on")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """One thing that binds now. `again_at_us`: when time alone ends it."""

    kind: Kind
    reason: str
    again_at_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How many attempts may begin now: `most`, PLENTY when nothing binds; with `only_critical`, of such tasks alone.

    `reason` says what binds, for people, and `again_at_us` when time alone changes it. `blocks_budget`: what would
    begin becomes BLOCKED/budget instead (until `again_at_us`), but for tasks that somebody approved past it.
    `bindings` is all that binds, what stops everything first.
    """

    most: int = PLENTY
    only_critical: bool = False
    reason: str = ""
    again_at_us: int | None = None
    blocks_budget: bool = False
    bindings: tuple[Binding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the store says of an orchestrator that asks; what no rule needs is left at its default.

    `running` and `running_there`: attempts of the orchestrator, and of all on the asking machine. `budget_again_at_us`
    is when the windows will have room, once they have none.
    """

    holds: Sequence[Hold] = ()
    running: int = 0
    running_there: int = 0
    spent: Spent = NOTHING
    budget_again_at_us: int | None = None


def decide(
    *,
    rules: OrchestratorRules,
    seen: Seen,
    machine: str = "",
    machine_max: int | None = None,
    sessions_max: int | None = None,
    now_us: int,
) -> Gate:
    """What is let through. `sessions_max` is what the claimant has room for, `machine_max` what its machine may run."""
    declared = min((most for most in (rules.sessions_max, sessions_max) if most is not None), default=None)
    stops = [_held(hold) for hold in sorted(holds.in_force(seen.holds, now_us), key=lambda one: one.kind)]
    if declared is not None and seen.running >= declared:
        stops.append(Binding(kind="sessions", reason=f"{seen.running} of {declared} sessions are taken"))
    if machine_max is not None and seen.running_there >= machine_max:
        text = f"{seen.running_there} of {machine_max} sessions on machine {machine} are taken"
        stops.append(Binding(kind="machine", reason=text))
    affordable = PLENTY if rules.budget is None else _affordable(rules.budget, seen)
    over = _over_budget(rules.budget, seen) if rules.budget is not None and affordable <= 0 else None
    if over is not None and rules.budget is not None and not _blocks(rules.budget, seen.spent):
        stops.append(over)
    closed = None if rules.hours is None else _closed(rules.hours, now_us)
    after = (closed,) if closed is not None else ()
    if stops:
        ends = [one.again_at_us for one in stops]
        again_at_us = None if None in ends else max(at_us for at_us in ends if at_us is not None)
        return Gate(most=0, reason=stops[0].reason, again_at_us=again_at_us, bindings=(*stops, *after))
    free = [
        declared - seen.running if declared is not None else PLENTY,
        machine_max - seen.running_there if machine_max is not None else PLENTY,
        affordable if over is None else PLENTY,
    ]
    bindings = (*((over,) if over is not None else ()), *after)
    return Gate(
        most=min(free),
        only_critical=closed is not None,
        reason=bindings[0].reason if bindings else "",
        again_at_us=bindings[0].again_at_us if bindings else None,
        blocks_budget=over is not None,
        bindings=bindings,
    )


def look(
    conn: Connection,
    *,
    orchestrator: str,
    machine: str = "",
    sessions_max: int | None = None,
    rules: Rules,
    now_us: int,
) -> Gate:
    """What is let through at `now_us`. Who claims by it takes `hold` before."""
    own = rules.of(orchestrator)
    held = holds.find(conn, orchestrator)
    machine_max = rules.sessions_on.get(machine)
    if not held and own == NO_RULES and machine_max is None and sessions_max is None:
        return Gate()
    running = 0
    if own.budget is not None or own.sessions_max is not None or sessions_max is not None:
        running = _count(conn, _RUNNING_OF, of=orchestrator)
    spent, budget_again_at_us = NOTHING, None
    if own.budget is not None:
        by_day, by_hour = own.budget.usd_per_day is not None, own.budget.tokens_per_hour is not None
        spent = spending.spent(conn, orchestrator, now_us, day=by_day, hour=by_hour)
        if _affordable(own.budget, Seen(running=running, spent=spent)) <= 0:
            budget_again_at_us = _affordable_at(conn, orchestrator, own.budget, spent, running=running, now_us=now_us)
    seen = Seen(
        holds=held,
        running=running,
        running_there=_count(conn, _RUNNING_ON, on=machine) if machine_max is not None else 0,
        spent=spent,
        budget_again_at_us=budget_again_at_us,
    )
    return decide(
        rules=own, seen=seen, machine=machine, machine_max=machine_max, sessions_max=sessions_max, now_us=now_us
    )


def claims_of(orchestrator: str) -> str:
    """The lock that claims for an orchestrator take, where a count of what runs binds them."""
    return f"claim:{orchestrator}"


def hold(conn: Connection, asks: Iterable[Ask]) -> None:
    """Let nobody else claim for these orchestrators, or on these machines, where a count of what runs binds.

    For all who are served in one transaction, at once: so nobody waits for each other in a circle.
    """
    names = set()
    for ask in asks:
        own = ask.rules.of(ask.orchestrator)
        if own.sessions_max is not None or own.budget is not None or ask.sessions_max is not None:
            names.add(claims_of(ask.orchestrator))
        if ask.machine in ask.rules.sessions_on:
            names.add(f"machine:{ask.machine}")
    locks.hold(conn, *sorted(names))


def _count(conn: Connection, query: Statement, **values: str) -> int:
    ((count,),) = query.rows(conn, values)
    return int(count)


def _held(hold: Hold) -> Binding:
    until = "" if hold.until_us is None else f" until {to_rfc3339(hold.until_us)}"
    why = f": {hold.reason}" if hold.reason else ""
    what = f"paused by {hold.by}" if hold.kind == "pause" else "its quota is spent"
    return Binding(kind=hold.kind, reason=f"{what}{until}{why}", again_at_us=hold.until_us)


def _affordable(budget: Budget, seen: Seen) -> int:
    """How many may begin until what is spent and what runs reach the budget; 0 or less when they have."""
    most = PLENTY
    for limit, used, mean in _windows(budget, seen.spent):
        if used + seen.running * mean >= limit:
            return 0
        if mean * PLENTY > limit - used:
            most = min(most, math.ceil((limit - used) / mean) - seen.running)
    return most


def _blocks(budget: Budget, spent: Spent) -> bool:
    """Whether what would begin is to be approved. What runs may use less than the average: that is waited for."""
    return budget.on_breach == "escalate" and any(used >= limit for limit, used, _ in _windows(budget, spent))


def _windows(budget: Budget, spent: Spent) -> Iterable[tuple[float, float, float]]:
    """(what is allowed, what is used, what one more will use) of each declared window."""
    if budget.usd_per_day is not None:
        yield budget.usd_per_day, spent.usd_24h, spent.mean_usd
    if budget.tokens_per_hour is not None:
        yield budget.tokens_per_hour, spent.tokens_1h, spent.mean_tokens


def _over_budget(budget: Budget, seen: Seen) -> Binding:
    said = []
    if budget.usd_per_day is not None:
        used = seen.spent.usd_24h
        said.append(f"{used:.2f} of {budget.usd_per_day:g} dollars in 24 hours")
    if budget.tokens_per_hour is not None:
        said.append(f"{seen.spent.tokens_1h} of {budget.tokens_per_hour} tokens in an hour")
    running = f", and {seen.running} more running" if seen.running else ""
    return Binding(
        kind="budget",
        reason=f"its budget is spent: {', '.join(said)}{running}",
        again_at_us=seen.budget_again_at_us,
    )


def _affordable_at(
    conn: Connection, orchestrator: str, budget: Budget, spent: Spent, *, running: int, now_us: int
) -> int:
    moments = [now_us]
    if budget.usd_per_day is not None:
        over = spent.usd_24h + running * spent.mean_usd - budget.usd_per_day
        if over >= 0:
            moments.append(spending.usd_frees_at(conn, orchestrator, over=over, now_us=now_us))
    if budget.tokens_per_hour is not None:
        over = spent.tokens_1h + running * spent.mean_tokens - budget.tokens_per_hour
        if over >= 0:
            moments.append(spending.tokens_free_at(conn, orchestrator, over=over, now_us=now_us))
    return max(moments)


def _closed(hours_: Hours, now_us: int) -> Binding | None:
    opens_us = hours.opens_at(hours_.windows, timezone=hours_.timezone, now_us=now_us)
    if opens_us == now_us:
        return None
    until = "" if opens_us is None else f" until {to_rfc3339(opens_us)}"
    text = f"outside its working hours{until} ({hours_.text}, {hours_.timezone}); only CRITICAL tasks begin"
    return Binding(kind="schedule", reason=text, again_at_us=opens_us)
