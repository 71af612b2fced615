"""Tells one connected orchestrator what waits for it, in order, until its daemon says that it has it.

One batch is on its way at a time: its daemon writes it down before it answers, so a slow disk there holds up nothing
but the next batch. What is not answered in time is sent again, and so is, on the next connection, whatever was on its
way when this one ended. Whoever holds the link delivers; a control plane that only hears of a notice leaves it alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import datetime

from sqlalchemy import Connection

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.orchestrators import notices
from orchestrator_fleet.orchestrators.notices import Notice
from orchestrator_fleet.wire import link as wire

BATCH = 50
AGAIN_S = 30.0
STORE_DOWN_S = 5.0

_log = log.get(__name__)


class Delivery:
    """What one link delivers. `send` raises when the connection is gone, and that ends `run`."""

    def __init__(
        self, plane: Plane, orchestrator: str, *, actor: str, send: Callable[[wire.Notice], Awaitable[None]]
    ) -> None:
        self._plane, self._orchestrator, self._actor, self._send = plane, orchestrator, actor, send
        self._on_their_way: set[str] = set()
        self._something_new, self._all_there = asyncio.Event(), asyncio.Event()

    def nudge(self) -> None:
        """A notice was kept for it."""
        self._something_new.set()

    async def run(self) -> None:
        """Deliver, for as long as the connection lasts."""
        while True:
            self._something_new.clear()
            try:
                batch = await self._plane.store.read(self._waiting)
            except FleetError as problem:
                _log.error("notices can't be read", orchestrator=self._orchestrator, problem=str(problem))
                await asyncio.sleep(STORE_DOWN_S)
                continue
            if not batch:
                await self._something_new.wait()
                continue
            self._on_their_way = {notice.id for notice in batch}
            self._all_there.clear()
            for notice in batch:
                await self._send(_told(notice))
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S):
                    await self._all_there.wait()

    async def noticed(self, notice_ids: Iterable[str]) -> None:
        """Its daemon has these; raises StoreError when that can't be written down, and they go again."""
        there = self._on_their_way.intersection(notice_ids)
        if not there:
            return
        now_us = self._plane.clock.now_us()
        await self._plane.store.write(
            lambda conn: notices.delivered(conn, self._orchestrator, there, actor=self._actor, now_us=now_us)
        )
        self._plane.pulse.nudge()
        self._on_their_way -= there
        if not self._on_their_way:
            self._all_there.set()

    def _waiting(self, conn: Connection) -> list[Notice]:
        now_us = self._plane.clock.now_us()
        return list(notices.waiting(conn, self._orchestrator, limit=BATCH, now_us=now_us))


def _told(notice: Notice) -> wire.Notice:
    return wire.Notice(
        notice=notice.id, kind=notice.kind, at=datetime.fromisoformat(to_rfc3339(notice.at_us)), data=notice.data
    )
