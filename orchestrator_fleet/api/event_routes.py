"""What happened and what was printed: in pages, and as streams that go on while it happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, TypeVar

from litestar import Response, get
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.params import Parameter
from litestar.response import Stream
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, feed, sse
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Words, needs
from orchestrator_fleet.api.feed import EVERYTHING, Told, event_json
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import MissingScope, TooMany
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import NotFound
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.output import Piece
from orchestrator_fleet.tasks.task import FINAL

PAGE = 100
MAX_FOLLOWERS = 500
MAX_ATTEMPT = (1 << 31) - 1  # what its column holds
# Output that reaches another control plane of the same store wakes nobody here.
LOOK_ELSEWHERE_S = 1.0
TASKS, OTHERS = "tasks:read", "fleet:read"

One = TypeVar("One", Event, Piece)
Attempt = Annotated[int | None, Parameter(ge=1, le=MAX_ATTEMPT)]

_READ = [needs(TASKS)]


@get("/tasks/{task_id:str}/events", guards=_READ)
async def task_events(
    *,
    request: Asked,
    plane: OfPlane,
    task_id: str,
    limit: Limit,
    follow: sse.Follow = False,
    cursor: Cursor = None,
    last_event_id: sse.LastEventId = None,
) -> Response[dict[str, Any]] | Stream:
    """What happened to a task, oldest first. As a stream it goes on until the task ends."""
    if sse.wanted(request, follow=follow):
        after = sse.resumed(last_event_id, cursor)

        def read(conn: Connection, after: int) -> Sequence[Event]:
            return life.events_of(conn, task_id=task_id, after_seq=after, limit=PAGE)

        return await _followed(plane, task_id, after, read, lambda event: feed.tell(event).text)
    after = sse.sequence(cursor)
    events, total = await plane.store.read(
        lambda conn: (
            life.events_of(conn, task_id=task_id, after_seq=after, limit=limit + 1),
            life.count_events(conn, task_id),
        )
    )
    return _page(events, event_json, limit=limit, total=total)


@get("/tasks/{task_id:str}/log", guards=_READ)
async def task_log(
    *,
    request: Asked,
    plane: OfPlane,
    task_id: str,
    limit: Limit,
    follow: sse.Follow = False,
    attempt: Attempt = None,
    cursor: Cursor = None,
    last_event_id: sse.LastEventId = None,
) -> Response[dict[str, Any]] | Stream:
    """What the sessions printed, in order of arrival. As a stream it goes on until the task ends."""
    if sse.wanted(request, follow=follow):
        after = sse.resumed(last_event_id, cursor)

        def read(conn: Connection, after: int) -> Sequence[Piece]:
            return life.read_log(conn, task_id=task_id, after_seq=after, attempt=attempt, limit=PAGE)

        return await _followed(
            plane, task_id, after, read, lambda piece: sse.event("log", _piece(piece), seq=piece.seq)
        )
    after = sse.sequence(cursor)
    _, pieces, total = await plane.store.read(
        lambda conn: (
            life.get_task(conn, task_id),
            life.read_log(conn, task_id=task_id, after_seq=after, attempt=attempt, limit=limit + 1),
            life.count_log(conn, task_id=task_id, attempt=attempt),
        )
    )
    return _page(pieces, _piece, limit=limit, total=total)


def _may_follow(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    key: KnownKey = connection.scope["auth"]
    if not (key.allows(TASKS) or key.allows(OTHERS)):
        raise MissingScope(f"this needs a key with the scope {TASKS} or {OTHERS}")


@get("/events", guards=[_may_follow])
async def all_events(
    request: Asked, plane: OfPlane, topics: Words = None, last_event_id: sse.LastEventId = None
) -> Stream:
    """Everything that happens from now on, or since `Last-Event-ID`, as server-sent events.

    `topics` are kinds (`task_done`) or how kinds begin (`task_`, `orchestrator`). Events of tasks come to keys with
    tasks:read, the others to keys with fleet:read. A client that does not read is dropped; it goes on where it was.
    """
    begins = tuple(topic.removesuffix("*") for topic in asking.words("topics", topics))
    sees = {True: request.auth.allows(TASKS), False: request.auth.allows(OTHERS)}

    def wanted(told: Told) -> bool:
        return sees[told.of_task] and (not begins or told.kind.startswith(begins))

    if plane.feed.followers >= MAX_FOLLOWERS:
        raise TooMany(f"{MAX_FOLLOWERS} clients follow the events already; wait for one to leave")
    newest = plane.pulse.seq
    # An id from a store that was put back from a backup since may be of the future.
    after = newest if last_event_id is None else min(newest, sse.resumed(last_event_id, None))
    return sse.stream(_everything(plane, after, wanted))


async def _everything(plane: Plane, after: int, wanted: Callable[[Told], bool]) -> AsyncIterator[bytes]:
    with plane.feed.following(), plane.readers.waiting(EVERYTHING) as woken:
        yield sse.opening(after)
        while not plane.closing.is_set():
            woken.clear()
            new = plane.feed.after(after)
            if new is None:
                events = await plane.store.read(
                    lambda conn, after=after: outbox.read_after(conn, after, PAGE)  # type: ignore[misc] # bound now
                )
                new = [feed.tell(event) for event in events]
            for told in new:
                if wanted(told):
                    yield told.text
                after = told.seq
            if not new and await sse.quiet(woken):
                yield sse.still_here(after)


async def _followed(
    plane: Plane,
    task_id: str,
    after: int,
    read: Callable[[Connection, int], Sequence[One]],
    show: Callable[[One], bytes],
) -> Stream:
    """A stream of what `read` finds of a task; NotFound at once when there is none such."""
    await plane.store.read(lambda conn: life.get_task(conn, task_id))
    return sse.stream(_follow(plane, task_id, after, read, show))


async def _follow(
    plane: Plane,
    task_id: str,
    after: int,
    read: Callable[[Connection, int], Sequence[One]],
    show: Callable[[One], bytes],
) -> AsyncIterator[bytes]:
    """What `read` finds, `end` when the task is over (its status null: it was purged), and a sign while it is quiet."""
    loop = asyncio.get_running_loop()
    with plane.readers.waiting(task_id) as woken:
        yield sse.opening(after)
        told_at = loop.time()
        while not plane.closing.is_set():
            woken.clear()
            try:
                task, found = await plane.store.read(
                    lambda conn, after=after: (life.get_task(conn, task_id), read(conn, after))  # type: ignore[misc] # bound now
                )
            except NotFound:
                yield sse.event("end", {"status": None}, seq=after)
                return
            for one in found:
                after = one.seq
                yield show(one)
            if found:
                told_at = loop.time()
                continue
            if task.status in FINAL:
                yield sse.event("end", {"status": task.status}, seq=after)
                return
            elsewhere = task.status == "IN_PROGRESS" and task.orchestrator not in plane.links
            await sse.quiet(woken, LOOK_ELSEWHERE_S if elsewhere else sse.KEEP_ALIVE_S)
            if loop.time() - told_at >= sse.KEEP_ALIVE_S:
                yield sse.still_here(after)
                told_at = loop.time()


def _page(
    found: Sequence[One], show: Callable[[One], dict[str, Any]], *, limit: int, total: int
) -> Response[dict[str, Any]]:
    some = found[:limit]
    next_cursor = str(some[-1].seq) if len(found) > limit else None
    return Response(asking.page([show(one) for one in some], limit=limit, total=total, next_cursor=next_cursor))


def _piece(piece: Piece) -> dict[str, Any]:
    return {
        "seq": piece.seq,
        "at": to_rfc3339(piece.at_us),
        "attempt": piece.attempt,
        "stream": piece.stream,
        "offset": piece.byte_offset,
        "text": piece.text,
    }


ROUTES = [task_events, task_log, all_events]
