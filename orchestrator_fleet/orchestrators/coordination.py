"""What one orchestrator asks of another, or of a person, about a task: a state machine each.

              ┌─────────────────────────▶ rejected   the target says no
    pending ──┼──▶ accepted ─────────┬──▶ done       the task (or the child) has ended
              └──────────────────────┴──▶ expired    nobody answered in time, or it moved on another way

Every move is one transaction with what it does to the task, and both sides are told. The four kinds differ in what a
move means: see `delegation`, `handoff`, `escalation`, `collaboration`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, NotFound
from orchestrator_fleet.orchestrators import notices
from orchestrator_fleet.store.schema import COORDINATION_OPEN, coordinations, events, tasks
from orchestrator_fleet.tasks import rows
from orchestrator_fleet.tasks.task import TaskRow

Kind = Literal["delegation", "escalation", "handoff", "collaboration"]
State = Literal["pending", "accepted", "rejected", "done", "expired"]

LEGAL: Mapping[State, frozenset[State]] = {
    "pending": frozenset({"accepted", "rejected", "done", "expired"}),
    "accepted": frozenset({"rejected", "done", "expired"}),
    "rejected": frozenset(),
    "done": frozenset(),
    "expired": frozenset(),
}
MAX_OF_A_TASK = 1_000
PREFIX: Mapping[Kind, str] = {"delegation": "dlg", "escalation": "esc", "handoff": "hof", "collaboration": "col"}
HUMAN = "human:"

_INSERT = coordinations.insert()
_MARK = tasks.update().where(tasks.c.id == sa.bindparam("of")).values(coordinated=True)
_ONE = sa.select(coordinations).where(coordinations.c.id == sa.bindparam("of"))
_OF_TASK = (
    sa.select(coordinations)
    .where(coordinations.c.task == sa.bindparam("of"))
    .order_by(coordinations.c.created_at_us.desc(), coordinations.c.id.desc())
    .limit(MAX_OF_A_TASK)
)
_OF_TASKS = (
    sa.select(coordinations)
    .where(coordinations.c.task.in_(sa.bindparam("of", expanding=True)))
    .order_by(coordinations.c.task, coordinations.c.created_at_us, coordinations.c.id)
)
_OPEN = (
    sa.select(coordinations)
    .where(coordinations.c.kind == sa.bindparam("of"), coordinations.c.id > sa.bindparam("after"))
    .where(sa.text(COORDINATION_OPEN))
    .order_by(coordinations.c.id)
    .limit(sa.bindparam("most"))
)
_SOME = (
    sa.select(coordinations)
    .where(coordinations.c.id.in_(sa.bindparam("of", expanding=True)))
    .order_by(coordinations.c.id)
)
_CANCELLED_BECAUSE = (
    sa.select(events.c.data)
    .where(events.c.task == sa.bindparam("of"), sa.text("task IS NOT NULL"))
    .where(events.c.kind.in_(("task_cancelled", "task_rejected")))
    .order_by(events.c.seq.desc())
    .limit(1)
)
_MOVE = (
    coordinations.update()
    .where(coordinations.c.id == sa.bindparam("of"), coordinations.c.state == sa.bindparam("seen"))
    .values(
        state=sa.bindparam("to"),
        reason=sa.bindparam("why"),
        updated_at_us=sa.bindparam("now"),
        expires_at_us=sa.bindparam("until"),
        data=sa.bindparam("about"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordination:
    """A row of the table. Times are microseconds since 1970; see the table's own remarks."""

    id: str
    kind: Kind
    state: State
    batch: str
    task: str
    source: str
    target: str | None
    child: str | None
    hop: int
    since_attempt: int
    note: str | None
    data: dict[str, Any]
    actor: str
    created_at_us: int
    updated_at_us: int
    expires_at_us: int | None
    reason: str | None

    @property
    def is_open(self) -> bool:
        """Whether anything may still come of it."""
        return bool(LEGAL[self.state])


def ask(
    conn: Connection,
    task: TaskRow,
    *,
    kind: Kind,
    source: str,
    target: str | None,
    hop: int,
    note: str | None,
    actor: str,
    now_us: int,
    data: dict[str, Any] | None = None,
    state: State = "pending",
    child: str | None = None,
    batch: str | None = None,
    expires_at_us: int | None = None,
    tell_source: bool = False,
    reason: str | None = None,
) -> Coordination:
    """Write a new one, with its event on the task (as it is after the change), and tell the target.

    `tell_source`: where somebody else may have asked in its name.
    """
    new_id = ids.new_id(PREFIX[kind], now_us)
    one = Coordination(
        id=new_id,
        kind=kind,
        state=state,
        batch=batch or new_id,
        task=task.id,
        source=source,
        target=target,
        child=child,
        hop=hop,
        since_attempt=task.attempt,
        note=note,
        data=data or {},
        actor=actor,
        created_at_us=now_us,
        updated_at_us=now_us,
        expires_at_us=expires_at_us,
        reason=reason,
    )
    conn.execute(_INSERT, _values(one))
    if not task.coordinated:
        # No change of the task, as others see it: its version stays.
        conn.execute(_MARK, {"of": task.id})
    rows.tell(conn, f"{kind}_{state}", task, actor=actor, now_us=now_us, reason=reason, coordination=to_json(one))
    _tell(conn, one, told=(source, target) if tell_source else (target,), actor=actor, now_us=now_us)
    return one


def move(
    conn: Connection,
    one: Coordination,
    to: State,
    task: TaskRow,
    *,
    reason: str | None,
    actor: str,
    now_us: int,
    expires_at_us: int | None = None,
    data: dict[str, Any] | None = None,
) -> Coordination:
    """Take it to another state, with its event, and tell both sides. `data` is what its kind has to add.

    Conflict `not_open` when the table has no such edge, `changed_meanwhile` when somebody was quicker.
    """
    if to not in LEGAL[one.state]:
        raise Conflict("not_open", f"{one.id}: it is {one.state}, so it can't become {to}")
    about = one.data if data is None else {**one.data, **data}
    known = {"of": one.id, "seen": one.state, "now": now_us}
    moved = {**known, "to": to, "why": reason, "until": expires_at_us, "about": about}
    if conn.execute(_MOVE, moved).rowcount != 1:
        raise Conflict("changed_meanwhile", f"{one.id}: changed by somebody else in the meantime; read it again")
    after = replace(one, state=to, reason=reason, updated_at_us=now_us, expires_at_us=expires_at_us, data=about)
    rows.tell(conn, f"{one.kind}_{to}", task, actor=actor, now_us=now_us, reason=reason, coordination=to_json(after))
    _tell(conn, after, told=(one.source, one.target), actor=actor, now_us=now_us)
    return after


def find(conn: Connection, coordination_id: str) -> Coordination:
    """The one with this id; raises NotFound."""
    # PostgreSQL doesn't even look for a text that it could not hold.
    there = "\0" not in coordination_id
    row = conn.execute(_ONE, {"of": coordination_id}).mappings().one_or_none() if there else None
    if row is None:
        raise NotFound(f"there is no coordination {coordination_id[:100]}")
    return Coordination(**row)


def of_task(conn: Connection, task_id: str) -> Sequence[Coordination]:
    """All of a task, oldest first; of more than MAX_OF_A_TASK the newest."""
    return read(conn, _OF_TASK, of=task_id)[::-1]


def of_tasks(conn: Connection, task_ids: Sequence[str]) -> Mapping[str, Sequence[Coordination]]:
    """All of several tasks, by task, oldest first."""
    found: dict[str, list[Coordination]] = {task_id: [] for task_id in task_ids}
    for row in conn.execute(_OF_TASKS, {"of": list(task_ids)}).mappings():
        found[row["task"]].append(Coordination(**row))
    return found


def open_ones(conn: Connection, kind: Kind, *, after: str = "", limit: int) -> Sequence[Coordination]:
    """Open ones of a kind, by id, from the one behind `after` on."""
    return read(conn, _OPEN, of=kind, after=after, most=limit)


def some(conn: Connection, coordination_ids: Sequence[str]) -> Sequence[Coordination]:
    """Those of these that there are, by id."""
    return read(conn, _SOME, of=coordination_ids)


def read(conn: Connection, query: sa.Select[Any], **values: Any) -> list[Coordination]:
    """What a query of the table's rows finds."""
    return [Coordination(**row) for row in conn.execute(query, values).mappings()]


def cancelled_because(conn: Connection, task: TaskRow) -> str | None:
    """The reason that was given for cancelling a task; None for one that was not cancelled, too."""
    if task.status != "CANCELLED":
        return None
    data: dict[str, Any] = conn.execute(_CANCELLED_BECAUSE, {"of": task.id}).scalar() or {}
    because: str | None = data.get("reason") or data.get("error")
    return because


def to_json(one: Coordination) -> dict[str, Any]:
    """As the API, its events and its notices show it; what the kind has beside that stands in it as well."""
    return {
        "id": one.id,
        "kind": one.kind,
        "state": one.state,
        "task": one.task,
        "from": one.source,
        "to": one.target,
        "child": one.child,
        "hop": one.hop,
        "note": one.note,
        "reason": one.reason,
        "by": one.actor,
        "created_at": to_rfc3339(one.created_at_us),
        "updated_at": to_rfc3339(one.updated_at_us),
        "expires_at": None if one.expires_at_us is None else to_rfc3339(one.expires_at_us),
        **one.data,
    }


def _values(one: Coordination) -> dict[str, Any]:
    return {column.name: getattr(one, column.name) for column in coordinations.c}


def _tell(conn: Connection, one: Coordination, *, told: Sequence[str | None], actor: str, now_us: int) -> None:
    for name in dict.fromkeys(told):
        if name is not None and not name.startswith(HUMAN):
            notices.tell(
                conn,
                orchestrator=name,
                kind=f"{one.kind}_{one.state}",
                data=to_json(one),
                actor=actor,
                now_us=now_us,
            )
