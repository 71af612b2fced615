"""What this control plane is at, beside the requests that asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from orchestrator_fleet.errors import Conflict

AT_ONCE = 4

T = TypeVar("T")


class Errands:
    """Work that goes on whoever waits for it. All of it belongs to one event loop."""

    def __init__(self) -> None:
        self._machines: dict[str, asyncio.Lock] = {}
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._asked: dict[tuple[str, str], str] = {}

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Let it go on to its end."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @asynccontextmanager
    async def turn(self, machine: str) -> AsyncIterator[None]:
        """Be the only one at this machine, and one of AT_ONCE at all of them."""
        async with self._machines.setdefault(machine, asyncio.Lock()), self._gate:
            yield

    @contextmanager
    def answering(self, *, actor: str, key: str, fingerprint: str) -> Iterator[None]:
        """Be the only one that answers a request with this Idempotency-Key, whose work is more than a transaction.

        Conflict `in_progress` while that goes on, `idempotency_key_reused` when it is another request's.
        """
        running = self._asked.get((actor, key))
        if running == fingerprint:
            raise Conflict("in_progress", f"the request with Idempotency-Key {key!r} goes on; wait for its answer")
        if running is not None:
            raise Conflict(
                "idempotency_key_reused", f"Idempotency-Key {key!r} was used for another request; take a fresh one"
            )
        self._asked[actor, key] = fingerprint
        try:
            yield
        finally:
            del self._asked[actor, key]
