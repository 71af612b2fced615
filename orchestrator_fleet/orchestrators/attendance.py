"""Who is there: daemons that come and go, each with its event, and their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.orchestrators.access import DAEMON_SCOPES, KnownKey
from orchestrator_fleet.orchestrators.presence import Seen
from orchestrator_fleet.store import outbox, presence
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.presence import Presence
from orchestrator_fleet.store.schema import RUNNING, daemon_keys, tasks
from orchestrator_fleet.wire.link import Hello

_KEYS = sa.select(daemon_keys)
_HOLD = (
    tasks.update()
    .where(sa.text(RUNNING), tasks.c.lease_until_us < sa.bindparam("until"))
    .values(lease_until_us=sa.bindparam("until"))
)


def keys(conn: Connection) -> dict[str, KnownKey]:
    """The keys of all daemons, by id."""
    return {
        row.key_id: KnownKey(
            id=row.key_id, owner=row.orchestrator, sha256=row.sha256, scopes=DAEMON_SCOPES, machine=row.machine
        )
        for row in conn.execute(_KEYS)
    }


def arrive(conn: Connection, hello: Hello, *, actor: str, now_us: int) -> None:
    """A daemon has connected."""
    here = Presence(
        orchestrator=hello.orchestrator,
        machine=hello.machine,
        boot=hello.boot,
        epoch=hello.epoch,
        pid=hello.pid,
        generation=hello.generation,
        charter_version=hello.charter_version,
        sessions_max=hello.sessions_max,
        sessions=tuple(held.task for held in hello.held),
        connected_at_us=now_us,
        last_seen_us=now_us,
    )
    presence.put(conn, here)
    data = {"pid": hello.pid, "sessions_max": hello.sessions_max, "sessions": len(hello.held)}
    outbox.append(conn, _event("orchestrator_online", here, actor=actor, now_us=now_us, data=data))


def leave(conn: Connection, *, orchestrator: str, epoch: str, seen: Seen, reason: str, actor: str, now_us: int) -> bool:
    """A daemon's connection has ended; False when a newer one has taken its place, and nothing is written."""
    was = presence.find(conn, orchestrator)
    if was is None or was.epoch != epoch or was.gone_at_us is not None:
        return False
    presence.heard(
        conn,
        orchestrator=orchestrator,
        epoch=epoch,
        generation=seen.generation or was.generation,
        charter_version=seen.charter_version or was.charter_version,
        sessions_max=seen.sessions_max,
        sessions=was.sessions,
        now_us=seen.last_seen_us or now_us,
    )
    presence.gone(conn, orchestrator=orchestrator, epoch=epoch, now_us=now_us)
    data = {"reason": reason, "sessions": seen.sessions}
    outbox.append(conn, _event("orchestrator_offline", was, actor=actor, now_us=now_us, data=data))
    return True


def all_gone(conn: Connection, *, reason: str, now_us: int) -> int:
    """Nobody is connected, as the control plane has just started; answers how many seemed to be."""
    here = [one for one in presence.everybody(conn) if one.gone_at_us is None]
    for one in here:
        leave(
            conn,
            orchestrator=one.orchestrator,
            epoch=one.epoch,
            seen=_seen(one),
            reason=reason,
            actor="system",
            now_us=now_us,
        )
    return len(here)


def hold_leases(conn: Connection, *, until_us: int) -> int:
    """Let no running attempt's lease end before `until_us`; answers how many would have."""
    return conn.execute(_HOLD, {"until": until_us}).rowcount


def last_seen(conn: Connection) -> Mapping[str, Seen]:
    """What is known of every orchestrator that ever connected, by name; who is connected, the links say."""
    return {one.orchestrator: _seen(one) for one in presence.everybody(conn)}


def _seen(one: Presence) -> Seen:
    return Seen(
        connected=False,
        last_seen_us=one.last_seen_us,
        sessions_max=one.sessions_max,
        sessions=len(one.sessions),
        generation=one.generation,
        charter_version=one.charter_version,
        since_us=one.gone_at_us or one.connected_at_us,
    )


def _event(kind: str, of: Presence, *, actor: str, now_us: int, data: dict[str, Any]) -> Event:
    return Event(
        at_us=now_us,
        kind=kind,
        actor=actor,
        orchestrator=of.orchestrator,
        machine=of.machine,
        generation=of.generation,
        charter_version=of.charter_version,
        data=data,
    )
