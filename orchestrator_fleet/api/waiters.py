"""Who waits for work: pollers and daemons asleep until their orchestrator may have something to claim."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

RECENT_S = 60.0


class Waiters:
    """Wake-ups by orchestrator. A wake between two looks is never lost: the event stays set until cleared."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._left_at: dict[str, float] = {}

    @contextmanager
    def waiting(self, orchestrator: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever `orchestrator` may have work; clear it before looking."""
        event = asyncio.Event()
        self._events[orchestrator].add(event)
        try:
            yield event
        finally:
            self._left_at[orchestrator] = time.monotonic()
            self._events[orchestrator].discard(event)
            if not self._events[orchestrator]:
                del self._events[orchestrator]

    def anybody(self, orchestrator: str) -> bool:
        """Whether somebody waits for work of `orchestrator`, or did within RECENT_S: clients that poll come and go."""
        left_at = self._left_at.get(orchestrator, float("-inf"))
        return orchestrator in self._events or time.monotonic() - left_at < RECENT_S

    def wake(self, orchestrators: Iterable[str]) -> None:
        """Let everybody who waits for one of these look again."""
        for orchestrator in orchestrators:
            for event in self._events.get(orchestrator, ()):
                event.set()

    def wake_all(self) -> None:
        """Let everybody look again: the rules changed, or we are closing."""
        self.wake(list(self._events))
