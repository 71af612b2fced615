"""What an orchestrator is told: kept until its daemon says that it has it, or until nobody can want it any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import notices

KEPT_S = 7 * 86_400.0

_INSERT = notices.insert()
_WAITING = (
    sa.select(notices)
    .where(
        notices.c.orchestrator == sa.bindparam("of"),
        sa.text("delivered_at_us IS NULL"),
        notices.c.expires_at_us > sa.bindparam("now"),
    )
    .order_by(notices.c.seq)
    .limit(sa.bindparam("most"))
)
_DELIVERED = (
    notices.update()
    .where(
        notices.c.orchestrator == sa.bindparam("of"),
        notices.c.id.in_(sa.bindparam("ids", expanding=True)),
        sa.text("delivered_at_us IS NULL"),
    )
    .values(delivered_at_us=sa.bindparam("now"))
)


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
    kept = Event(
        at_us=now_us,
        kind="notice_kept",
        actor=actor,
        orchestrator=orchestrator,
        data={"notice": notice_id, "notice_kind": kind},
    )
    outbox.append(conn, kept)
    return notice_id


def waiting(conn: Connection, orchestrator: str, *, limit: int, now_us: int) -> Sequence[Notice]:
    """What an orchestrator has not been told yet, oldest first."""
    rows = conn.execute(_WAITING, {"of": orchestrator, "now": now_us, "most": limit}).mappings()
    return [Notice(**row) for row in rows]


def delivered(conn: Connection, orchestrator: str, notice_ids: Sequence[str], *, now_us: int) -> int:
    """Its daemon has them; how many were news."""
    return conn.execute(_DELIVERED, {"of": orchestrator, "ids": list(notice_ids), "now": now_us}).rowcount
