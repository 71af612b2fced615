"""Who is there: daemons that come and go, each with its event, and their keys.

A daemon is connected to one control plane; several may serve the same store. Each writes down, beat by beat, whom it
hears, and whoever is heard by nobody for MISSED_BEATS is gone: any of them finds that, and one writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.orchestrators.access import DAEMON_SCOPES, KnownKey
from orchestrator_fleet.orchestrators.presence import BEAT_S, MISSED_BEATS, Seen
from orchestrator_fleet.store import locks, outbox, presence
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.presence import Presence
from orchestrator_fleet.store.schema import RUNNING, daemon_keys, tasks
from orchestrator_fleet.wire.link import Hello

_KEYS = sa.select(daemon_keys)
_RUNNING = sa.select(tasks.c.orchestrator, sa.func.count()).where(sa.text(RUNNING)).group_by(tasks.c.orchestrator)


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
    locks.hold(conn, f"presence:{orchestrator}")
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
        now_us=max(seen.last_seen_us or now_us, was.last_seen_us),
    )
    presence.gone(conn, orchestrator=orchestrator, epoch=epoch, now_us=now_us)
    data = {"reason": reason, "sessions": seen.sessions}
    outbox.append(conn, _event("orchestrator_offline", was, actor=actor, now_us=now_us, data=data))
    return True


def all_gone(conn: Connection, *, reason: str, now_us: int) -> int:
    """Nobody is connected, as the only control plane has just started; answers how many seemed to be."""
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


def beat(conn: Connection, links: Mapping[str, Seen], *, now_us: int) -> list[str]:
    """Write down whom this control plane hears, and who is silent; answers those that are gone by that."""
    presence.beat(
        conn,
        (
            (name, seen.last_seen_us or now_us, seen.sessions_max, seen.generation or "", seen.charter_version or "")
            for name, seen in links.items()
        ),
    )
    before_us = now_us - round(MISSED_BEATS * BEAT_S * SECOND_US)
    return [
        one.orchestrator
        for one in presence.silent(conn, before_us=before_us)
        if one.orchestrator not in links
        and leave(
            conn,
            orchestrator=one.orchestrator,
            epoch=one.epoch,
            seen=_seen(one),
            reason="nobody has heard of it",
            actor="system",
            now_us=now_us,
        )
    ]


def last_seen(conn: Connection) -> Mapping[str, Seen]:
    """What is known of every orchestrator that ever connected, by name; of those connected here, links know more."""
    running: dict[str, int] = dict(conn.execute(_RUNNING).tuples().all())
    return {one.orchestrator: _seen(one, sessions=running.get(one.orchestrator, 0)) for one in presence.everybody(conn)}


def _seen(one: Presence, *, sessions: int | None = None) -> Seen:
    return Seen(
        connected=one.gone_at_us is None,
        last_seen_us=one.last_seen_us,
        sessions_max=one.sessions_max,
        sessions=len(one.sessions) if sessions is None else sessions,
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
