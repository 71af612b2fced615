"""What an orchestrator is doing, as observed: never set by anybody. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator_fleet.clock import SECOND_US, to_rfc3339

BEAT_S = 5.0
LEASE_S = 30.0
MISSED_BEATS = 3

ONLINE, BUSY, AWAY, OFFLINE = "ONLINE", "BUSY", "AWAY", "OFFLINE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of an orchestrator's daemon. Times are microseconds since 1970; `since_us`: it came, or it went."""

    connected: bool
    last_seen_us: int | None
    sessions_max: int = 0
    sessions: int = 0
    generation: str | None = None
    charter_version: str | None = None
    since_us: int | None = None


def status(seen: Seen | None, *, now_us: int) -> tuple[str, str]:
    """(status, why): OFFLINE without a beat in time, BUSY with every slot taken, else ONLINE."""
    if seen is None or seen.last_seen_us is None:
        return OFFLINE, "its daemon has never connected"
    age_s = (now_us - seen.last_seen_us) / SECOND_US
    if not seen.connected:
        return OFFLINE, f"its daemon is not connected; last seen {to_rfc3339(seen.last_seen_us)}"
    if age_s > MISSED_BEATS * BEAT_S:
        return (
            OFFLINE,
            f"its daemon has been silent for {age_s:.0f} s, {MISSED_BEATS} beats are {MISSED_BEATS * BEAT_S:.0f} s",
        )
    if seen.sessions >= seen.sessions_max:
        return BUSY, f"{seen.sessions} of {seen.sessions_max} sessions are taken"
    return ONLINE, f"{seen.sessions_max - seen.sessions} of {seen.sessions_max} sessions are free"


def conditions(seen: Seen | None, *, status: str, reason: str, generation: str | None) -> list[dict[str, Any]]:
    """The one condition `Ready`, as status shows it: true while the daemon is reachable under its generation."""
    behind = seen is not None and generation is not None and seen.generation not in (None, "", generation)
    ready = status in (ONLINE, BUSY) and not behind
    message = f"runs generation {seen.generation}, {generation} is wanted" if seen and behind else reason
    return [
        {
            "type": "Ready",
            "status": "True" if ready else "False",
            "reason": "Behind" if behind and status != OFFLINE else status.title(),
            "message": message,
            "since": None if seen is None or seen.since_us is None else to_rfc3339(seen.since_us),
            "observed_generation": seen.generation if seen else None,
        }
    ]
