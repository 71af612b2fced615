"""Sixteen daemons on the wire, for `scripts/bench queue`: they speak the link's protocol and run nothing.

    poster ──POST /api/tasks──▶ fleet serve ──Claimed──▶ daemon ──Finish──▶ fleet serve
             sent_at                          delivered_at

All of them live in this process, so one clock times both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect

from orchestrator_fleet import keys
from orchestrator_fleet.orchestrators.presence import BEAT_S
from orchestrator_fleet.store.daemon_keys import register_daemon_keys
from orchestrator_fleet.wire import link as wire

POSTERS = 16
WAIT_S = 10.0
DEADLINE_S = 300.0
CREATED = 201
_decoder = msgspec.json.Decoder(wire.ToDaemon)
_encoder = msgspec.json.Encoder()


class Load:
    """What was sent and what came back, of tasks by number. A daemon works only while `working` is set."""

    def __init__(self) -> None:
        self.sent_at: dict[int, float] = {}
        self.delivered_at: dict[int, float] = {}
        self.finished = 0
        self.finished_at = 0.0
        self.working = asyncio.Event()
        self._moved = asyncio.Event()

    def begin(self) -> None:
        """Count anew."""
        self.sent_at, self.delivered_at, self.finished = {}, {}, 0

    def finish(self) -> None:
        """The control plane has written one down as done."""
        self.finished, self.finished_at = self.finished + 1, time.perf_counter()
        self._moved.set()

    async def all_finished(self, count: int) -> None:
        """Wait for it; ends the benchmark after DEADLINE_S without."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while self.finished < count:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            raise SystemExit(f"bench: {self.finished} of {count} tasks were done in {DEADLINE_S:g} s") from None


class Daemon:
    """One orchestrator's connection: claims whenever it has a free session, and is done with a task at once."""

    def __init__(self, socket: ClientConnection, load: Load, sessions: int) -> None:
        self._socket, self._load, self._sessions = socket, load, sessions
        self._ids = itertools.count(1)

    async def run(self, hello: wire.Hello) -> None:
        """Until it is cancelled."""
        await self._send(hello)
        beating = asyncio.create_task(self._beat())
        try:
            await self._load.working.wait()
            await self._claim()
            async for frame in self._socket:
                await self._hear(_decoder.decode(frame))
        finally:
            beating.cancel()

    async def _hear(self, message: wire.ToDaemon) -> None:
        match message:
            case wire.Claimed():
                now = time.perf_counter()
                for grant in message.grants:
                    self._load.delivered_at[int(grant.task["title"])] = now
                    await self._send(wire.Finish(task=grant.task["id"], token=grant.token, outcome="done"))
                await self._load.working.wait()
                await self._claim()
            case wire.Finished():
                self._load.finish()
            case wire.Problem():
                raise SystemExit(f"bench: the control plane said {message.code}: {message.detail}")

    async def _claim(self) -> None:
        await self._send(wire.Claim(limit=self._sessions, wait_s=WAIT_S, generation="g1", charter_version="c1"))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self._send(wire.Beat(held=(), generation="g1", charter_version="c1", sessions_max=self._sessions))

    async def _send(self, message: wire.FromDaemon) -> None:
        numbered = msgspec.structs.replace(message, id=next(self._ids))
        await self._socket.send(_encoder.encode(numbered).decode())


class Poster:
    """A connection that is kept open, one request at a time. As little as there can be, as it shares our cores."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self._reader, self._writer, self._head = reader, writer, head

    async def post(self, body: bytes) -> None:
        """Create a task. Ends the benchmark when it was not."""
        self._writer.write(f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status, lines = int(head[9:12]), head.lower().split("\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
        answer = await self._reader.readexactly(length)
        if status != CREATED:
            raise SystemExit(f"bench: POST /api/tasks -> {status} {answer[:300]!r}")

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


class Wire:
    """The daemons and posters of one control plane."""

    def __init__(self, load: Load, posters: Sequence[Poster], disciplines: Sequence[str]) -> None:
        self._load, self._posters, self._disciplines = load, posters, disciplines

    async def paced(self, rate: float, seconds: float) -> list[float]:
        """Create at a steady rate while the daemons wait; milliseconds from each POST to its delivery, sorted."""
        load, count = self._load, round(rate * seconds)
        load.begin()
        load.working.set()
        due, asked = time.perf_counter(), []
        for number in range(count):
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self._create(number, self._posters[number % len(self._posters)])))
        await asyncio.gather(*asked)
        await load.all_finished(count)
        return sorted((load.delivered_at[number] - load.sent_at[number]) * 1000 for number in range(count))

    async def created(self, count: int) -> float:
        """Create from all connections while no daemon claims; tasks a second."""
        self._load.begin()
        self._load.working.clear()
        begun = time.perf_counter()
        await self._create_all(count)
        return count / (time.perf_counter() - begun)

    async def drained(self, count: int) -> float:
        """Let the daemons do what was created; tasks a second."""
        begun = time.perf_counter()
        self._load.working.set()
        await self._load.all_finished(count)
        return count / (self._load.finished_at - begun)

    async def both(self, count: int) -> float:
        """Create and do at the same time; tasks a second from the first POST to the last that was done."""
        self._load.begin()
        self._load.working.set()
        begun = time.perf_counter()
        await self._create_all(count)
        await self._load.all_finished(count)
        return count / (self._load.finished_at - begun)

    async def _create_all(self, count: int) -> None:
        async def all_of(first: int, poster: Poster) -> None:
            for number in range(first, count, len(self._posters)):
                await self._create(number, poster)

        await asyncio.gather(*(all_of(first, poster) for first, poster in enumerate(self._posters)))

    async def _create(self, number: int, poster: Poster) -> None:
        discipline = self._disciplines[number % len(self._disciplines)]
        body = _encoder.encode({"title": str(number), "discipline": discipline})
        self._load.sent_at[number] = time.perf_counter()
        await poster.post(body)


@contextlib.asynccontextmanager
async def wired(url: str, *, key: str, daemons: Mapping[str, str], spec: dict[str, Any]) -> AsyncIterator[Wire]:
    """All daemons connected, all posters ready. `daemons`: each orchestrator's key."""
    default = spec["defaults"]["sessions"]["max"]
    load, told = Load(), urlsplit(url)
    async with contextlib.AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        running = []
        for number, (name, text) in enumerate(daemons.items()):
            sessions = spec["orchestrators"][name].get("sessions", {}).get("max", default)
            headers = {"Authorization": f"Bearer {text}"}
            socket = await stack.enter_async_context(
                connect(f"ws://{told.netloc}{wire.PATH}", additional_headers=headers, proxy=None, compression=None)
            )
            running.append(group.create_task(Daemon(socket, load, sessions).run(_hello(name, number, sessions))))
        posters = []
        for _ in range(POSTERS):
            reader, writer = await asyncio.open_connection(told.hostname, told.port)
            posters.append(Poster(reader, writer, _head(told.netloc, key)))
        try:
            yield Wire(load, posters, sorted({one["discipline"] for one in spec["orchestrators"].values()}))
        finally:
            for task in running:
                task.cancel()
            for poster in posters:
                poster.close()


def daemon_keys(names: Iterable[str], store_url: str) -> dict[str, str]:
    """A key for the daemon of each orchestrator, made known to the control plane as `fleet apply` does."""
    minted = {name: keys.mint() for name in names}
    rows = [(name, machine(number), minted[name].id, minted[name].sha256) for number, name in enumerate(minted)]
    register_daemon_keys(store_url, rows)
    return {name: key.text for name, key in minted.items()}


def machine(number: int) -> str:
    """Each daemon has a machine of its own."""
    return f"m{number + 1:02d}"


def _hello(name: str, number: int, sessions: int) -> wire.Hello:
    return wire.Hello(
        orchestrator=name,
        machine=machine(number),
        boot="bench",
        epoch=str(number),
        pid=1,
        generation="g1",
        charter_version="c1",
        sessions_max=sessions,
    )


def _head(host: str, key: str) -> str:
    lines = ("POST /api/tasks HTTP/1.1", f"host: {host}", f"authorization: Bearer {key}")
    return "".join(f"{line}\r\n" for line in (*lines, "content-type: application/json"))
