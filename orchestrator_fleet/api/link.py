"""The daemons' WebSocket: one `Link` for each connected orchestrator.

A link reads frame by frame; only claims wait beside it, in a task of their own, and a grant that can't be
handed over is given back at once. Whatever a peer sends ends at most its own connection.

    Hello ▶ reconcile ▶ Welcome ▶ (Claim | Beat | Log | Finish | Noticed)* ▶ gone: presence says so

What others tell the orchestrator is delivered beside all that: see `delivery`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect
from sqlalchemy import Connection

from orchestrator_fleet import log
from orchestrator_fleet.api import problems, work
from orchestrator_fleet.api.delivery import Delivery
from orchestrator_fleet.api.plane import POLICY, Plane
from orchestrator_fleet.clock import from_datetime
from orchestrator_fleet.errors import FleetError, StoreError, TaskError
from orchestrator_fleet.orchestrators import attendance
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.orchestrators.presence import BEAT_S, LEASE_S, MISSED_BEATS, Seen
from orchestrator_fleet.tasks import life, view
from orchestrator_fleet.tasks.task import Held
from orchestrator_fleet.wire import link as wire

HELLO_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = BEAT_S * MISSED_BEATS
SEND_TIMEOUT_S = 10.0
GOODBYE_TIMEOUT_S = 5.0
MAX_CLAIM_WAIT_S = 60.0
MAX_CLAIM = 100
MAX_HELD = 1_000
MAX_PUSHES = 256
MAX_NOTICED = 1_000

MAX_REASON_BYTES = 120  # of a close frame's 123

NORMAL, UNSUPPORTED, TOO_BIG, TRY_LATER = 1000, 1003, 1009, 1013

# What sending to a peer that has hung up raises, in the server and in Litestar.
GONE = (OSError, RuntimeError, WebSocketDisconnect)

_log = log.get(__name__)
_decoder = msgspec.json.Decoder(wire.FromDaemon)


class Closed(Exception):
    """The connection ends; `code` is the WebSocket's close code."""

    def __init__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(reason)


async def refuse(socket: WebSocket[Any, Any, Any], *, status: HTTPStatus, code: str, detail: str) -> None:
    """Answer the upgrade with an HTTP error."""
    body = msgspec.json.encode(problems.details(status=status, code=code, detail=detail))
    headers = [(b"content-type", problems.MEDIA_TYPE.encode())]
    await socket.send({"type": "websocket.http.response.start", "status": int(status), "headers": headers})
    await socket.send({"type": "websocket.http.response.body", "body": body, "more_body": False})


async def serve(socket: WebSocket[Any, Any, Any], plane: Plane) -> None:
    """One connection, from the upgrade to its end."""
    key: KnownKey = socket.scope["auth"]
    if "origin" in socket.headers:
        # A browser always sends it, a daemon never: no page may speak for a daemon.
        await refuse(socket, status=HTTPStatus.FORBIDDEN, code="forbidden", detail="browsers may not use this route")
        return
    if not key.allows("tasks:work"):
        await refuse(socket, status=HTTPStatus.FORBIDDEN, code="missing_scope", detail="needs the scope tasks:work")
        return
    await socket.accept()
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            hello = await _receive(socket)
        await Link(plane, socket, hello=_checked(hello, key=key, plane=plane), key=key).run()
    except TimeoutError:
        await _close(socket, POLICY, f"no hello within {HELLO_TIMEOUT_S:g} s")
    except Closed as closed:
        await _close(socket, closed.code, closed.reason)


def _checked(hello: wire.FromDaemon, *, key: KnownKey, plane: Plane) -> wire.Hello:
    if not isinstance(hello, wire.Hello):
        raise Closed(POLICY, "the first message must be hello")
    if key.owner != hello.orchestrator:
        raise Closed(POLICY, f"the key is of {key.owner}, not of {hello.orchestrator[:100]}")
    if key.machine and key.machine != hello.machine:
        raise Closed(POLICY, f"the key is of machine {key.machine}, not of {hello.machine[:100]}")
    if hello.orchestrator not in plane.control.orchestrators:
        raise Closed(POLICY, f"{hello.orchestrator} is not declared; run `fleet apply`")
    if (why := plane.why_no_longer(key)) is not None:
        raise Closed(POLICY, f"its key is {why}")
    if len(hello.held) > MAX_HELD:
        raise Closed(TOO_BIG, f"{len(hello.held)} held attempts are more than {MAX_HELD}")
    return hello


def _held(held: Iterable[wire.Held]) -> list[Held]:
    return [Held(task=one.task, token=one.token) for one in held]


async def _close(socket: WebSocket[Any, Any, Any], code: int, reason: str) -> None:
    told = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    # The peer may be gone already, which is what we want.
    with contextlib.suppress(*GONE, TimeoutError):
        async with asyncio.timeout(GOODBYE_TIMEOUT_S):
            await socket.send({"type": "websocket.close", "code": code, "reason": told})


async def _receive(socket: WebSocket[Any, Any, Any]) -> wire.FromDaemon:
    event: Any = await socket.receive()
    if event["type"] == "websocket.disconnect":
        raise Closed(NORMAL, "the daemon hung up")
    text = event.get("text")
    if text is None:
        raise Closed(UNSUPPORTED, "binary frames are not spoken here")
    try:
        message: wire.FromDaemon = _decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise Closed(UNSUPPORTED, f"not a message of this protocol: {problem}") from problem
    return message


@dataclass(frozen=True, slots=True)
class Holding:
    """An attempt that a daemon works on. `attempt` is 0 where the daemon told it and not we."""

    token: str
    attempt: int = 0


class Link:
    """A connected daemon. `held`: what it works on, by task; `said`: what it said so of last, be it its own or not."""

    def __init__(self, plane: Plane, socket: WebSocket[Any, Any, Any], *, hello: wire.Hello, key: KnownKey) -> None:
        self.orchestrator, self.machine, self.key = hello.orchestrator, hello.machine, key
        self.held: dict[str, Holding] = {}
        self.gone = asyncio.Event()
        self._plane, self._socket, self._hello = plane, socket, hello
        self._holder = f"{hello.boot}/{hello.epoch}"
        self._sessions_max, self._generation = hello.sessions_max, hello.generation
        self._charter_version = hello.charter_version
        self._since_us = self._last_seen_us = plane.clock.now_us()
        self._sending = asyncio.Lock()
        self._claim: asyncio.Task[None] | None = None
        self._pushes: set[asyncio.Task[None]] = set()
        self.said, self.said_at_us = hello.held, self._since_us
        self._delivery = Delivery(plane, hello.orchestrator, actor=key.actor, send=self._send)
        self._delivering: asyncio.Task[None] | None = None
        self._end: asyncio.Future[Closed] = asyncio.get_running_loop().create_future()

    @property
    def seen(self) -> Seen:
        """What this connection shows of the orchestrator."""
        return Seen(
            connected=True,
            last_seen_us=self._last_seen_us,
            sessions_max=self._sessions_max,
            sessions=len(self.held),
            generation=self._generation,
            charter_version=self._charter_version,
            since_us=self._since_us,
        )

    def end(self, code: int, reason: str) -> None:
        """Let the connection end soon; the first reason counts."""
        if not self._end.done():
            self._end.set_result(Closed(code, reason))

    def taken_away(self, task: str, *, attempt: int, reason: str) -> None:
        """The task is not IN_PROGRESS under `attempt` any more: if this daemon still works on it, tell it to stop."""
        holding = self.held.get(task)
        if holding is None or attempt < holding.attempt:
            return
        del self.held[task]
        if len(self._pushes) >= MAX_PUSHES:
            self.end(TRY_LATER, "too many messages wait to be read")
            return
        push = asyncio.create_task(self._send(wire.Cancel(task=task, token=holding.token, reason=reason)))
        self._pushes.add(push)
        push.add_done_callback(self._pushed)

    def notice_kept(self) -> None:
        """Something waits to be told to this orchestrator."""
        self._delivery.nudge()

    def _delivered(self, delivering: asyncio.Task[None]) -> None:
        if delivering.cancelled() or (problem := delivering.exception()) is None:
            return
        if isinstance(problem, Closed):
            self.end(problem.code, problem.reason)
            return
        _log.error("notices can't be delivered", orchestrator=self.orchestrator, problem=repr(problem))
        self.end(TRY_LATER, "notices can't be delivered")

    def _pushed(self, push: asyncio.Task[None]) -> None:
        self._pushes.discard(push)
        if not push.cancelled() and isinstance(problem := push.exception(), Closed):
            self.end(problem.code, problem.reason)

    async def run(self) -> None:
        """Serve the daemon until either side ends it; raises Closed with the reason."""
        older = self._plane.links.get(self.orchestrator)
        self._plane.links[self.orchestrator] = self
        try:
            if older is not None:
                older.end(POLICY, "a newer connection of this orchestrator took over")
                # Its grants in flight are given back before we compare what is held.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                        await older.gone.wait()
            await self._welcome()
            self._delivering = asyncio.create_task(self._delivery.run())
            self._delivering.add_done_callback(self._delivered)
            raise await self._until_end()
        finally:
            await self._leave()

    async def _until_end(self) -> Closed:
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait({reader, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if self._end.done():
                return self._end.result()
            return await reader
        finally:
            reader.cancel()

    async def _leave(self) -> None:
        tasks = [task for task in (self._claim, self._delivering, *self._pushes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._plane.links.get(self.orchestrator) is self:
            del self._plane.links[self.orchestrator]
            await self._write_gone()
        self.gone.set()

    async def _write_gone(self) -> None:
        reason = self._end.result().reason if self._end.done() else "the daemon hung up"
        _log.info("daemon offline", orchestrator=self.orchestrator, machine=self.machine, reason=reason)
        seen, now_us = self.seen, self._plane.clock.now_us()
        try:
            await self._plane.store.write(
                lambda conn: attendance.leave(
                    conn,
                    orchestrator=self.orchestrator,
                    epoch=self._hello.epoch,
                    seen=seen,
                    reason=reason,
                    actor=self.key.actor,
                    now_us=now_us,
                )
            )
        except FleetError:
            _log.exception("a daemon's leaving could not be written down", orchestrator=self.orchestrator)

    async def _welcome(self) -> None:
        hello = self._hello
        plane, now_us = self._plane, self._plane.clock.now_us()

        def arrive(conn: Connection) -> tuple[str, ...]:
            attendance.arrive(conn, hello, actor=self.key.actor, now_us=now_us)
            reconciled = life.reconcile_held(
                conn,
                orchestrator=self.orchestrator,
                machine=self.machine,
                holder=self._holder,
                held=_held(hello.held),
                lease_s=LEASE_S,
                actor=self.key.actor,
                now_us=now_us,
            )
            return reconciled.lost

        lost = await plane.store.write(arrive)
        plane.pulse.nudge()
        self.held = {held.task: Holding(held.token) for held in hello.held if held.task not in lost}
        _log.info("daemon online", orchestrator=self.orchestrator, machine=self.machine, held=len(self.held))
        await self._send(wire.Welcome(id=hello.id, beat_s=BEAT_S, lease_s=LEASE_S, lost=lost))

    async def _read(self) -> Closed:
        """Serve frame by frame; returns why it ended."""
        while True:
            try:
                async with asyncio.timeout(SILENCE_TIMEOUT_S):
                    message = await _receive(self._socket)
                self._last_seen_us = self._plane.clock.now_us()
                await self._serve(message)
            except TimeoutError:
                return Closed(POLICY, f"silent for {SILENCE_TIMEOUT_S:g} s")
            except Closed as closed:
                return closed

    async def _serve(self, message: wire.FromDaemon) -> None:
        try:
            match message:
                case wire.Claim():
                    self._start_claim(message)
                case wire.Beat():
                    await self._beat(message)
                case wire.Log():
                    await self._append_log(message)
                case wire.Finish():
                    await self._finish(message)
                case wire.Noticed():
                    await self._noticed(message)
                case wire.Hello():
                    raise Closed(POLICY, "hello comes once")
        except TaskError as problem:
            await self._send(wire.Problem(id=message.id, code=problem.code, detail=str(problem)))
        except FleetError as problem:
            _log.exception("a daemon's message failed", orchestrator=self.orchestrator)
            await self._send(wire.Problem(id=message.id, code="unavailable", detail=str(problem)))

    def _start_claim(self, message: wire.Claim) -> None:
        if self._claim is not None and not self._claim.done():
            raise Closed(POLICY, "one claim at a time")
        self._generation, self._charter_version = message.generation, message.charter_version
        self._claim = asyncio.create_task(self._serve_claim(message))
        self._claim.add_done_callback(self._claimed)

    def _claimed(self, claim: asyncio.Task[None]) -> None:
        if claim.cancelled() or (problem := claim.exception()) is None:
            return
        if isinstance(problem, Closed):
            self.end(problem.code, problem.reason)
            return
        _log.error("a claim failed", orchestrator=self.orchestrator, problem=repr(problem))
        self.end(TRY_LATER, "the claim failed")

    async def _serve_claim(self, message: wire.Claim) -> None:
        claimant = work.Claimant(
            orchestrator=self.orchestrator,
            machine=self.machine,
            holder=self._holder,
            actor=self.key.actor,
            generation=message.generation,
            charter_version=message.charter_version,
            lease_s=LEASE_S,
            sessions_max=self._sessions_max,
        )
        wait_s = min(max(message.wait_s, 0.0), MAX_CLAIM_WAIT_S)
        limit = min(message.limit, MAX_CLAIM)
        async with work.claimed(self._plane, claimant, limit=limit, wait_s=wait_s) as (grants, reason):
            # Held from now on: a cancel that comes in while the grant is on its way must find it.
            self.held.update({grant.task.id: Holding(grant.token, grant.attempt) for grant in grants})
            along = await work.carried(self._plane, grants)
            told = tuple(
                wire.Grant(
                    task={**view.to_json(grant.task), **along.get(grant.task.id, {})},
                    attempt=grant.attempt,
                    token=grant.token,
                )
                for grant in grants
            )
            await self._send(wire.Claimed(id=message.id, grants=told, reason=reason))

    async def _beat(self, message: wire.Beat) -> None:
        self._generation, self._charter_version = message.generation, message.charter_version
        self._sessions_max = message.sessions_max
        if (why := self._plane.why_no_longer(self.key)) is not None:
            raise Closed(POLICY, f"the key is {why}")
        if len(message.held) > MAX_HELD:
            raise Closed(TOO_BIG, f"{len(message.held)} held attempts are more than {MAX_HELD}")
        lost: tuple[str, ...] = ()
        if message.held:
            held, now_us = _held(message.held), self._plane.clock.now_us()
            lost = await self._plane.store.write(
                lambda conn: life.beat(conn, held=held, lease_s=LEASE_S, now_us=now_us)
            )
        self.said, self.said_at_us = message.held, self._last_seen_us
        for task in lost:
            self.held.pop(task, None)
        self._plane.unsettled.beaten(self.orchestrator, held={one.task for one in message.held})
        await self._send(wire.Beaten(id=message.id, lost=lost))

    async def _append_log(self, message: wire.Log) -> None:
        if len(message.text) > wire.MAX_LOG_CHUNK_BYTES:
            raise Closed(TOO_BIG, f"a log piece is at most {wire.MAX_LOG_CHUNK_BYTES} bytes")
        # A late piece of a lost attempt is no news to the daemon: its next beat says so.
        with contextlib.suppress(TaskError):
            await self._plane.store.write(
                lambda conn: life.append_log(
                    conn,
                    task_id=message.task,
                    token=message.token,
                    stream=message.stream,
                    offset=message.offset,
                    text=message.text,
                    now_us=self._plane.clock.now_us(),
                )
            )
            self._plane.readers.wake([message.task])

    async def _noticed(self, message: wire.Noticed) -> None:
        if len(message.notices) > MAX_NOTICED:
            raise Closed(TOO_BIG, f"{len(message.notices)} notices are more than {MAX_NOTICED}")
        await self._delivery.noticed(message.notices)

    async def _finish(self, message: wire.Finish) -> None:
        # Out of `held` first: its own report must not come back to it as a Cancel.
        holding = self.held.pop(message.task, None)
        plane = self._plane
        try:
            task = await plane.store.write_batched(
                life.finish_all,
                life.Report(
                    task_id=message.task,
                    token=message.token,
                    outcome=message.outcome,
                    retry_of=plane.control.dispatch.retry,
                    roll=random.random(),  # noqa: S311 - spreads retries, guards nothing
                    actor=self.key.actor,
                    now_us=plane.clock.now_us(),
                    exit_code=message.exit_code,
                    result=message.result,
                    error=message.error,
                    usage=message.usage,
                    until_us=None if message.until is None else from_datetime(message.until),
                ),
            )
        except StoreError:
            if holding is not None:
                self.held[message.task] = holding
            raise
        except TaskError:
            # Its attempt is over, but so is its session now, for which a handoff may wait.
            plane.unsettled.session_over(message.task, of=self.orchestrator)
            raise
        plane.pulse.nudge()
        await self._send(wire.Finished(id=message.id, status=task.status))

    async def _send(self, message: wire.ToDaemon) -> None:
        text = msgspec.json.encode(message).decode()
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S), self._sending:
                await self._socket.send({"type": "websocket.send", "text": text, "bytes": None})
        except TimeoutError:
            raise Closed(TRY_LATER, f"the daemon did not read for {SEND_TIMEOUT_S:g} s") from None
        except GONE as problem:
            raise Closed(NORMAL, "the daemon hung up") from problem
