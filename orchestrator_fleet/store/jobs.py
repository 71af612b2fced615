"""What callers ask of a store's writers: gathered, done together, answered after the commit. Both databases use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from sqlalchemy import Connection


class Job:
    """One caller's wish, and where its answer goes. With `batched`, `fn` does the items of many at once."""

    __slots__ = ("answer", "batched", "error", "fn", "item", "loop", "waiter")

    def __init__(
        self,
        fn: Callable[..., Any],
        waiter: asyncio.Future[Any] | Future[Any],
        loop: asyncio.AbstractEventLoop | None,
        *,
        batched: bool = False,
        item: Any = None,
    ) -> None:
        self.fn, self.waiter, self.loop = fn, waiter, loop
        self.batched, self.item = batched, item
        self.answer: Any = None
        self.error: Exception | None = None


Piece = Sequence[Job]
"""Work that stands or falls together: a caller's function, or one function over the items of many."""


def pieces(jobs: Sequence[Job]) -> list[Piece]:
    """The jobs as pieces, in order of their first; those of the same batched function in one."""
    found: list[Piece] = []
    together: dict[Callable[..., Any], list[Job]] = {}
    for job in jobs:
        if not job.batched:
            found.append((job,))
        elif (others := together.get(job.fn)) is not None:
            others.append(job)
        else:
            found.append(together.setdefault(job.fn, [job]))
    return found


def do(conn: Connection, piece: Piece) -> None:
    """Run one piece in the caller's transaction and note its answers. What `fn` raises is raised here."""
    first = piece[0]
    if not first.batched:
        first.answer = first.fn(conn)
        return
    answers = first.fn(conn, [job.item for job in piece])
    for job, answer in zip(piece, answers, strict=True):
        if isinstance(answer, Exception):
            job.error = answer
        else:
            job.answer = answer


def answer(answered: Sequence[Job]) -> None:
    """Hand out the answers; one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[Job]] = {}
    for job in answered:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, jobs in by_loop.items():
        if loop is None:
            _deliver(jobs)
            continue
        try:
            loop.call_soon_threadsafe(_deliver, jobs)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue


def _deliver(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.waiter.done():
            continue
        if job.error is not None:
            job.waiter.set_exception(job.error)
        else:
            job.waiter.set_result(job.answer)
