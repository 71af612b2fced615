"""The other end of the link: a real WebSocket server that speaks wire.link and does what a test tells it to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from orchestrator_fleet.wire import link as wire

_decoder = msgspec.json.Decoder(wire.FromDaemon)
Answer = wire.ToDaemon | str | None


def finished(_: wire.Finish) -> Answer:
    """It is written down."""
    return wire.Finished(status="DONE")


class ScriptedPlane:
    """Keeps all it hears. `on_finish` answers a Finish; None drops the connection instead."""

    def __init__(self) -> None:
        self.heard: list[wire.FromDaemon] = []
        self.connections = 0
        self.refuse: HTTPStatus | None = None
        self.greeting: Callable[[wire.Hello], Answer] = self._welcome
        self.on_finish: Callable[[wire.Finish], Answer] = finished
        self.lost: set[str] = set()
        self.beat_s = 0.2
        self._lock = threading.RLock()
        self._ready: list[wire.Grant] = []
        self._granted: list[wire.Grant] = []
        self._claim: tuple[ServerConnection, wire.Claim] | None = None
        self._open: set[ServerConnection] = set()
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    # As tests use it.

    def start(self) -> None:
        """Listen; on the same port as before, if it did before."""
        self._server = serve(self._serve, "127.0.0.1", self.port, process_request=self._door, compression=None)
        self.port = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def stop(self) -> None:
        """Go away with all connections."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self.drop()
        self._thread.join(10)
        self._server = None

    @property
    def url(self) -> str:
        """What stands in the daemon's document."""
        return f"http://127.0.0.1:{self.port}"

    def grant(self, task: str, *, token: str = "", attempt: int = 1, **fields: Any) -> wire.Grant:
        """Put a task into the line; the waiting claim gets it at once."""
        grant = wire.Grant(task={"id": task, "title": "a task", **fields}, attempt=attempt, token=token or f"t-{task}")
        with self._lock:
            self._ready.append(grant)
            self._hand_out()
        return grant

    def push(self, message: wire.ToDaemon | str) -> None:
        """Send to every connected daemon, unasked."""
        for connection in list(self._open):
            _send(connection, message)

    def drop(self) -> None:
        """Cut every connection, without a goodbye."""
        for connection in list(self._open):
            _cut(connection)

    def of(self, kind: type[Any]) -> list[Any]:
        """All messages of one kind, in order."""
        with self._lock:
            return [message for message in self.heard if isinstance(message, kind)]

    def finish_of(self, task: str) -> wire.Finish | None:
        """How the task ended, if it has."""
        return next((finish for finish in self.of(wire.Finish) if finish.task == task), None)

    def log_of(self, task: str, stream: str = "stdout") -> str:
        """All text of one stream, as it came."""
        return "".join(m.text for m in self.of(wire.Log) if m.task == task and m.stream == stream)

    @property
    def claim(self) -> wire.Claim | None:
        """The claim that waits now."""
        return self._claim[1] if self._claim is not None else None

    @property
    def open(self) -> int:
        """How many connections stand."""
        return len(self._open)

    # As the daemon meets it.

    def _door(self, connection: ServerConnection, request: Request) -> Response | None:
        self.connections += 1
        assert request.path == wire.PATH
        assert request.headers["Authorization"].startswith("Bearer fleet_k-")
        return connection.respond(self.refuse, "no") if self.refuse is not None else None

    def _serve(self, connection: ServerConnection) -> None:
        self._open.add(connection)
        try:
            for frame in connection:
                message = _decoder.decode(frame)
                with self._lock:
                    self.heard.append(message)
                    if not self._answer(connection, message):
                        return
        except (ConnectionClosed, OSError):
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
                if self._claim is not None and self._claim[0] is connection:
                    self._claim = None

    def _answer(self, connection: ServerConnection, message: wire.FromDaemon) -> bool:
        """Whether the connection goes on."""
        answer: Answer
        match message:
            case wire.Hello():
                self._take_back(message)
                answer = self.greeting(message)
            case wire.Beat():
                answer = wire.Beaten(lost=tuple(held.task for held in message.held if held.task in self.lost))
            case wire.Finish():
                answer = self.on_finish(message)
            case wire.Claim():
                self._claim = (connection, message)
                self._hand_out()
                return True
            case wire.Log() | wire.Noticed():
                return True
        if answer is None:
            _cut(connection)
            return False
        _send(connection, answer if isinstance(answer, str) else msgspec.structs.replace(answer, id=message.id))
        return True

    def _welcome(self, hello: wire.Hello) -> Answer:
        lost = tuple(held.task for held in hello.held if held.task in self.lost)
        return wire.Welcome(beat_s=self.beat_s, lease_s=30.0, lost=lost)

    def _take_back(self, hello: wire.Hello) -> None:
        """What was granted and has not arrived is given out again."""
        over = {held.token for held in hello.held} | {finish.token for finish in self.of(wire.Finish)}
        self._ready[:0] = [grant for grant in self._granted if grant.token not in over]
        self._granted.clear()

    def _hand_out(self) -> None:
        if self._claim is None or not self._ready:
            return
        (connection, claim), self._claim = self._claim, None
        grants, self._ready = self._ready[: claim.limit], self._ready[claim.limit :]
        self._granted += grants
        _send(connection, wire.Claimed(id=claim.id, grants=tuple(grants)))


def _send(connection: ServerConnection, message: wire.ToDaemon | str) -> None:
    with suppress(ConnectionClosed, OSError):  # the daemon hung up, which tests do on purpose
        connection.send(message if isinstance(message, str) else msgspec.json.encode(message).decode())


def _cut(connection: ServerConnection) -> None:
    with suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)
