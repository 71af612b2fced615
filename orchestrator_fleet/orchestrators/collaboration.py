"""Asking others for a part of a task: each gets a child task, and what comes of it comes back.

    vp-a's task ──┬──▶ child of vp-b ── DONE ──────▶ collaboration_answered ─┐
                  └──▶ child of vp-c ── CANCELLED ─▶ collaboration_answered ─┴─▶ collaboration_gathered

The task stays its owner's. `advise`: it goes on meanwhile. `split`: it depends on the children, so it is
BLOCKED/dependency until all have ended, and a cancelled one blocks it with the words that dependencies have for that.

    collaborate   the children, and a coordination for each
    gather        what became of the children is written down, and told
    results       what the next session of the task is given
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, NotFound
from orchestrator_fleet.orchestrators import coordination, escalation
from orchestrator_fleet.orchestrators.coordination import Coordination, State
from orchestrator_fleet.store.schema import COORDINATION_OPEN, coordinations, tasks
from orchestrator_fleet.tasks import change, create, dependencies, rows
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.task import FINAL, MAX_ERROR_CHARS, Changed, NewTask, TaskRow

Mode = Literal["advise", "split"]

MAX_HOPS = 5
MAX_ANCESTORS = 100
MAX_ANSWERS = 50
MAX_ANSWERS_BYTES = 256 << 10  # of results that travel together: a session gets them with its task, in one frame
MAX_TITLE_CHARS = 500
MAX_DESCRIPTION_CHARS = 100_000
MAX_WRONG = 50
MAX_NAME_SHOWN = 100
BATCH = 50
KIND: Final = "collaboration"
SYSTEM = "system"

_TITLES: Mapping[Mode, str] = {"advise": "Advise on: ", "split": "Part of: "}
_ASKS: Mapping[Mode, str] = {
    "advise": "asks for your advice on a task of its own",
    "split": "asks you for your part of a task of its own, which waits for it",
}
_OPEN = sa.text(COORDINATION_OPEN)
_children = tasks.alias("children")
_ENDED = _children.c.status.in_(sorted(FINAL))
_DUE = (
    sa.select(coordinations.c.id, coordinations.c.task)
    .join(_children, _children.c.id == coordinations.c.child)
    .where(
        coordinations.c.kind == KIND,
        _OPEN,
        sa.or_(_ENDED, sa.and_(coordinations.c.state == "pending", _children.c.attempt > 0)),
    )
    .order_by(coordinations.c.id)
    .limit(sa.bindparam("most"))
)
_OF_TASK = sa.select(coordinations).where(coordinations.c.task == sa.bindparam("of"), coordinations.c.kind == KIND)
_OF_BATCH = _OF_TASK.where(coordinations.c.batch == sa.bindparam("batch"))
_NEWEST = _OF_TASK.order_by(coordinations.c.created_at_us.desc(), coordinations.c.id.desc()).limit(MAX_ANSWERS)
# The index of children is of those alone that have one.
_OF_CHILD = sa.select(coordinations).where(
    coordinations.c.child == sa.bindparam("of"), sa.text("child IS NOT NULL"), coordinations.c.kind == KIND
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked of whom. `roles`: by collaborator."""

    collaborators: Sequence[str]
    roles: Mapping[str, str]
    note: str
    mode: Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Collaboration:
    """What `collaborate` did: a coordination for each, in the asked order; the task, and its attempt if that ended."""

    id: str
    asked: Sequence[Coordination]
    changed: Changed


def collaborate(
    conn: Connection, *, source: str, task_id: str, wanted: Wanted, dispatch: Dispatch, actor: str, now_us: int
) -> Collaboration:
    """Make a child task for each collaborator; with mode split the task waits for them, and one that runs is released.

    Invalid with all that is wrong with the request; Conflict as `escalation.refuse`, and `hop_limit`,
    `collaboration_cycle`.
    """
    if wanted.mode == "split":
        dependencies.hold_edges(conn)
    task = _named(conn, task_id, source=source, wanted=wanted, dispatch=dispatch)
    escalation.refuse(conn, task, source)
    above = list(_above(conn, task))
    _refuse_too_deep(task, above)
    _refuse_circle(conn, task, above, wanted)
    changed = Changed(task=task)
    if wanted.mode == "split" and task.status == "IN_PROGRESS":
        why = f"split among {', '.join(wanted.collaborators)}"
        changed = change.release(conn, task_id=task.id, reason=why, actor=actor, now_us=now_us)
    children = [
        create.create_task(
            conn, new=_child(task, name, source=source, wanted=wanted), dispatch=dispatch, actor=actor, now_us=now_us
        )
        for name in wanted.collaborators
    ]
    if wanted.mode == "split":
        waits_for = {"depends_on": [*task.depends_on, *(child.id for child in children)]}
        after = change.update_task(conn, task_id=task.id, fields=waits_for, version=None, actor=actor, now_us=now_us)
        changed = replace(changed, task=after)
    batch = ids.new_id("batch", now_us)
    asked = [
        coordination.ask(
            conn,
            changed.task,
            kind=KIND,
            source=source,
            target=child.orchestrator,
            child=child.id,
            hop=len(above) + 1,
            note=wanted.note or None,
            actor=actor,
            now_us=now_us,
            data={
                "batch": batch,
                "part": part,
                "parts": len(children),
                "mode": wanted.mode,
                "role": wanted.roles.get(child.orchestrator or ""),
            },
            batch=batch,
        )
        for part, child in enumerate(children, 1)
    ]
    return Collaboration(id=batch, asked=asked, changed=changed)


def state_of(one: Coordination, child: TaskRow) -> State:
    """What a collaboration has come to, seen from its child, though nobody has written it down yet. Pure."""
    if not one.is_open:
        return one.state
    match child.status:
        case "DONE":
            return "done"
        case "CANCELLED":
            return "expired"
    return "accepted" if child.attempt > 0 else one.state


def look(conn: Connection, ones: Sequence[Coordination]) -> list[Coordination]:
    """The same coordinations as they are by now, whatever is written down yet; those of other kinds as they are."""
    children = rows.get_all(conn, [one.child for one in ones if one.kind == KIND and one.is_open and one.child])
    return [_as_of(conn, one, children) for one in ones]


def gather(conn: Connection, *, now_us: int, limit: int = BATCH) -> int:
    """Write down, and tell, what became of children; how many of at most `limit` moved.

    Run again it finds nothing; two at once do each once.
    """
    due = conn.execute(_DUE, {"most": limit}).all()
    if not due:
        return 0
    parents = rows.get_all_to_change(conn, sorted({task for _, task in due}))
    # Read again, now that nobody else can move them. Children are only read: who ends one holds it, then its parent.
    ones = coordination.some(conn, [one for one, _ in due])
    children = rows.get_all(conn, [one.child for one in ones if one.child])
    moved = 0
    for one in ones:
        if one.task in parents and one.child in children:
            moved += _settle(conn, one, parents[one.task], children[one.child], now_us=now_us)
    return moved


def any_due(conn: Connection) -> bool:
    """Whether `gather` would find anything."""
    return conn.execute(_DUE, {"most": 1}).first() is not None


def reject(conn: Connection, one: Coordination, *, reason: str, actor: str, now_us: int) -> Coordination:
    """The collaborator says no: the child is cancelled, and who asked is told. Conflict `not_open` when it is over."""
    child = rows.get_to_change(conn, one.child or "")
    if child.status not in FINAL:
        child = change.cancel(conn, task_id=child.id, reason=reason or None, actor=actor, now_us=now_us).task
    parent = rows.get_to_change(conn, one.task)
    one = coordination.find(conn, one.id)
    after = coordination.move(conn, one, "rejected", parent, reason=reason or None, actor=actor, now_us=now_us)
    _tell_answer(conn, after, parent, child, actor=actor, now_us=now_us)
    return after


def accept(conn: Connection, one: Coordination, *, reason: str, actor: str, now_us: int) -> Coordination:
    """The collaborator says yes, before its session begins. Conflict `not_open` when it is over."""
    parent = rows.get_to_change(conn, one.task)
    one = coordination.find(conn, one.id)
    return coordination.move(conn, one, "accepted", parent, reason=reason or None, actor=actor, now_us=now_us)


def results(conn: Connection, task_id: str) -> list[dict[str, Any]]:
    """What collaborators answered, for the task's next session: of the MAX_ANSWERS that were asked last.

    Those asked last come first, and in the order in which they were asked. There are at most MAX_ANSWERS_BYTES of
    results: one that does not fit stands as `result_bytes` alone, and the child itself has it. Whoever claims the task
    in the moment in which its last part ends gets them too: what is not written down yet is seen from the children.
    """
    asked = coordination.read(conn, _NEWEST, of=task_id)
    children = rows.get_all(conn, [one.child for one in asked if one.child])
    answered = [one for one in (_as_of(conn, one, children) for one in asked) if not one.is_open]
    answered.sort(key=lambda one: (-one.created_at_us, one.batch, one.data["part"]))
    return _answers(conn, answered, children)


def _named(conn: Connection, task_id: str, *, source: str, wanted: Wanted, dispatch: Dispatch) -> TaskRow:
    """The task, held; Invalid with all that is wrong with what was named."""
    wrong, task = list(_wrong(source, wanted, dispatch)), None
    try:
        task = rows.get_to_change(conn, task_id)
    except NotFound as missing:
        wrong.insert(0, ("task", str(missing)))
    if task is None or wrong:
        raise Invalid(wrong[:MAX_WRONG])
    return task


def _wrong(source: str, wanted: Wanted, dispatch: Dispatch) -> Iterator[tuple[str, str]]:
    seen = set[str]()
    for number, name in enumerate(wanted.collaborators):
        field = f"with[{number}]"
        if name == source:
            yield field, f"{source} has the task itself; name others"
        elif name in seen:
            yield field, f"{name} is named twice; once is enough"
        elif not dispatch.knows(name):
            yield field, f"there is no orchestrator {name}"
        seen.add(name)
    for name in wanted.roles:
        if name not in seen:
            shown = name[:MAX_NAME_SHOWN]
            yield f"roles.{shown}", f"{shown} is not among `with`; add it there, or leave its role out"


def _above(conn: Connection, task: TaskRow) -> Iterator[Coordination]:
    """What the task is a part of, and that of, and so on. A retried child is a part like the one it was made from."""
    parent, seen = task.parent, task.id
    for _ in range(MAX_ANCESTORS):
        found = coordination.read(conn, _OF_CHILD, of=seen)
        if found:
            yield found[0]
        if parent is None:
            return
        try:
            row = rows.get(conn, parent)
        except NotFound:
            return  # it was purged
        parent, seen = row.parent, row.id


def _refuse_too_deep(task: TaskRow, above: Sequence[Coordination]) -> None:
    if len(above) >= MAX_HOPS:
        path = " -> ".join(one.task for one in reversed(above))
        raise Conflict(
            "hop_limit",
            f"{task.id}: it is a part of a part {len(above)} deep ({path} -> {task.id}), which is the limit; do it"
            " yourself, or escalate it",
        )


def _refuse_circle(conn: Connection, task: TaskRow, above: Sequence[Coordination], wanted: Wanted) -> None:
    """Nobody is asked for a part of what he himself waits for."""
    waiting = [one for one in above if one.data.get("mode") == "split"]
    there = rows.get_all(conn, [one.task for one in waiting])
    for one in waiting:
        parent = there.get(one.task)
        if parent is not None and parent.status not in FINAL and parent.orchestrator in wanted.collaborators:
            raise Conflict(
                "collaboration_cycle",
                f"{task.id}: {parent.orchestrator} waits for it with {parent.id}, so it can't be asked for a part of"
                " it; name another",
            )


def _child(task: TaskRow, name: str, *, source: str, wanted: Wanted) -> NewTask:
    role = wanted.roles.get(name)
    head = [
        f"{source} {_ASKS[wanted.mode]} ({task.id}).",
        f"Your role: {role}" if role else "",
        wanted.note,
        f"The task: {task.title}",
        task.description,
    ]
    return NewTask(
        title=f"{_TITLES[wanted.mode]}{task.title}"[:MAX_TITLE_CHARS],
        description="\n\n".join(part for part in head if part)[:MAX_DESCRIPTION_CHARS],
        priority=task.priority,
        orchestrator=name,
        parent=task.id,
        metadata={"collaboration": {"of": task.id, "role": role, "mode": wanted.mode}},
    )


def _settle(conn: Connection, one: Coordination, parent: TaskRow, child: TaskRow, *, now_us: int) -> bool:
    """Write down what became of a child; whether that was news."""
    state = state_of(one, child)
    if state == one.state:
        return False
    reason = _cancelled_because(conn, child)
    after = coordination.move(conn, one, state, parent, reason=reason, actor=SYSTEM, now_us=now_us)
    if not after.is_open:
        _tell_answer(conn, after, parent, child, actor=SYSTEM, now_us=now_us)
    return True


def _tell_answer(
    conn: Connection, one: Coordination, parent: TaskRow, child: TaskRow, *, actor: str, now_us: int
) -> None:
    """One has answered; with the last of those asked together, all of it is told. The parent is held."""
    (answer,) = _answers(conn, [one], {child.id: child})
    rows.tell(conn, "collaboration_answered", parent, actor=actor, now_us=now_us, batch=one.batch, **answer)
    asked = sorted(
        coordination.read(conn, _OF_BATCH, of=parent.id, batch=one.batch), key=lambda other: other.data["part"]
    )
    if any(other.is_open for other in asked):
        return
    gathered = _answers(conn, asked, rows.get_all(conn, [other.child for other in asked if other.child]))
    rows.tell(
        conn,
        "collaboration_gathered",
        parent,
        actor=actor,
        now_us=now_us,
        batch=one.batch,
        mode=one.data.get("mode"),
        results=gathered,
    )


def _answers(conn: Connection, ones: Sequence[Coordination], children: Mapping[str, TaskRow]) -> list[dict[str, Any]]:
    """What each has answered, as long as there is room for it."""
    room, told = MAX_ANSWERS_BYTES, []
    for one in ones:
        child = children.get(one.child or "")
        answer: dict[str, Any] = {
            "from": one.target,
            "child": one.child,
            "role": one.data.get("role"),
            "mode": one.data.get("mode"),
            "state": one.state,
            "at": to_rfc3339(one.updated_at_us),
        }
        if one.state != "done":
            why = one.reason or (None if child is None else _cancelled_because(conn, child))
            answer["error"] = why or "the child task was cancelled"
        elif child is not None and child.result is not None:
            size = len(msgspec.json.encode(child.result))
            if size <= room:
                room -= size
                answer["result"] = child.result
            else:
                answer["result_bytes"] = size
        else:
            answer["result"] = None
        told.append(answer)
    return told


def _as_of(conn: Connection, one: Coordination, children: Mapping[str, TaskRow]) -> Coordination:
    """As it is by now; one whose child is not among these is as it is written."""
    child = children.get(one.child or "")
    state = one.state if child is None else state_of(one, child)
    if child is None or state == one.state:
        return one
    ended_us = child.completed_at_us or one.updated_at_us
    return replace(one, state=state, reason=_cancelled_because(conn, child), updated_at_us=ended_us)


def _cancelled_because(conn: Connection, child: TaskRow) -> str | None:
    """Why a child was cancelled, if it was."""
    if child.status != "CANCELLED":
        return None
    because = coordination.cancelled_because(conn, child)
    return f"{child.id} was cancelled{f': {because}' if because else ''}"[:MAX_ERROR_CHARS]
