"""Which daemons are there: a row for each orchestrator, the newest connection's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.store import locks
from orchestrator_fleet.store.schema import presence
from orchestrator_fleet.store.statement import Statement

_ALL = sa.select(presence).order_by(presence.c.orchestrator)
_ONE = sa.select(presence).where(presence.c.orchestrator == sa.bindparam("of"))
_INSERT = presence.insert()
_UPDATE = presence.update().where(presence.c.orchestrator == sa.bindparam("of"))
_UPDATE_EPOCH = _UPDATE.where(presence.c.epoch == sa.bindparam("by_epoch"))
_BEAT = Statement(
    _UPDATE.where(presence.c.gone_at_us.is_(None), presence.c.last_seen_us < sa.bindparam("seen_us")).values(
        last_seen_us=sa.bindparam("seen_us"),
        sessions_max=sa.bindparam("most"),
        generation=sa.bindparam("under"),
        charter_version=sa.bindparam("by_charter"),
    )
)
_SILENT = _ALL.where(presence.c.gone_at_us.is_(None), presence.c.last_seen_us < sa.bindparam("before"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A daemon as it said hello, and when it was last heard. `gone_at_us` None: it is connected.

    `sessions` are the ids of the tasks it said it runs. `boot` and `epoch` are its identity: a newer connection of the
    same orchestrator has another epoch, and an older one's late words change nothing.
    """

    orchestrator: str
    machine: str
    boot: str
    epoch: str
    pid: int
    generation: str
    charter_version: str
    sessions_max: int
    sessions: tuple[str, ...]
    connected_at_us: int
    last_seen_us: int
    gone_at_us: int | None = None


def put(conn: Connection, seen: Presence) -> None:
    """Write what a hello says; the newest wins."""
    values = asdict(seen)
    locks.hold(conn, f"presence:{seen.orchestrator}")
    if conn.execute(_UPDATE, {**values, "of": seen.orchestrator}).rowcount == 0:
        conn.execute(_INSERT, values)


def heard(
    conn: Connection,
    *,
    orchestrator: str,
    epoch: str,
    generation: str,
    charter_version: str,
    sessions_max: int,
    sessions: Sequence[str],
    now_us: int,
) -> bool:
    """Write what a beat says; False when a newer connection has taken the place of `epoch`."""
    values = {
        "generation": generation,
        "charter_version": charter_version,
        "sessions_max": sessions_max,
        "sessions": list(sessions),
        "last_seen_us": now_us,
        "gone_at_us": None,
    }
    return conn.execute(_UPDATE_EPOCH, {**values, "of": orchestrator, "by_epoch": epoch}).rowcount == 1


def beat(conn: Connection, heard: Iterable[tuple[str, int, int, str, str]]) -> None:
    """Write (orchestrator, last seen, sessions at most, generation, charter version) of many, in one round trip.

    What is older than what stands there changes nothing: another control plane has heard of the daemon since.
    """
    values = [
        {"of": name, "seen_us": seen_us, "most": most, "under": generation, "by_charter": charter}
        for name, seen_us, most, generation, charter in sorted(heard)
    ]
    if values:
        _BEAT.many(conn, values)


def silent(conn: Connection, *, before_us: int) -> list[Presence]:
    """Those that seem connected and were last heard before `before_us`."""
    return [_presence(row) for row in conn.execute(_SILENT, {"before": before_us}).mappings()]


def gone(conn: Connection, *, orchestrator: str, epoch: str, now_us: int) -> bool:
    """Write that the connection of `epoch` ended; False when a newer one has taken its place."""
    return conn.execute(_UPDATE_EPOCH, {"gone_at_us": now_us, "of": orchestrator, "by_epoch": epoch}).rowcount == 1


def find(conn: Connection, orchestrator: str) -> Presence | None:
    """The orchestrator's daemon; None when it never connected."""
    row = conn.execute(_ONE, {"of": orchestrator}).mappings().one_or_none()
    return None if row is None else _presence(row)


def everybody(conn: Connection) -> list[Presence]:
    """All that ever connected, by name."""
    return [_presence(row) for row in conn.execute(_ALL).mappings()]


def _presence(row: sa.RowMapping) -> Presence:
    seen = Presence(**row)
    return replace(seen, sessions=tuple(seen.sessions))
