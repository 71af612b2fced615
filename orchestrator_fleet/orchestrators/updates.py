"""What an orchestrator says of its work to whoever listens: status updates, kept and told as events.

They change no status: that is observed (see `presence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Invalid, NotFound
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import status_updates
from orchestrator_fleet.tasks import rows
from orchestrator_fleet.tasks.task import TaskRow

_INSERT = status_updates.insert()
_NEWEST = (
    sa.select(status_updates)
    .where(status_updates.c.orchestrator == sa.bindparam("of"), status_updates.c.seq < sa.bindparam("before"))
    .order_by(status_updates.c.seq.desc())
    .limit(sa.bindparam("most"))
)
NEWEST = (1 << 63) - 1
"""A seq that is after every update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update. `at_us` is microseconds since 1970; `channel` is where it is to be told, too."""

    seq: int
    id: str
    orchestrator: str
    kind: str
    message: str
    task: str | None
    channel: str | None
    actor: str
    at_us: int


def post(
    conn: Connection,
    *,
    orchestrator: str,
    kind: str,
    message: str,
    task: str | None,
    channel: str | None,
    actor: str,
    now_us: int,
) -> Update:
    """Keep an update and tell it; raises Invalid when the task is not there, or not the orchestrator's."""
    about = None if task is None else _its_own(conn, orchestrator, task)
    values: dict[str, Any] = {
        "id": ids.new_id("upd", now_us),
        "orchestrator": orchestrator,
        "kind": kind,
        "message": message,
        "task": task,
        "channel": channel,
        "actor": actor,
        "at_us": now_us,
    }
    (seq,) = conn.execute(_INSERT, values).inserted_primary_key or (0,)
    update = Update(seq=seq, **values)
    told = to_json(update)
    if about is None:
        outbox.append(
            conn,
            Event(at_us=now_us, kind="status_posted", actor=actor, orchestrator=orchestrator, data={"update": told}),
        )
    else:
        rows.tell(conn, "status_posted", about, actor=actor, now_us=now_us, update=told)
    return update


def newest(conn: Connection, orchestrator: str, *, before: int = NEWEST, limit: int) -> Sequence[Update]:
    """Its updates, newest first, from behind the one `before` (a seq) on."""
    asked = {"of": orchestrator, "before": before, "most": limit}
    return [Update(**row) for row in conn.execute(_NEWEST, asked).mappings()]


def to_json(update: Update) -> dict[str, Any]:
    """As the API and the update's event show it."""
    return {
        "id": update.id,
        "orchestrator": update.orchestrator,
        "kind": update.kind,
        "message": update.message,
        "task": update.task,
        "channel": update.channel,
        "by": update.actor,
        "at": to_rfc3339(update.at_us),
    }


def _its_own(conn: Connection, orchestrator: str, task_id: str) -> TaskRow:
    """The task, held, so that the event's picture of it is as new as its place among the events."""
    try:
        task = rows.get_to_change(conn, task_id)
    except NotFound as problem:
        raise Invalid([("task", str(problem))]) from None
    if task.orchestrator != orchestrator:
        owner = f"it is {task.orchestrator}'s" if task.orchestrator else "it is nobody's"
        raise Invalid([("task", f"{task_id} is not {orchestrator}'s task: {owner}")])
    return task
