"""A daemon as the control plane sees it: a real WebSocket that speaks the link protocol, frame by frame."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from serving import ControlPlane
from websockets.asyncio.client import ClientConnection, connect

from orchestrator_fleet.wire import link as wire

TIMEOUT_S = 15.0
A = TypeVar("A")


class Peer:
    """One connection. What is pushed while an answer is awaited is kept, in `pushed` and in `notices`."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.pushed: list[wire.Cancel] = []
        self.notices: list[wire.Notice] = []
        self._ids = itertools.count(1)

    async def send(self, message: Any) -> int:
        """Send with the next id; answers it."""
        number = next(self._ids)
        await self.socket.send(msgspec.json.encode(msgspec.structs.replace(message, id=number)).decode())
        return number

    async def receive(self) -> Any:
        """The next message, whatever it is."""
        async with asyncio.timeout(TIMEOUT_S):
            return msgspec.json.decode(await self.socket.recv(), type=wire.ToDaemon)

    async def ask(self, message: Any, kind: type[A]) -> A:
        """Send, and return the answer with the same id, which must be of `kind`."""
        number = await self.send(message)
        while True:
            answer = await self.receive()
            if isinstance(answer, wire.Cancel):
                self.pushed.append(answer)
                continue
            if isinstance(answer, wire.Notice):
                self.notices.append(answer)
                continue
            assert answer.id == number
            assert isinstance(answer, kind), answer
            return answer

    async def cancelled(self) -> wire.Cancel:
        """The next Cancel that is pushed."""
        while not self.pushed:
            await self._take_push()
        return self.pushed.pop(0)

    async def told(self) -> wire.Notice:
        """The next Notice that is pushed."""
        while not self.notices:
            await self._take_push()
        return self.notices.pop(0)

    async def noticed(self, *notices: wire.Notice) -> None:
        """Say that these are kept."""
        await self.send(wire.Noticed(notices=tuple(notice.notice for notice in notices)))

    async def _take_push(self) -> None:
        answer = await self.receive()
        if isinstance(answer, wire.Notice):
            self.notices.append(answer)
            return
        assert isinstance(answer, wire.Cancel), answer
        self.pushed.append(answer)

    async def claim(self, *, limit: int = 1, wait_s: float = 10.0) -> tuple[wire.Grant, ...]:
        """Ask for tasks."""
        asked = wire.Claim(limit=limit, wait_s=wait_s, generation="g1", charter_version="c1")
        return (await self.ask(asked, wire.Claimed)).grants

    async def finish(self, grant: wire.Grant, outcome: str = "done", **fields: Any) -> str:
        """Report an end; answers the status."""
        told = wire.Finish(task=grant.task["id"], token=grant.token, outcome=outcome, **fields)
        return (await self.ask(told, wire.Finished)).status

    async def beat(self, *grants: wire.Grant, sessions_max: int = 2) -> tuple[str, ...]:
        """Answers what is lost."""
        held = tuple(wire.Held(task=grant.task["id"], token=grant.token) for grant in grants)
        asked = wire.Beat(held=held, generation="g1", charter_version="c1", sessions_max=sessions_max)
        return (await self.ask(asked, wire.Beaten)).lost

    async def log(self, grant: wire.Grant, text: str, *, offset: int = 0) -> None:
        """Send a piece of output."""
        await self.send(wire.Log(task=grant.task["id"], token=grant.token, stream="stdout", offset=offset, text=text))

    async def closed(self) -> tuple[int, str]:
        """Read until the control plane closes; its code and reason."""
        async with asyncio.timeout(TIMEOUT_S):
            await self.socket.wait_closed()
        return self.socket.close_code or 0, self.socket.close_reason or ""


def hello(
    orchestrator: str = "vp-a", *, held: tuple[wire.Held, ...] = (), sessions_max: int = 2, epoch: str = "e1"
) -> wire.Hello:
    return wire.Hello(
        orchestrator=orchestrator,
        machine="m01",
        boot="b1",
        epoch=epoch,
        pid=1,
        generation="g1",
        charter_version="c1",
        sessions_max=sessions_max,
        held=held,
    )


@asynccontextmanager
async def dialled(plane: ControlPlane, key: str, headers: dict[str, str] | None = None) -> AsyncIterator[Peer]:
    """A connection that has not said hello."""
    async with connect(
        plane.url.replace("http", "ws", 1) + wire.PATH,
        additional_headers={"Authorization": f"Bearer {key}", **(headers or {})},
        proxy=None,
        max_size=wire.MAX_FRAME_BYTES,
    ) as socket:
        yield Peer(socket)


@asynccontextmanager
async def connected(
    plane: ControlPlane, orchestrator: str = "vp-a", **said: Any
) -> AsyncIterator[tuple[Peer, wire.Welcome]]:
    """A daemon that is in."""
    name = f"daemon:{orchestrator}"
    key = plane.keys[name] if name in plane.keys else plane.daemon_key(orchestrator)
    async with dialled(plane, key) as peer:
        yield peer, await peer.ask(hello(orchestrator, **said), wire.Welcome)
