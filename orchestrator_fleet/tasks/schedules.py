"""Recurring tasks: which moments of a cron line have come, and the tasks that are made for them, once each.

    schedules_of(spec) ▶ upcoming (when is each due?) ▶ fire (one transaction each) ▶ upcoming ...

The row of a schedule says up to when its clock was followed; it only moves forward, so a clock that jumps back fires
nothing twice, one that jumps forward is caught up with, and of several control planes one fires. A schedule that is
declared anew, or with another cron line, starts at that moment: nothing is caught up with from before.

The wall's clock of the schedule's zone decides, as in Debian's cron. A fixed time that spring's gap skips comes right
after the gap; one that autumn repeats comes the first time. A line whose minute or hour begins with `*` goes by real
time: every quarter of an hour stays that, through both.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from cronsim import CronSim, CronSimError
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US, from_datetime, to_rfc3339
from orchestrator_fleet.errors import TaskError
from orchestrator_fleet.store import counters, locks, outbox
from orchestrator_fleet.store.schema import schedules, tasks
from orchestrator_fleet.tasks import change
from orchestrator_fleet.tasks.create import create_task
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.task import FINAL, NewTask, TaskRow

MAX_CAUGHT_UP = 100  # tasks that catch_up: all makes of one schedule at once; the newest
MAX_COUNTED = 10_000
ON_TIME_US = 60 * SECOND_US  # later than that, a moment was missed

# How far back to look for the newest moments, before looking through all: a minute's line has thousands a week.
_BACK_US = tuple(days * 86_400 * SECOND_US for days in (1, 31, 366))

_ROW = sa.select(schedules).where(schedules.c.name == sa.bindparam("key"))
_ROWS = sa.select(schedules.c.name, schedules.c.until_us)
# Held, so that one that is open is so still when it is replaced.
_STATUS = sa.select(tasks.c.status).where(tasks.c.id == sa.bindparam("key")).with_for_update()
_INSERT = schedules.insert()
_UPDATE = schedules.update().where(schedules.c.name == sa.bindparam("key"))
_FORGET = schedules.delete().where(schedules.c.name == sa.bindparam("key"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A recurring task, as declared."""

    name: str
    cron: str
    timezone: str
    new: NewTask
    overlap: Literal["skip", "queue", "replace"]
    catch_up: Literal["none", "last", "all"]

    @property
    def actor(self) -> str:
        """Who makes its tasks."""
        return f"schedule:{self.name}"

    @property
    def fingerprint(self) -> int:
        """Another number when it goes by another clock."""
        digest = hashlib.sha256(f"{self.cron}\0{self.timezone}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 2 or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """Moments that have come, oldest first, and how many more there were before them (at most MAX_COUNTED)."""

    at_us: tuple[int, ...] = ()
    dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do about moments that have come: one task for each of `make`; `passed` moments get none, `why` says."""

    make: tuple[int, ...]
    passed: int
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """What came of a schedule's turn: the tasks made, and when it is due next (None: never)."""

    made: tuple[TaskRow, ...]
    next_us: int | None


def schedules_of(spec: Mapping[str, Any]) -> tuple[Schedule, ...]:
    """The schedules of the spec as JSON (`ControlDoc.spec`), by name."""
    return tuple(_schedule(name, fields) for name, fields in sorted((spec.get("schedules") or {}).items()))


def next_us(cron: str, timezone: str, *, after_us: int) -> int | None:
    """The first moment after `after_us`; None when none comes within 50 years. ValueError on a wrong line or zone."""
    return next(_moments(cron, timezone, after_us), None)


def due(cron: str, timezone: str, *, after_us: int, until_us: int, limit: int) -> Due:
    """The newest `limit` moments after `after_us` and not after `until_us`. ValueError on a wrong line or zone."""
    found: deque[int] = deque(maxlen=limit)
    for back_us in (*_BACK_US, until_us - after_us):
        start_us = max(after_us, until_us - back_us)
        found.clear()
        found.extend(_until(until_us, _moments(cron, timezone, start_us)))
        if len(found) == limit or start_us == after_us:
            break
    if not found:
        return Due()
    dropped = 0
    for _ in _until(found[0] - 1, _moments(cron, timezone, after_us)):
        dropped += 1
        if dropped == MAX_COUNTED:
            break
    return Due(at_us=tuple(found), dropped=dropped)


def decide(come: Due, *, catch_up: Literal["none", "last", "all"], overlap: str, now_us: int) -> Plan:
    """Which of the moments that have come get a task. `come` has the newest MAX_CAUGHT_UP of them."""
    many = len(come.at_us) + come.dropped
    if catch_up == "all" and overlap != "replace":
        more = " or more" if come.dropped == MAX_COUNTED else ""
        why = f"{come.dropped}{more} older moments have passed; at most {MAX_CAUGHT_UP} are caught up with"
        return Plan(make=come.at_us, passed=come.dropped, why=why if come.dropped else "")
    newest = come.at_us[-1:]
    if catch_up == "none" and newest and newest[0] < now_us - ON_TIME_US:
        return Plan(make=(), passed=many, why=f"nobody was there at {to_rfc3339(newest[0])}; catch_up is none")
    why = f"{many - 1} older moments have passed; catch_up is {catch_up}"
    if catch_up == "all":
        why = f"{many - 1} older moments have passed; each would replace the one before"
    return Plan(make=newest, passed=max(0, many - 1), why=why if many > 1 else "")


def upcoming(conn: Connection, declared: Iterable[Schedule], *, now_us: int) -> dict[str, int | ValueError | None]:
    """When each is due next: now for one that is new, None for never; ValueError for one that can't be read."""
    until = {row.name: row.until_us for row in conn.execute(_ROWS)}
    found: dict[str, int | ValueError | None] = {}
    for schedule in declared:
        known = schedule.name in until and counters.get(conn, _clock(schedule.name)) == schedule.fingerprint
        try:
            moment = next_us(schedule.cron, schedule.timezone, after_us=until[schedule.name] if known else now_us)
        except ValueError as wrong:
            found[schedule.name] = wrong
        else:
            found[schedule.name] = moment if known else now_us
    return found


def forget(conn: Connection, declared: Iterable[Schedule]) -> None:
    """Drop the rows of schedules that are not declared any more: one that comes back starts anew."""
    names = {schedule.name for schedule in declared}
    for name, _ in conn.execute(_ROWS).all():
        if name not in names:
            conn.execute(_FORGET, {"key": name})


def fire(conn: Connection, *, schedule: Schedule, dispatch: Dispatch, now_us: int) -> Fired:
    """Make the tasks whose moments have come since somebody last looked. ValueError on a wrong line or zone.

    A task that can't be made is told in an event, and its moment has passed.
    """
    locks.hold(conn, f"schedule:{schedule.name}")
    row = conn.execute(_ROW, {"key": schedule.name}).one_or_none()
    last_task = None if row is None else row.last_task
    if row is None or counters.get(conn, _clock(schedule.name)) != schedule.fingerprint:
        following_us = next_us(schedule.cron, schedule.timezone, after_us=now_us)
        _keep(conn, schedule, until_us=now_us, last_task=last_task, new=row is None)
        counters.put(conn, _clock(schedule.name), schedule.fingerprint)
        return Fired(made=(), next_us=following_us)
    until_us: int = row.until_us
    if now_us > until_us:
        come = due(schedule.cron, schedule.timezone, after_us=until_us, until_us=now_us, limit=MAX_CAUGHT_UP)
        if come.at_us:
            until_us = now_us
            made, last_task = _make(conn, schedule, come, last_task, dispatch=dispatch, now_us=now_us)
            _keep(conn, schedule, until_us=now_us, last_task=last_task, new=False)
            return Fired(made=made, next_us=next_us(schedule.cron, schedule.timezone, after_us=until_us))
    return Fired(made=(), next_us=next_us(schedule.cron, schedule.timezone, after_us=until_us))


def _make(
    conn: Connection, schedule: Schedule, come: Due, last_task: str | None, *, dispatch: Dispatch, now_us: int
) -> tuple[tuple[TaskRow, ...], str | None]:
    """(the tasks made, the newest task of the schedule)."""
    plan = decide(come, catch_up=schedule.catch_up, overlap=schedule.overlap, now_us=now_us)
    if plan.passed:
        at_us = come.at_us[-1] if not plan.make else plan.make[0]
        _tell(conn, schedule, "schedule_skipped", at_us=at_us, now_us=now_us, reason=plan.why, passed=plan.passed)
    made = []
    for at_us in plan.make:
        open_one = last_task if _is_open(conn, last_task) else None
        if open_one is not None and schedule.overlap == "skip":
            why = f"{open_one} is still open; overlap is skip"
            _tell(conn, schedule, "schedule_skipped", at_us=at_us, now_us=now_us, reason=why, passed=1)
            continue
        try:
            task = create_task(conn, new=schedule.new, dispatch=dispatch, actor=schedule.actor, now_us=now_us)
        except TaskError as refused:
            why = f"its task can't be made: {refused}"
            _tell(conn, schedule, "schedule_skipped", at_us=at_us, now_us=now_us, reason=why, passed=1)
            continue
        replaced = open_one if schedule.overlap == "replace" else None
        if replaced is not None:
            reason = f"{task.id} of schedule {schedule.name} replaces it"
            change.cancel(conn, task_id=replaced, reason=reason, actor=schedule.actor, now_us=now_us)
        _tell(conn, schedule, "schedule_fired", at_us=at_us, now_us=now_us, made=task.id, replaced=replaced)
        made.append(task)
        last_task = task.id
    return tuple(made), last_task


def _is_open(conn: Connection, task_id: str | None) -> bool:
    status = None if task_id is None else conn.execute(_STATUS, {"key": task_id}).scalar()
    return status is not None and status not in FINAL


def _keep(conn: Connection, schedule: Schedule, *, until_us: int, last_task: str | None, new: bool) -> None:
    values = {"until_us": until_us, "last_task": last_task}
    if new:
        conn.execute(_INSERT, {"name": schedule.name, **values})
    else:
        conn.execute(_UPDATE, {"key": schedule.name, **values})


def _tell(conn: Connection, schedule: Schedule, kind: str, *, at_us: int, now_us: int, **data: Any) -> None:
    known = {"schedule": schedule.name, "due_at": to_rfc3339(at_us), **data}
    data = {name: value for name, value in known.items() if value is not None}
    outbox.append(conn, outbox.Event(at_us=now_us, kind=kind, actor=schedule.actor, data=data))


def _until(until_us: int, moments: Iterator[int]) -> Iterator[int]:
    for at_us in moments:
        if at_us > until_us:
            return
        yield at_us


def _moments(cron: str, timezone: str, after_us: int) -> Iterator[int]:
    """The moments after `after_us`, each once."""
    last_us = after_us
    start = datetime.fromtimestamp(after_us // SECOND_US, _zone(timezone))
    try:
        line = CronSim(cron, start)
    except CronSimError as wrong:
        raise ValueError(f"cron {cron!r}: {wrong}") from None
    for moment in line:
        # Fixed times are found on the wall's clock, which autumn turns back and spring makes jump over several.
        at_us = from_datetime(moment)
        if at_us > last_us:
            last_us = at_us
            yield at_us


def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, KeyError) as wrong:
        raise ValueError(f"timezone {name!r}: {wrong}") from None


def _clock(name: str) -> str:
    return f"schedule:{name}"


def _schedule(name: str, fields: Mapping[str, Any]) -> Schedule:
    task = fields["task"]
    known: Sequence[str] = ("title", "description", "priority", "orchestrator", "discipline", "metadata")
    new = NewTask(**{key: task[key] for key in known if task.get(key) is not None}, tags=tuple(task.get("tags") or ()))
    return Schedule(
        name=name,
        cron=fields["cron"],
        timezone=fields.get("timezone") or "UTC",
        new=new,
        overlap=fields.get("overlap") or "skip",
        catch_up=fields.get("catch_up") or "last",
    )
