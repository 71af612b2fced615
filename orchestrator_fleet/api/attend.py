"""Tells the store, beat by beat, which daemons are heard here: others who serve it know it from there."""

from __future__ import annotations

import asyncio

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.orchestrators import attendance
from orchestrator_fleet.orchestrators.presence import BEAT_S

_log = log.get(__name__)


async def attend(plane: Plane) -> None:
    """Write it each BEAT_S, in one transaction for all links."""
    while True:
        now_us = plane.clock.now_us()
        links = {name: link.seen for name, link in plane.links.items()}
        gone = await plane.store.write(
            lambda conn, links=links, now_us=now_us: attendance.beat(conn, links, now_us=now_us)  # type: ignore[misc] # bound now
        )
        if gone:
            _log.info("daemons are gone that were connected elsewhere", orchestrators=gone)
            plane.pulse.nudge()
        await asyncio.sleep(BEAT_S)
