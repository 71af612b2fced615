"""The claim: from TODO in the line to IN_PROGRESS under a token, in one transaction.

One index is the line (see `line`), so a claim reads exactly the rows it takes. Many who ask at once are served
together: the line is read once for all who want the same orchestrator's tasks, and everything is written in three
statements. Whatever binds a claim stands in `gate` (may this orchestrator begin anything?) and `limits` (may this task
run beside those that do?).
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.schema import CLAIMABLE, tasks
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import attempts, gate, limits, ripen, rows, transitions
from orchestrator_fleet.tasks.gate import Gate
from orchestrator_fleet.tasks.rules import ANYTHING_GOES, Rules
from orchestrator_fleet.tasks.task import Ask, Claimed, Grant, TaskRow

MAX_CLAIM = 50
MAX_LOOKS = 10
LOOK = 100
NO_WORK = "no task is ready"
LONG_LINE = "the first tasks of the line wait at full limits; asking again looks at the next"

_OPEN = (
    sa.select(*rows.COLUMNS)
    .where(tasks.c.orchestrator == sa.bindparam("orchestrator"), sa.text(CLAIMABLE))
    .order_by(tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(skip_locked=True)
)
# Only CRITICAL tasks begin in class 0; others may have aged into it.
_CRITICAL = sa.text("rank = 0 AND priority = 'CRITICAL'")
_LINES = {
    # (only CRITICAL, only what was approved past the budget)
    (False, False): Statement(_OPEN),
    (True, False): Statement(_OPEN.where(_CRITICAL)),
    (False, True): Statement(_OPEN.where(tasks.c.over_budget)),
    (True, True): Statement(_OPEN.where(_CRITICAL, tasks.c.over_budget)),
}


def claim(
    conn: Connection,
    *,
    orchestrator: str,
    machine: str,
    holder: str,
    limit: int,
    lease_s: float,
    sessions_max: int | None,
    generation: str | None,
    charter_version: str | None,
    actor: str,
    now_us: int,
    rules: Rules = ANYTHING_GOES,
) -> list[Grant]:
    """What one Ask gets; [] when there is nothing, or something binds."""
    ask = Ask(
        orchestrator=orchestrator,
        machine=machine,
        holder=holder,
        limit=limit,
        lease_s=lease_s,
        sessions_max=sessions_max,
        generation=generation,
        charter_version=charter_version,
        actor=actor,
        now_us=now_us,
        rules=rules,
    )
    (claimed,) = claim_all(conn, [ask])
    return list(claimed.grants)


def claim_all(conn: Connection, asks: Sequence[Ask]) -> list[Claimed]:
    """Serve all who ask, in their order; of one task's line nobody gets what another got.

    Each gets up to its `limit`, at most MAX_CLAIM.
    """
    ripen.ripen(conn, now_us=max(ask.now_us for ask in asks))
    gate.hold(conn, asks)
    lines: dict[tuple[object, ...], list[int]] = {}
    for number, ask in enumerate(asks):
        lines.setdefault((ask.orchestrator, ask.machine, ask.sessions_max, id(ask.rules)), []).append(number)
    answers = [Claimed()] * len(asks)
    # In one order for everybody, as the rows are held together.
    for numbers in lines.values() if len(lines) == 1 else (lines[key] for key in sorted(lines, key=str)):
        served = _serve(conn, [asks[number] for number in numbers])
        for number, answer in zip(numbers, served, strict=True):
            answers[number] = answer
    return answers


def _serve(conn: Connection, asks: Sequence[Ask]) -> list[Claimed]:
    """Asks of one orchestrator on one machine under the same rules."""
    first, now_us = asks[0], max(ask.now_us for ask in asks)
    through = gate.look(
        conn,
        orchestrator=first.orchestrator,
        machine=first.machine,
        sessions_max=first.sessions_max,
        rules=first.rules,
        now_us=now_us,
    )
    numbers = [number for number, ask in enumerate(asks) for _ in range(min(ask.limit, MAX_CLAIM))][: through.most]
    taken, more = _take(conn, [asks[number] for number in numbers], through=through, now_us=now_us)
    grants: list[list[Grant]] = [[] for _ in asks]
    for number, task in zip(numbers, taken, strict=False):
        grants[number].append(_grant(task))
    if all(grants):
        nothing = Claimed()
    elif more:
        nothing = Claimed(reason=LONG_LINE, again_at_us=now_us)
    else:
        nothing = _nothing(conn, first, through, now_us=now_us)
    return [Claimed(grants=tuple(got)) if got else nothing for got in grants]


def _take(conn: Connection, places: Sequence[Ask], *, through: Gate, now_us: int) -> tuple[list[TaskRow], bool]:
    """Claim a task for each place, in the line's order, as far as there are any that may begin.

    Also whether the line goes on behind the last that was looked at.
    """
    if not places:
        return [], False
    if through.blocks_budget:
        _block(conn, places, through, now_us=now_us)
    line = _LINES[through.only_critical, through.blocks_budget]
    rules, orchestrator = places[0].rules, places[0].orchestrator
    taken: list[TaskRow] = []
    for look in range(MAX_LOOKS if rules.limits else 1):
        wanted = len(places) - len(taken)
        # Nearly always the first of the line have room; where not, look at more at once.
        most = max(wanted, LOOK) if look else wanted
        found = [TaskRow(*row) for row in line.rows(conn, {"orchestrator": orchestrator, "most": most})]
        sorted_out = limits.sort_out(conn, found, rules=rules, most=wanted, now_us=now_us)
        taken += _begin(conn, places[len(taken) :], sorted_out.taken, now_us=now_us)
        left = len(places) - len(taken)
        if left == 0 or not rules.limits:
            return taken, False
        if len(found) < most and not limits.call_up_for(conn, orchestrator, rules=rules, most=left, now_us=now_us):
            return taken, False
    return taken, True


def _block(conn: Connection, places: Sequence[Ask], through: Gate, *, now_us: int) -> None:
    """Its budget is spent: what would begin now waits for somebody who approves it, or for the budget's window."""
    found = _LINES[through.only_critical, False].rows(
        conn, {"orchestrator": places[0].orchestrator, "most": len(places)}
    )
    over = [task for task in (TaskRow(*row) for row in found) if not task.over_budget]
    changes = [(task, transitions.waits_for_budget(task, through.again_at_us, through.reason)) for task in over]
    waiting = rows.apply_all(conn, changes, now_us=now_us)
    outbox.append(
        conn,
        *(rows.event("task_blocked", task, actor="system", now_us=now_us, reason=task.condition) for task in waiting),
    )


def _begin(
    conn: Connection,
    places: Sequence[Ask],
    found: Sequence[tuple[TaskRow, list[list[str]] | None]],
    *,
    now_us: int,
) -> list[TaskRow]:
    """Begin an attempt of each, with its event."""
    if not found:
        return []
    begun = list(zip(places, found, strict=False))
    changes = [
        (
            task,
            transitions.claimed(
                task,
                token=ids.new_token(),
                lease_until_us=now_us + round(ask.lease_s * SECOND_US),
                machine=ask.machine,
                generation=ask.generation,
                charter_version=ask.charter_version,
                counts_on=counts_on,
                now_us=now_us,
            ),
        )
        for ask, (task, counts_on) in begun
    ]
    taken = rows.apply_all(conn, changes, now_us=now_us)
    asked = [ask for ask, _ in begun]
    attempts.begin(conn, [(task, ask.holder) for ask, task in zip(asked, taken, strict=True)], now_us=now_us)
    outbox.append(
        conn,
        *(
            rows.event("task_claimed", task, actor=ask.actor, now_us=now_us)
            for ask, task in zip(asked, taken, strict=True)
        ),
    )
    return taken


def _nothing(conn: Connection, ask: Ask, through: Gate, *, now_us: int) -> Claimed:
    """Why there is nothing (more), and when time alone may change that."""
    moments = [
        through.again_at_us,
        ripen.next_available(conn, ask.orchestrator),
        limits.next_opening(conn, ask.orchestrator, ask.rules, now_us),
    ]
    parked_at = limits.where_parked(conn, ask.orchestrator) if ask.rules.limits and not through.reason else None
    reason = NO_WORK if parked_at is None else f"what is left in line waits at a full limit: {parked_at}"
    return Claimed(
        reason=through.reason or reason, again_at_us=min((at for at in moments if at is not None), default=None)
    )


def _grant(task: TaskRow) -> Grant:
    assert task.token is not None  # noqa: S101 (a claimed task has both; the schema holds it)
    assert task.lease_until_us is not None  # noqa: S101 (as above)
    return Grant(task=task, token=task.token, attempt=task.attempt, lease_until_us=task.lease_until_us)
