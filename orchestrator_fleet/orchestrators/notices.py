"""What an orchestrator is told: kept until its daemon says that it has it, or until nobody can want it any more.

    tell ─▶ waiting ──┬──▶ delivered ─▶ forgotten after a day
                      └──▶ expired      nobody took it within KEPT_S; forgotten at once

Its daemon may be told the same notice more than once, and tells it apart by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import messages, notices

KEPT_S = 7 * 86_400.0
DELIVERED_KEPT_S = 86_400.0
MAX_FORGOTTEN = 1_000
MESSAGE = "message"
"""The kind of a notice that delivers the message of the same id."""

_INSERT = notices.insert()
_OF_ONE = (
    notices.c.orchestrator == sa.bindparam("of"),
    sa.text("delivered_at_us IS NULL"),
    notices.c.expires_at_us > sa.bindparam("now"),
)
_WAITING = (
    sa.select(notices)
    .where(*_OF_ONE, notices.c.seq > sa.bindparam("after"))
    .order_by(notices.c.seq)
    .limit(sa.bindparam("most"))
)
_COUNT = sa.select(sa.func.count()).select_from(notices).where(*_OF_ONE)
_DELIVERED = (
    notices.update()
    .where(*_OF_ONE, notices.c.id.in_(sa.bindparam("ids", expanding=True)))
    .values(delivered_at_us=sa.bindparam("now"))
    .returning(notices.c.seq, notices.c.id, notices.c.kind)
)
_MESSAGES_DELIVERED = (
    messages.update()
    .where(messages.c.id.in_(sa.bindparam("ids", expanding=True)), messages.c.delivered_at_us.is_(None))
    .values(delivered_at_us=sa.bindparam("now"))
)


def _drop(*over: sa.ColumnElement[bool] | sa.TextClause) -> sa.sql.dml.ReturningDelete[Any]:
    old = sa.select(notices.c.seq).where(*over).limit(MAX_FORGOTTEN).scalar_subquery()
    return (
        notices.delete()
        .where(notices.c.seq.in_(old))
        .returning(notices.c.seq, notices.c.id, notices.c.orchestrator, notices.c.kind, notices.c.delivered_at_us)
    )


_DROP_EXPIRED = _drop(notices.c.expires_at_us <= sa.bindparam("now"))
_DROP_DELIVERED = _drop(sa.text("delivered_at_us IS NOT NULL"), notices.c.delivered_at_us <= sa.bindparam("before"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing an orchestrator is told. Times are microseconds since 1970."""

    seq: int
    id: str
    orchestrator: str
    kind: str
    data: dict[str, Any]
    at_us: int
    expires_at_us: int
    delivered_at_us: int | None


def tell(
    conn: Connection,
    *,
    orchestrator: str,
    kind: str,
    data: dict[str, Any],
    actor: str,
    now_us: int,
    notice_id: str | None = None,
) -> str:
    """Keep a notice for an orchestrator; its id. The event of it is what makes a connected daemon's link deliver."""
    notice_id = notice_id or ids.new_id("ntc", now_us)
    conn.execute(
        _INSERT,
        {
            "id": notice_id,
            "orchestrator": orchestrator,
            "kind": kind,
            "data": data,
            "at_us": now_us,
            "expires_at_us": now_us + round(KEPT_S * SECOND_US),
        },
    )
    kept = _event("notice_kept", notice_id, kind, orchestrator=orchestrator, actor=actor, now_us=now_us)
    outbox.append(conn, kept)
    return notice_id


def waiting(conn: Connection, orchestrator: str, *, limit: int, now_us: int, after: int = 0) -> Sequence[Notice]:
    """What an orchestrator has not been told yet, oldest first, from the one behind `after` (a seq) on."""
    asked = {"of": orchestrator, "now": now_us, "after": after, "most": limit}
    return [Notice(**row) for row in conn.execute(_WAITING, asked).mappings()]


def count_waiting(conn: Connection, orchestrator: str, *, now_us: int) -> int:
    """How much an orchestrator has not been told yet."""
    return conn.execute(_COUNT, {"of": orchestrator, "now": now_us}).scalar_one()


def delivered(
    conn: Connection, orchestrator: str, notice_ids: Iterable[str], *, actor: str, now_us: int
) -> Sequence[str]:
    """It has them, and each leaves its event; the ids that were news, oldest first. Unknown and others' are not."""
    told = [one for one in dict.fromkeys(notice_ids) if "\0" not in one]
    if not told:
        return []
    locks.hold(conn, f"notices:{orchestrator}")
    # A message is kept longer than its notice, so it is told when it was delivered.
    found = sorted(tuple(row) for row in conn.execute(_DELIVERED, {"of": orchestrator, "ids": told, "now": now_us}))
    if said := [notice_id for _, notice_id, kind in found if kind == MESSAGE]:
        conn.execute(_MESSAGES_DELIVERED, {"ids": said, "now": now_us})
    outbox.append(
        conn,
        *(
            _event("notice_delivered", notice_id, kind, orchestrator=orchestrator, actor=actor, now_us=now_us)
            for _, notice_id, kind in found
        ),
    )
    return [notice_id for _, notice_id, _ in found]


def forget(conn: Connection, *, now_us: int) -> int:
    """Drop what expired (an event says what nobody took) and what was delivered a day ago; how many.

    At most MAX_FORGOTTEN of each a call.
    """
    locks.hold(conn, "forget notices")
    expired = sorted(tuple(row) for row in conn.execute(_DROP_EXPIRED, {"now": now_us}))
    outbox.append(
        conn,
        *(
            _event("notice_expired", notice_id, kind, orchestrator=orchestrator, actor="system", now_us=now_us)
            for _, notice_id, orchestrator, kind, delivered_at_us in expired
            if delivered_at_us is None
        ),
    )
    before_us = now_us - round(DELIVERED_KEPT_S * SECOND_US)
    return len(expired) + len(conn.execute(_DROP_DELIVERED, {"before": before_us}).all())


def to_json(notice: Notice) -> dict[str, Any]:
    """As the API shows it, and as it stands in the inbox on the orchestrator's machine."""
    return {
        "id": notice.id,
        "kind": notice.kind,
        "at": to_rfc3339(notice.at_us),
        "data": notice.data,
    }


def _event(kind: str, notice_id: str, notice_kind: str, *, orchestrator: str, actor: str, now_us: int) -> Event:
    data = {"notice": notice_id, "notice_kind": notice_kind}
    return Event(at_us=now_us, kind=kind, actor=actor, orchestrator=orchestrator, data=data)
