"""Asking above: a task waits until somebody up the ladder approves, rejects or unblocks it.

    escalate   the task is BLOCKED/escalation, and the first of the ladder is asked
    climb      who has not answered in time is passed over, and the next is asked; what was decided is written down

The ladder of an orchestrator is its `escalate_to`, in order; behind an orchestrator that comes last, that one's own; at
its end stands any person. A person has no time-out: whoever is asked there is asked until somebody decides. It is
looked up anew at each step, so that it is the one in force.

What ends an escalation is what ends the task's wait (`tasks.change`), whoever does it: nothing here is in the way of
that, and `climb` reads who it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import Conflict, Invalid, NotFound
from orchestrator_fleet.orchestrators import coordination
from orchestrator_fleet.orchestrators.coordination import HUMAN, Coordination, State
from orchestrator_fleet.spec.units import format_duration, parse_duration
from orchestrator_fleet.store.schema import COORDINATION_OPEN, coordinations, events, tasks
from orchestrator_fleet.tasks import change, rows, transitions
from orchestrator_fleet.tasks.task import FINAL, MAX_ERROR_CHARS, Changed, Priority, TaskRow

MAX_LEVELS = 5
BATCH = 100
DEFAULT_TIMEOUT_S = 900.0
KIND: Final = "escalation"
SYSTEM = "system"

Declared = Mapping[str, Mapping[str, Any]]

# What ends a task's wait: what that is to who asked, and the word for it.
_ANSWERS: Mapping[str, tuple[State, str]] = {
    "task_approved": ("accepted", "approved"),
    "task_unblocked": ("accepted", "unblocked"),
    "task_rejected": ("rejected", "rejected"),
    "task_cancelled": ("expired", "cancelled"),
}
_WAITS = sa.and_(tasks.c.status == "BLOCKED", tasks.c.blocked_reason == KIND)
_OPEN = sa.text(COORDINATION_OPEN)
_IS_DUE = sa.or_(
    sa.and_(
        coordinations.c.state == "pending",
        sa.or_(sa.not_(_WAITS), coordinations.c.expires_at_us <= sa.bindparam("now")),
    ),
    sa.and_(coordinations.c.state == "accepted", tasks.c.status.in_(sorted(FINAL))),
)
_DUE = (
    sa.select(coordinations.c.id, coordinations.c.task)
    .join(tasks, tasks.c.id == coordinations.c.task)
    .where(coordinations.c.kind == KIND, _OPEN, _IS_DUE)
    .order_by(coordinations.c.id)
    .limit(sa.bindparam("most"))
)
_NEXT = sa.select(sa.func.min(coordinations.c.expires_at_us)).where(coordinations.c.kind == KIND, _OPEN)
_OF_TASK = sa.select(coordinations).where(coordinations.c.task == sa.bindparam("of"), coordinations.c.kind == KIND)
_HOW_MANY = sa.select(sa.func.count()).select_from(coordinations).where(coordinations.c.task == sa.bindparam("of"))
# Not by the index of open ones, which are many where a task has few.
_OPEN_OF_TASK = _OF_TASK.where(coordinations.c.state.in_(("accepted", "pending"))).order_by(coordinations.c.id)
_LEVELS = _OF_TASK.where(coordinations.c.batch == sa.bindparam("batch")).order_by(coordinations.c.hop)
_ASKED_NOW = _OF_TASK.where(coordinations.c.state == "pending").order_by(coordinations.c.hop.desc()).limit(1)
_ASKED_AT = (
    sa.select(sa.func.max(events.c.seq))
    .where(events.c.task == sa.bindparam("of"), events.c.kind == f"{KIND}_pending")
    .scalar_subquery()
)
_DECIDED = (
    sa.select(events.c.kind, events.c.actor, events.c.data)
    .where(events.c.task == sa.bindparam("of"), events.c.kind.in_(sorted(_ANSWERS)), events.c.seq > _ASKED_AT)
    .order_by(events.c.seq)
    .limit(1)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Somebody to ask: an orchestrator, `human:<name>` or, None, any person; and for how long (None: until decided)."""

    target: str | None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What ended a task's wait: the event's kind (a key of _ANSWERS), who it was, and the reason given."""

    kind: str
    actor: str
    reason: str | None


ANYBODY = Level(target=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalated:
    """What `escalate` did: the first level, and the task, with the attempt that was ended for it."""

    asked: Coordination
    changed: Changed


def ladder(declared: Declared, source: str, *, first: str | None = None) -> tuple[Level, ...]:
    """Whom `source` asks, in order; beginning with `first`, where one is named. Never empty, and nobody twice. Pure."""
    way = list(_climbing(declared, source, seen={source}))
    if first is not None:
        names = [level.target for level in way]
        if first in names:
            way = way[names.index(first) :]
        elif first.startswith(HUMAN):
            way = [Level(target=first)]
        else:
            begin = Level(target=first, timeout_s=_timeout_s(declared, source))
            way = [begin, *_climbing(declared, first, seen={source, first})]
    way = way[:MAX_LEVELS]
    return tuple(way) if way and way[-1].timeout_s is None else (*way, ANYBODY)


def above(declared: Declared, source: str, asked: Sequence[str | None]) -> Level:
    """Whom to ask after all of these, by what is declared now. Pure."""
    if len(asked) >= MAX_LEVELS or asked[-1] is None:
        return ANYBODY
    way = ladder(declared, source, first=asked[0])
    names = [level.target for level in way]
    behind = way[names.index(asked[-1]) + 1 :] if asked[-1] in names else ladder(declared, asked[-1])
    return next((level for level in behind if level.target not in {source, *asked}), ANYBODY)


def became(one: Coordination, task: TaskRow, answer: Answer | None) -> tuple[State, str | None, str]:
    """What has become of an escalation though nobody has written it down yet: (state, reason, by whom). Pure.

    `answer` is what ended its task's wait, if that has ended.
    """
    if one.state == "pending" and not _waits(task):
        if answer is None:
            return ("expired" if task.status == "CANCELLED" else "accepted"), None, SYSTEM
        state, word = _ANSWERS[answer.kind]
        said = f": {answer.reason}" if answer.reason else ""
        return state, f"{word} by {answer.actor}{said}"[:MAX_ERROR_CHARS], answer.actor
    if one.state == "accepted" and task.status in FINAL:
        return ("done", None, SYSTEM) if task.status == "DONE" else ("expired", "the task was cancelled", SYSTEM)
    return one.state, one.reason, one.actor


def look(conn: Connection, ones: Sequence[Coordination]) -> list[Coordination]:
    """The same coordinations as they are by now, whatever is written down yet; those of other kinds as they are."""
    there = rows.get_all(conn, [one.task for one in ones if one.kind == KIND and one.is_open])
    return [_as_of(conn, one, there[one.task]) if one.kind == KIND and one.task in there else one for one in ones]


def escalate(
    conn: Connection,
    *,
    source: str,
    task_id: str,
    reason: str,
    severity: Priority | None,
    to: str | None,
    declared: Declared,
    actor: str,
    now_us: int,
) -> Escalated:
    """TODO or IN_PROGRESS -> BLOCKED/escalation, and ask the first level.

    Invalid on an unknown task or target; Conflict as `refuse`; InvalidTransition where the task is BLOCKED already.
    """
    task = _named(conn, task_id, source=source, to=to, declared=declared)
    refuse(conn, task, source)
    for one in coordination.read(conn, _OPEN_OF_TASK, of=task.id):
        _settle(conn, one, task, now_us=now_us)
    level = ladder(declared, source, first=to)[0]
    changed = change.block(
        conn, task_id=task.id, blocked_reason=KIND, reason=_condition(level, reason), actor=actor, now_us=now_us
    )
    data = {"level": 1, "severity": severity or task.priority}
    asked = _ask(conn, changed.task, level, source=source, why=reason, data=data, actor=actor, now_us=now_us)
    return Escalated(asked=asked, changed=changed)


def climb(conn: Connection, *, declared: Declared, now_us: int, limit: int = BATCH) -> int:
    """Write down what was decided, and ask on where nobody answered in time; how many of at most `limit` moved.

    Run again it finds nothing; two at once do each once.
    """
    due = conn.execute(_DUE, {"now": now_us, "most": limit}).all()
    if not due:
        return 0
    held = rows.get_all_to_change(conn, sorted({task for _, task in due}))
    # Read again, now that nobody else can move them.
    moved = 0
    for one in coordination.some(conn, [one for one, _ in due]):
        task = held.get(one.task)
        if task is None or not one.is_open:
            continue
        if _settle(conn, one, task, now_us=now_us):
            moved += 1
        elif one.state == "pending" and one.expires_at_us is not None and one.expires_at_us <= now_us:
            held[task.id] = _pass_over(conn, one, task, declared=declared, now_us=now_us)
            moved += 1
    return moved


def any_due(conn: Connection, *, now_us: int) -> bool:
    """Whether `climb` would find anything."""
    return conn.execute(_DUE, {"now": now_us, "most": 1}).first() is not None


def next_at(conn: Connection) -> int | None:
    """When the first who is asked now is passed over (microseconds); None while nobody is who has a time-out."""
    at_us: int | None = conn.execute(_NEXT).scalar()
    return at_us


def may_decide(conn: Connection, task_id: str, orchestrator: str) -> bool:
    """Whether `orchestrator` is asked now, so that its own key may approve, reject or unblock the task.

    Holds the task until the end of the transaction, so that nobody else is asked before that.
    """
    try:
        task = rows.get_to_change(conn, task_id)
    except NotFound:
        return False
    asked = coordination.read(conn, _ASKED_NOW, of=task.id)
    return _waits(task) and bool(asked) and asked[0].target == orchestrator


def refuse(conn: Connection, task: TaskRow, source: str) -> None:
    """Conflict `final`, `not_owner` or `too_many` unless `source` may ask for help with the task."""
    if task.status in FINAL:
        raise Conflict("final", f"{task.id}: it is {task.status}, which is final; retry it to get a new one")
    if task.orchestrator != source:
        whose = f"{task.orchestrator}'s" if task.orchestrator else "nobody's"
        raise Conflict("not_owner", f"{task.id}: it is {whose}, not {source}'s; only its owner asks for help with it")
    many = conn.execute(_HOW_MANY, {"of": task.id}).scalar_one()
    if many >= coordination.MAX_OF_A_TASK:
        raise Conflict("too_many", f"{task.id}: others were asked {many} times for it; that must be enough")


def _climbing(declared: Declared, source: str, *, seen: set[str]) -> Iterator[Level]:
    """All the way up from `source`, past those that are not declared (any more), to the first person."""
    owner: str | None = source
    while owner is not None:
        listed, timeout_s = declared.get(owner, {}).get("escalate_to") or (), _timeout_s(declared, owner)
        owner = None
        for target in listed:
            if target.startswith(HUMAN):
                yield Level(target=target)
                return
            if target in declared and target not in seen:
                seen.add(target)
                owner = target
                yield Level(target=target, timeout_s=timeout_s)


def _timeout_s(declared: Declared, owner: str) -> float:
    written = declared.get(owner, {}).get("escalation_timeout", DEFAULT_TIMEOUT_S)
    return parse_duration(written) if isinstance(written, str) else float(written)


def _named(conn: Connection, task_id: str, *, source: str, to: str | None, declared: Declared) -> TaskRow:
    """The task, held; Invalid with all that is wrong with what was named."""
    wrong, task = [], None
    try:
        task = rows.get_to_change(conn, task_id)
    except NotFound as missing:
        wrong.append(("task", str(missing)))
    if to == source:
        wrong.append(("to", f"{source} can't escalate to itself; name another, or leave it out"))
    elif to is not None and not to.startswith(HUMAN) and to not in declared:
        wrong.append(("to", f"there is no orchestrator {to}; name one, or human:<name>"))
    if task is None or wrong:
        raise Invalid(wrong)
    return task


def _waits(task: TaskRow) -> bool:
    return task.status == "BLOCKED" and task.blocked_reason == KIND


def _condition(level: Level, reason: str) -> str:
    return f"{level.target or 'any person'} is asked: {reason}"[:MAX_ERROR_CHARS]


def _ask(
    conn: Connection,
    task: TaskRow,
    level: Level,
    *,
    source: str,
    why: str,
    data: dict[str, Any],
    actor: str,
    now_us: int,
    batch: str | None = None,
) -> Coordination:
    until_us = None if level.timeout_s is None else now_us + round(level.timeout_s * SECOND_US)
    asked = coordination.ask(
        conn,
        task,
        kind="escalation",
        source=source,
        target=level.target,
        hop=data["level"],
        note=why,
        actor=actor,
        now_us=now_us,
        data=data,
        batch=batch,
        expires_at_us=until_us,
        reason=why,
        tell_source=batch is None,
    )
    if level.target is None or level.target.startswith(HUMAN):
        rows.tell(
            conn,
            "approval_wanted",
            task,
            actor=actor,
            now_us=now_us,
            who=level.target,
            reason=why,
            coordination=coordination.to_json(asked),
        )
    return asked


def _pass_over(conn: Connection, one: Coordination, task: TaskRow, *, declared: Declared, now_us: int) -> TaskRow:
    """Nobody answered in time: ask the next; answers the task after it."""
    asked = [before.target for before in coordination.read(conn, _LEVELS, of=task.id, batch=one.batch)]
    level, why = above(declared, one.source, asked), one.note or ""
    after = rows.apply(conn, task, transitions.edited(condition=_condition(level, why)), now_us=now_us)
    waited = format_duration(round(((one.expires_at_us or now_us) - one.created_at_us) / SECOND_US, 3))
    silent = f"{one.target} did not answer in {waited}; {level.target or 'any person'} is asked now"
    coordination.move(conn, one, "expired", after, reason=silent, actor=SYSTEM, now_us=now_us)
    data = {**one.data, "level": one.hop + 1}
    _ask(conn, after, level, source=one.source, why=why, data=data, actor=SYSTEM, now_us=now_us, batch=one.batch)
    return after


def _settle(conn: Connection, one: Coordination, task: TaskRow, *, now_us: int) -> bool:
    """Write down what has become of an escalation, in the name of who decided; whether it moved."""
    state, reason, actor = became(one, task, _answer(conn, one, task))
    if state == one.state:
        return False
    coordination.move(conn, one, state, task, reason=reason, actor=actor, now_us=now_us)
    return True


def _as_of(conn: Connection, one: Coordination, task: TaskRow) -> Coordination:
    state, reason, _ = became(one, task, _answer(conn, one, task))
    return one if state == one.state else replace(one, state=state, reason=reason)


def _answer(conn: Connection, one: Coordination, task: TaskRow) -> Answer | None:
    """What ended the task's wait since somebody was asked last."""
    if one.state != "pending" or _waits(task):
        return None
    found = conn.execute(_DECIDED, {"of": task.id}).first()
    return None if found is None else Answer(kind=found.kind, actor=found.actor, reason=found.data.get("reason"))
