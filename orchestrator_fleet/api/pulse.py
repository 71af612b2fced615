"""Follows the outbox and tells whoever is concerned: pollers, daemons, readers of logs.

There is one place that wakes: whatever changed a task, and wherever (another route, the sweep of leases, another
process on the same store), its event passes here. A nudge makes it look at once, ours or that of a database which
tells of other processes' commits; else it looks each `LOOK_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import Store
from orchestrator_fleet.store.outbox import Event

LOOK_S = 1.0
MAX_EVENTS = 1_000


class Pulse:
    """The reader of the outbox. `seq` is the last event that was passed on."""

    def __init__(self, store: Store, *, pass_on: Callable[[Event], None]) -> None:
        self.seq = 0
        self._store, self._pass_on = store, pass_on
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Something was committed: look now."""
        self._nudged.set()

    async def start(self) -> None:
        """Begin after what has already happened; from now on other processes' commits are heard of."""
        self.seq = await self._store.read(outbox.last_seq)
        loop = asyncio.get_running_loop()

        def heard() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self.nudge)

        self._store.listen(heard)

    async def look(self) -> bool:
        """Pass on what is new; whether there may be more."""
        after = self.seq
        events = await self._store.read(lambda conn: outbox.read_after(conn, after, MAX_EVENTS))
        for event in events:
            self._pass_on(event)
            self.seq = event.seq
        return len(events) == MAX_EVENTS

    async def run(self) -> None:
        """Look whenever nudged, for ever."""
        while True:
            if not await self.look():
                await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                await self._nudged.wait()
        except TimeoutError:
            return
        finally:
            self._nudged.clear()
