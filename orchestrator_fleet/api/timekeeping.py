"""Keeps the control plane's clock: the store's time, whatever the machine's clock is set to meanwhile."""

from __future__ import annotations

import asyncio

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import SECOND_US, SteadyClock
from orchestrator_fleet.orchestrators.presence import LEASE_S
from orchestrator_fleet.store import time
from orchestrator_fleet.tasks import life
from orchestrator_fleet.wire.http import MAX_LEASE_S

KEEP_S = 1.0
# What is less is the drift of a clock, and followed at once; what is more is somebody setting it.
STEP_S = 2.0

_log = log.get(__name__)


async def keep_time(plane: Plane, clock: SteadyClock) -> None:
    """Follow the store's clock. After a step of it nobody loses a lease that was good before."""
    while True:
        await asyncio.sleep(KEEP_S)
        now_us = await plane.store.read(time.now_us)
        by_us = now_us - clock.now_us()
        if abs(by_us) > STEP_S * SECOND_US:
            await _follow_step(plane, by_us=by_us, now_us=now_us)
        clock.set(now_us)


async def _follow_step(plane: Plane, *, by_us: int, now_us: int) -> None:
    _log.warning("the clock was set; leases are kept", by_s=round(by_us / SECOND_US, 3))
    await plane.store.write(
        lambda conn: life.after_step(conn, by_us=by_us, lease_s=LEASE_S, longest_s=MAX_LEASE_S, now_us=now_us)
    )
