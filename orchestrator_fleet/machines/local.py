"""A machine of this host: its hands, in a thread of this process."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator_fleet.clock import Clock, SystemClock
from orchestrator_fleet.errors import Unreachable
from orchestrator_fleet.machines.hands import Hands
from orchestrator_fleet.wire.machine import Answer, Request

THREADS = 2  # one for a long change, one to look meanwhile


class LocalTransport:
    """Reaches the machine whose root is a folder here."""

    def __init__(self, name: str, root: Path, fleet_home: Path, *, clock: Clock | None = None) -> None:
        self.name = name
        self.root = root
        self._hands = Hands(root, fleet_home=fleet_home, python=sys.executable, clock=clock or SystemClock())
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=f"machine-{name}")

    async def call(self, request: Request, *, timeout_s: float) -> Answer:
        """One request, one answer; raises Unreachable after `timeout_s`. A late change still finishes, or is fenced."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                return await loop.run_in_executor(self._threads, self._hands.call, request)
        except TimeoutError as error:
            raise Unreachable(self.name, f"no answer within {timeout_s:g} s") from error

    async def close(self) -> None:
        """Let the threads go; one that still works ends by its own deadlines."""
        self._threads.shutdown(wait=False, cancel_futures=True)
