"""Routing again: what nobody has, what belongs to nobody declared, and, when the rules changed, what has not started.

    ids = astray(conn, dispatch, rules_changed=...)       which tasks may belong elsewhere now
    again(conn, ids[:BATCH], dispatch=..., now_us=...)     those that still do are moved, each with its event

A task that an attempt was made of stays where it is, and so does one that names its orchestrator, that a person
assigned or an orchestrator passed on, and one that no rule takes any more: somebody has it, which is better than
nobody. Only when its orchestrator is not declared any more does any task that waits move.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import counters, outbox
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.tasks import rows, transitions, view
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.routing import NAMED, Decision
from orchestrator_fleet.tasks.task import TaskRow
from orchestrator_fleet.tasks.transitions import Change

BATCH = 200  # tasks that one transaction moves: some 30 ms
ROUTED_BY = "routed_by"

_WAITS = tasks.c.status.in_(("TODO", "BLOCKED"))
_OWNERS = sa.select(tasks.c.orchestrator).where(_WAITS, tasks.c.orchestrator.is_not(None)).distinct()
_NOBODYS = sa.select(tasks.c.id).where(_WAITS, tasks.c.orchestrator.is_(None))
_OF = sa.select(tasks.c.id).where(_WAITS, tasks.c.orchestrator.in_(sa.bindparam("owners", expanding=True)))
_ROUTED = sa.select(tasks.c.id).where(
    _WAITS,
    tasks.c.orchestrator.is_not(None),
    tasks.c.attempt == 0,
    tasks.c.route.not_in(sorted(NAMED)),
)


def are_settled(conn: Connection, dispatch: Dispatch) -> bool:
    """Whether all tasks were looked at since these rules came into force."""
    return counters.get(conn, ROUTED_BY) == dispatch.fingerprint


def settle(conn: Connection, dispatch: Dispatch) -> None:
    """Keep that all tasks were looked at under these rules."""
    counters.put(conn, ROUTED_BY, dispatch.fingerprint)


def astray(conn: Connection, dispatch: Dispatch, *, rules_changed: bool) -> list[str]:
    """Ids of the tasks that wait and may belong elsewhere, oldest first.

    Those that nobody has, those of orchestrators that are not declared, and, when the `rules_changed`, those that a
    rule has routed and no attempt was made of.
    """
    found = set(conn.execute(_NOBODYS).scalars())
    gone = [name for (name,) in conn.execute(_OWNERS) if not dispatch.knows(name)]
    if gone:
        found.update(conn.execute(_OF, {"owners": gone}).scalars())
    if rules_changed:
        found.update(conn.execute(_ROUTED).scalars())
    return sorted(found)


def again(
    conn: Connection, task_ids: Sequence[str], *, dispatch: Dispatch, now_us: int, actor: str = "system"
) -> list[TaskRow]:
    """Route tasks again that wait; answers those that found somebody else, or that nobody has any more."""
    moved, told = list[tuple[TaskRow, Change]](), list[tuple[str | None, str]]()
    for task in rows.get_all_to_change(conn, task_ids).values():
        if task.status not in ("TODO", "BLOCKED"):
            continue
        gone = task.orchestrator is not None and not dispatch.knows(task.orchestrator)
        if task.orchestrator is not None and not gone and not _may_move(task):
            continue
        fields = {**view.to_json(task), "orchestrator": None, "route": None}
        decision = dispatch.decide(conn, fields, now_us=now_us, with_=None if gone else task.orchestrator)
        if decision.orchestrator is None and not gone:
            continue
        if (decision.orchestrator, decision.rule) == (task.orchestrator, task.route):
            continue
        moved.append((task, _moved(task, decision)))
        why = f"{task.orchestrator} is no longer declared; {decision.reason}" if gone else decision.reason
        told.append((task.orchestrator, why))
    after = rows.apply_all(conn, moved, now_us=now_us)
    outbox.append(
        conn,
        *(
            rows.event(
                "task_routed",
                task,
                actor=actor,
                now_us=now_us,
                reason=why,
                **{"from": before, "to": task.orchestrator, "route": task.route},
            )
            for task, (before, why) in zip(after, told, strict=True)
        ),
    )
    return after


def _may_move(task: TaskRow) -> bool:
    """Whether another rule may take it from its orchestrator, who is there: see the top."""
    waits = task.status == "TODO" or task.blocked_reason == "dependency"
    return waits and task.attempt == 0 and task.route is not None and task.route not in NAMED


def _moved(task: TaskRow, decision: Decision) -> Change:
    condition = task.condition if task.status == "BLOCKED" else decision.condition
    return transitions.edited(orchestrator=decision.orchestrator, route=decision.rule, condition=condition)
