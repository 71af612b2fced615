"""Handing a task over: another orchestrator has it from now on, with what is known of it, and a memory of that.

    begin ──▶ pending     a daemon runs a session of it: its attempt is released, the task held, the session told to
                 │        stop; and then its daemon says that it is gone, or STOP_S have passed
    begin ──▶ complete ──▶ accepted ──▶ done | expired        as a delegation; see `passing`
                 └───────▶ expired                            a person took the held task another way first

`complete` is one transaction: ownership, context, memory, notices. A pending row is the intent: whichever control plane
finds it completes it, and doing it twice does it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.memory.write import remember
from orchestrator_fleet.orchestrators import coordination, passing
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.tasks import life, rows, transitions
from orchestrator_fleet.tasks.routing import HANDED_OFF
from orchestrator_fleet.tasks.task import TaskRow

STOP_S = 15.0  # a daemon gives a session 5 s to end before it kills it
MAX_CONTEXT_BYTES = 64_000
IMPORTANCE = 0.7


def begin(
    conn: Connection,
    *,
    task_id: str,
    source: str,
    target: str,
    notes: str | None,
    context: dict[str, Any],
    completion: int | None,
    actor: str,
    now_us: int,
    wrong: Sequence[tuple[str, str]] = (),
) -> tuple[Coordination, TaskRow]:
    """Hand a task of `source` over to `target`, at once where no daemon runs a session of it.

    Else it is `pending` until `complete` is called. What is refused, and how `wrong` is told: see `passing.check`.
    """
    wrong = [*wrong, *_too_big(context)]
    passed = passing.check(conn, task_id=task_id, source=source, target=target, wrong=wrong, now_us=now_us)
    passing.pass_on(conn, passed, target=target, actor=actor, now_us=now_us)
    asked: dict[str, Any] = {
        "kind": "handoff",
        "source": source,
        "target": target,
        "hop": passed.hop,
        "note": notes,
        "actor": actor,
        "now_us": now_us,
        "data": {"context": context, "completion": completion, "transcript": _transcript(passed.task)},
    }
    if passed.task.status == "IN_PROGRESS" and passed.task.machine:
        return _stop(conn, passed.task, asked)
    # Released first if it runs (for a client over HTTP, whom nothing can tell); one that waits for something waits on.
    why = _why(source, target)
    task = life.assign(
        conn, task_id=task_id, orchestrator=target, reason=why, route=HANDED_OFF, actor=actor, now_us=now_us
    ).task
    one = coordination.ask(conn, task, **asked, state="accepted", tell_source=True)
    _remember(conn, one, task, now_us=now_us)
    return one, task


def complete(conn: Connection, of: str, *, now_us: int, stopped: bool) -> tuple[Coordination, TaskRow]:
    """Finish what is pending: the session is gone (`stopped`), or was waited for long enough.

    What is not pending any more, or no longer held, is answered as it is.
    """
    task = rows.get_to_change(conn, coordination.find(conn, of).task)
    task, chain = passing.settle(conn, task, coordination.of_task(conn, task.id), now_us=now_us)
    one = next(link for link in chain if link.id == of)
    if not passing.is_under_way(one):
        return one, task
    task = _give(conn, one, task, now_us=now_us)
    reason = None if stopped else f"its session did not say within {STOP_S:g} s that it has ended"
    one = coordination.move(conn, one, "accepted", task, reason=reason, actor=one.actor, now_us=now_us)
    _remember(conn, one, task, now_us=now_us)
    return one, task


def carried(one: Coordination) -> dict[str, Any]:
    """What the target's sessions are told of it, as `handoff` in their task."""
    about = {name: one.data.get(name) for name in ("context", "completion", "transcript")}
    return {"id": one.id, "from": one.source, "notes": one.note, **about}


def _stop(conn: Connection, task: TaskRow, asked: dict[str, Any]) -> tuple[Coordination, TaskRow]:
    """The first step: take the attempt from its session, and hold the task until that has ended."""
    actor, now_us = asked["actor"], asked["now_us"]
    why = passing.holding(asked["source"], asked["target"])
    held = life.block(conn, task_id=task.id, blocked_reason="manual", reason=why, actor=actor, now_us=now_us).task
    until_us = now_us + round(STOP_S * SECOND_US)
    return coordination.ask(conn, held, **asked, expires_at_us=until_us), held


def _give(conn: Connection, one: Coordination, task: TaskRow, *, now_us: int) -> TaskRow:
    """Let the held task go, to its new owner."""
    values = {**passing.let_go(conn, task, now_us=now_us).values, "orchestrator": one.target, "route": HANDED_OFF}
    after = rows.apply(conn, task, transitions.Change(values), now_us=now_us)
    rows.tell(conn, "task_routed", after, actor=one.actor, now_us=now_us, reason=_why(one.source, one.target))
    return after


def _why(source: str, target: str | None) -> str:
    return f"handed over to {target} by {source}"


def _remember(conn: Connection, one: Coordination, task: TaskRow, *, now_us: int) -> None:
    """Let the target remember what it was told, in words that a search finds."""
    said = [f"{one.source} handed over: {task.title}"]
    if one.data.get("completion") is not None:
        said.append(f"Completion: {one.data['completion']} %")
    if one.note:
        said.append(one.note)
    if one.data.get("context"):
        said.append(f"Context: {msgspec.json.encode(one.data['context']).decode()}")
    transcript = one.data.get("transcript")
    about = {"handoff": one.id, "from": one.source, "completion": one.data.get("completion"), "transcript": transcript}
    remember(
        conn,
        orchestrator=one.target or "",
        tier="semantic",
        text="\n".join(said),
        source=f"handoff:{one.id}",
        importance=IMPORTANCE,
        task=task.id,
        attempt=transcript["attempt"] if transcript else None,
        metadata=about,
        actor=one.actor,
        now_us=now_us,
    )


def _transcript(task: TaskRow) -> dict[str, Any] | None:
    """Where to read what the last session did; None when there was none."""
    if not task.attempt:
        return None
    return {
        "machine": task.machine or None,
        "attempt": task.attempt,
        "session": f"{task.id}.{task.attempt}",
        "log": f"/api/tasks/{task.id}/log?attempt={task.attempt}",
    }


def _too_big(context: dict[str, Any]) -> list[tuple[str, str]]:
    size = len(msgspec.json.encode(context))
    if size <= MAX_CONTEXT_BYTES:
        return []
    return [
        ("context", f"got {size} bytes as JSON, wanted at most {MAX_CONTEXT_BYTES}; put it into a file, and name it")
    ]
