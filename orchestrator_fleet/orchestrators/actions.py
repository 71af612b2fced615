"""What people did to orchestrators: a log, and the actions that take their time.

              ┌─▶ done
    running ──┤            drain: its last session has ended; restart: the new process is up
              └─▶ failed   it was activated before that; the process did not come up; the control plane ended

Most are done in the transaction that asks for them, and are written down as ended. A drain is followed by whoever looks
at the store (`settle`); a restart by the control plane that does it, and when that dies by the next (`abandon`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.orchestrators import pause
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import VP_ACTION_OPEN, vp_actions

Kind = Literal["activate", "deactivate", "pause", "resume", "restart", "drain", "stop_sessions"]
Outcome = Literal["done", "failed"]
Shown = Mapping[str, Any]

STARTED, ENDED = "action_started", "action_ended"
PREFIX = "act"
MAX_OPEN = 1_000
MAX_DETAIL_CHARS = 2_000
# Longer than any restart takes, also one that waits for many others at its machine.
ABANDONED_S = 3_600.0
_ABANDONED: tuple[Outcome, str] = ("failed", "the control plane ended")

_OPEN = sa.text(VP_ACTION_OPEN)
_INSERT = vp_actions.insert().returning(vp_actions.c.seq)
_END = (
    vp_actions.update()
    .where(vp_actions.c.id == sa.bindparam("of"), _OPEN)
    .values(outcome=sa.bindparam("how"), detail=sa.bindparam("told"), ended_at_us=sa.bindparam("now"))
)
_ALL_OPEN = sa.select(vp_actions).where(_OPEN).order_by(vp_actions.c.orchestrator, vp_actions.c.seq).limit(MAX_OPEN)
_OPEN_OF = (
    sa.select(vp_actions)
    .where(vp_actions.c.orchestrator.in_(sa.bindparam("names", expanding=True)), _OPEN)
    .order_by(vp_actions.c.seq)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """A row of the log. Times are microseconds since 1970; `outcome` None: it goes on."""

    seq: int = 0
    id: str
    orchestrator: str
    action: Kind
    reason: str | None
    actor: str
    at_us: int
    ended_at_us: int | None = None
    outcome: Outcome | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Newest first; `next_seq` is where the next page begins, None after the last. `total` of all that match."""

    rows: Sequence[Action]
    total: int
    next_seq: int | None


def begin(
    conn: Connection,
    *,
    orchestrator: str,
    action: Kind,
    reason: str | None,
    actor: str,
    now_us: int,
    before: Shown,
    after: Shown | None = None,
    detail: str | None = None,
) -> Action:
    """Write down one that takes its time; Conflict `in_progress` while the same goes on for this orchestrator."""
    check_free(conn, orchestrator, action)
    new = _new(orchestrator=orchestrator, action=action, reason=reason, actor=actor, now_us=now_us, detail=detail)
    written = _written(conn, new)
    _tell(conn, STARTED, written, actor=actor, now_us=now_us, before=before, after=after)
    return written


def note(
    conn: Connection,
    *,
    orchestrator: str,
    action: Kind,
    reason: str | None,
    actor: str,
    now_us: int,
    before: Shown,
    after: Shown,
    detail: str,
) -> Action:
    """Write down one that is done already."""
    new = _new(orchestrator=orchestrator, action=action, reason=reason, actor=actor, now_us=now_us, detail=detail)
    written = _written(conn, replace(new, outcome="done", ended_at_us=now_us))
    _tell(conn, ENDED, written, actor=actor, now_us=now_us, before=before, after=after)
    return written


def end(
    conn: Connection,
    action: Action,
    outcome: Outcome,
    *,
    detail: str,
    actor: str,
    now_us: int,
    before: Shown | None = None,
    after: Shown | None = None,
) -> Action:
    """It goes on no more; as somebody else has ended it, when that was sooner."""
    ended = replace(action, outcome=outcome, detail=detail[:MAX_DETAIL_CHARS], ended_at_us=max(now_us, action.at_us))
    told = {"of": action.id, "how": outcome, "told": ended.detail, "now": ended.ended_at_us}
    if conn.execute(_END, told).rowcount != 1:
        return find(conn, action.id) or ended
    _tell(conn, ENDED, ended, actor=actor, now_us=now_us, before=before, after=after)
    return ended


def check_free(conn: Connection, orchestrator: str, action: Kind) -> None:
    """Raise Conflict `in_progress` while the same goes on for this orchestrator; nobody else begins it meanwhile."""
    locks.hold(conn, f"action:{orchestrator}")
    running = next((one for one in open_of(conn, [orchestrator]) if one.action == action), None)
    if running is not None:
        since = to_rfc3339(running.at_us)
        raise Conflict(
            "in_progress", f"{orchestrator}: {running.id}, a {action} by {running.actor}, goes on since {since}; wait"
        )


def activated(conn: Connection, orchestrator: str, *, actor: str, now_us: int) -> None:
    """It may claim again: what let it run dry has come to nothing."""
    for one in open_of(conn, [orchestrator]):
        if one.action == "drain":
            end(
                conn, one, "failed", detail="it was activated before its last session ended", actor=actor, now_us=now_us
            )


def settle(conn: Connection, *, now_us: int) -> list[Action]:
    """End what has come to its end by itself: drains without a session, or without their pause; answers them.

    And restarts so old that whoever did them must have died.
    """
    return [
        _by_itself(conn, one, *how, now_us=now_us)
        for one in all_open(conn)
        if (how := _over(conn, one, now_us=now_us)) is not None
    ]


def any_to_settle(conn: Connection, *, now_us: int) -> bool:
    """Whether `settle` would end any; for a reader."""
    return any(_over(conn, one, now_us=now_us) is not None for one in all_open(conn))


def abandon(conn: Connection, *, now_us: int) -> list[Action]:
    """End all restarts that go on: nobody else serves this store, and this one does none yet; answers them."""
    left = [one for one in all_open(conn) if one.action == "restart"]
    return [_by_itself(conn, one, *_ABANDONED, now_us=now_us) for one in left]


def _over(conn: Connection, one: Action, *, now_us: int) -> tuple[Outcome, str] | None:
    """How it has ended by itself; None while it goes on."""
    if one.action != "drain":
        return _ABANDONED if now_us - one.at_us >= ABANDONED_S * SECOND_US else None
    if not pause.running(conn, one.orchestrator):
        return "done", "its last session has ended"
    if not pause.is_paused(conn, one.orchestrator, now_us=now_us):
        return "failed", "its pause ended before its last session"
    return None


def find(conn: Connection, action_id: str) -> Action | None:
    """The one with this id."""
    row = conn.execute(sa.select(vp_actions).where(vp_actions.c.id == action_id)).mappings().one_or_none()
    return None if row is None else Action(**row)


def all_open(conn: Connection) -> list[Action]:
    """Those that go on, at most MAX_OPEN."""
    return [Action(**row) for row in conn.execute(_ALL_OPEN).mappings()]


def open_of(conn: Connection, names: Sequence[str]) -> list[Action]:
    """Those of these orchestrators that go on, oldest first."""
    return [Action(**row) for row in conn.execute(_OPEN_OF, {"names": list(names)}).mappings()]


def page(
    conn: Connection, orchestrator: str, *, kinds: Sequence[str] = (), before_seq: int | None = None, limit: int
) -> Page:
    """An orchestrator's log from `before_seq` (not included) back; `kinds` empty: of every kind."""
    wanted = [vp_actions.c.orchestrator == orchestrator]
    if kinds:
        wanted.append(vp_actions.c.action.in_(kinds))
    total = conn.execute(sa.select(sa.func.count()).where(*wanted)).scalar_one()
    older = [] if before_seq is None else [vp_actions.c.seq < before_seq]
    query = sa.select(vp_actions).where(*wanted, *older).order_by(vp_actions.c.seq.desc()).limit(limit + 1)
    found = [Action(**row) for row in conn.execute(query).mappings()]
    rows = found[:limit]
    return Page(rows=rows, total=total, next_seq=rows[-1].seq if len(found) > limit else None)


def to_json(one: Action) -> dict[str, Any]:
    """As the API shows it, and its events with `asked_by` for `by`."""
    ended = one.ended_at_us
    return {
        "id": one.id,
        "orchestrator": one.orchestrator,
        "action": one.action,
        "state": one.outcome or "running",
        "reason": one.reason,
        "by": one.actor,
        "at": to_rfc3339(one.at_us),
        "ended_at": None if ended is None else to_rfc3339(ended),
        "outcome": one.outcome,
        "detail": one.detail,
        "duration_s": None if ended is None else (ended - one.at_us) / SECOND_US,
    }


def _new(*, orchestrator: str, action: Kind, reason: str | None, actor: str, now_us: int, detail: str | None) -> Action:
    return Action(
        id=ids.new_id(PREFIX, now_us),
        orchestrator=orchestrator,
        action=action,
        reason=reason,
        actor=actor,
        at_us=now_us,
        detail=detail,
    )


def _written(conn: Connection, new: Action) -> Action:
    values = {column.name: getattr(new, column.name) for column in vp_actions.c if column.name != "seq"}
    return replace(new, seq=conn.execute(_INSERT, values).scalar_one())


def _by_itself(conn: Connection, one: Action, outcome: Outcome, detail: str, *, now_us: int) -> Action:
    return end(conn, one, outcome, detail=detail, actor="system", now_us=now_us)


def _tell(
    conn: Connection,
    kind: str,
    one: Action,
    *,
    actor: str,
    now_us: int,
    before: Shown | None,
    after: Shown | None,
) -> None:
    shown = to_json(one)
    # An event's own `by` says whose request wrote it: of a drain's end, nobody's.
    told = {"asked_by": shown.pop("by"), **shown}
    told |= {name: value for name, value in (("before", before), ("after", after)) if value}
    outbox.append(conn, Event(at_us=now_us, kind=kind, actor=actor, orchestrator=one.orchestrator, data=told))
