"""Who waits for work: pollers and daemons asleep until their orchestrator may have something to claim."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Waiters:
    """Wake-ups by orchestrator. A wake between two looks is never lost: the event stays set until cleared."""

    def __init__(self) -> None:
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def waiting(self, orchestrator: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever `orchestrator` may have work; clear it before looking."""
        event = asyncio.Event()
        self._events[orchestrator].add(event)
        try:
            yield event
        finally:
            self._events[orchestrator].discard(event)
            if not self._events[orchestrator]:
                del self._events[orchestrator]

    def anybody(self, orchestrator: str) -> bool:
        """Whether somebody waits for work of `orchestrator` now."""
        return orchestrator in self._events

    def wake(self, orchestrators: Iterable[str]) -> None:
        """Let everybody who waits for one of these look again."""
        for orchestrator in orchestrators:
            for event in self._events.get(orchestrator, ()):
                event.set()

    def wake_all(self) -> None:
        """Let everybody look again: the rules changed, or we are closing."""
        self.wake(list(self._events))
