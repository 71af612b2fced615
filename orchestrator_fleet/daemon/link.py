"""The daemon's end of the WebSocket: connects for ever, asks and gets answers by id, receives what is pushed.

One connection at a time. When it breaks, every question in flight fails with LinkDown and the next connection
begins with a Hello that tells all that is held: the control plane's answer to that is the truth again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from orchestrator_fleet import keys, log
from orchestrator_fleet.daemon import backoff
from orchestrator_fleet.daemon.status import CONNECTED, CONNECTING, REFUSED, UNAUTHORIZED
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.wire.link import (
    MAX_FRAME_BYTES,
    PATH,
    Beat,
    Beaten,
    Cancel,
    Claim,
    Claimed,
    Finish,
    Finished,
    Hello,
    Log,
    Notice,
    Noticed,
    Problem,
    ToDaemon,
    Welcome,
)

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0  # a control plane that comes back has its fleet within this
REFUSED_DELAY_S, LONGEST_REFUSED_DELAY_S = 10.0, 15.0
STABLE_S = 5.0
OPEN_TIMEOUT_S = 10.0
WELCOME_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 0.5
MAX_DETAIL_CHARS = 500
_MAX_KEY_FILE_BYTES = 4096
_UNAUTHORIZED_STATUS = frozenset({401, 403})
_POLICY_CLOSE = 1008

A = TypeVar("A", Claimed, Beaten, Finished)

_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[ToDaemon] = msgspec.json.Decoder(ToDaemon)
_log = log.get(__name__)


class LinkDown(FleetError):
    """The link broke, or was never up; ask again when it is."""


class Declined(FleetError):
    """The control plane understood and said no; `code` is its word for why."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        super().__init__(f"{code}: {detail}")


class Unauthorized(FleetError):
    """The daemon's key is not accepted, or there is none."""


class Garbage(FleetError):
    """The other side sent what no control plane sends."""


class Listener(Protocol):
    """Who hears of what happens on the link. Nothing of this may block."""

    def hello(self) -> Hello:
        """Who is calling and what it holds, now."""

    def welcomed(self, hello: Hello, welcome: Welcome) -> None:
        """The control plane answered `hello`."""

    def cancelled(self, cancel: Cancel) -> None:
        """An attempt's session is to be ended."""

    def told(self, notice: Notice) -> None:
        """Others tell this orchestrator something; it comes again until it is noticed."""

    def link_changed(self, state: str, detail: str) -> None:
        """The link is in another state (the words of the status file)."""


class Link:
    """The link to `address()`, with the key in `key_file`; both are read anew at each connection."""

    def __init__(self, *, address: Callable[[], str], key_file: Path, listener: Listener) -> None:
        self._address, self._key_file, self._listener = address, key_file, listener
        self._socket: ClientConnection | None = None
        self._up = asyncio.Event()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[ToDaemon]] = {}
        self._again = asyncio.Event()
        self._fault = ""

    @property
    def is_up(self) -> bool:
        """Whether something can be asked now."""
        return self._up.is_set()

    async def up(self) -> None:
        """Return when the link is up."""
        await self._up.wait()

    def renew(self) -> None:
        """Connect anew at once: who we are has changed. Nothing more is said on the connection that stands."""
        self._down()
        self._again.set()

    def _give_up(self, fault: str) -> LinkDown:
        """Break the connection because of what the other side does; connecting anew waits its turn."""
        self._fault = fault
        self._again.set()
        return LinkDown(fault)

    async def ask(self, message: Claim | Beat | Finish, answer: type[A], *, timeout_s: float) -> A:
        """Send and wait for the answer. Raises LinkDown, or Declined when the answer is a Problem.

        An answer that doesn't come in time breaks the connection: what we know of the other side is not so.
        """
        number = next(self._ids)
        waiting: asyncio.Future[ToDaemon] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            await self.tell(msgspec.structs.replace(message, id=number))
            async with asyncio.timeout(timeout_s):
                found = await waiting
        except TimeoutError as error:
            raise self._give_up(f"no answer to {type(message).__name__} within {timeout_s:g} s") from error
        finally:
            del self._waiting[number]
        if isinstance(found, Problem):
            raise Declined(found.code, found.detail)
        if not isinstance(found, answer):
            raise self._give_up(f"got {type(found).__name__} in answer to {type(message).__name__}")
        return found

    async def tell(self, message: Hello | Claim | Beat | Finish | Log | Noticed) -> None:
        """Send; raises LinkDown."""
        socket = self._socket
        if socket is None:
            raise LinkDown("the link is down")
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await socket.send(_encode(message).decode())
        except ConnectionClosed as error:
            # Down for whoever asks again, before the reader notices: it could not, while somebody asks in a circle.
            if self._socket is socket:
                self._socket = None
                self._up.clear()
            raise LinkDown(str(error)) from error
        except TimeoutError as error:
            raise self._give_up(f"nothing could be sent for {SEND_TIMEOUT_S:g} s") from error

    async def run(self) -> None:
        """Keep the link up until cancelled."""
        failures = 0
        loop = asyncio.get_running_loop()
        old: ClientConnection | None = None
        while True:
            self._again.clear()
            self._fault = ""
            began = loop.time()
            try:
                old = await self._connect_once(old)
            except Unauthorized as error:
                state, detail = UNAUTHORIZED, str(error)
            except Declined as error:
                state, detail = REFUSED, str(error)
            except (Garbage, OSError, TimeoutError, WebSocketException, ValueError) as error:
                state, detail = CONNECTING, str(error) or type(error).__name__
            else:
                failures = 0
                continue
            old = None
            self._listener.link_changed(state, detail[:MAX_DETAIL_CHARS])
            failures = 0 if loop.time() - began >= STABLE_S else failures + 1
            await self._pause(pause_s(failures, state, backoff.chance()))

    async def _pause(self, seconds: float) -> None:
        """Wait, or until somebody wants a new connection."""
        if self._fault:
            self._again.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._again.wait()

    async def _connect_once(self, old: ClientConnection | None) -> ClientConnection:
        """One connection, from its opening to its end.

        Returns only when it is to be renewed, and then the connection, still open and no longer read: the next
        takes its place before it is closed, so that the control plane never sees this daemon gone.
        """
        try:
            address = self._address()
            socket = await self._open(address.rstrip("/"))
            try:
                if self._address() == address:
                    self._again.clear()  # the Hello that follows tells all that has changed so far
                await self._greet(socket)
            except BaseException:
                await socket.close()
                raise
        finally:
            if old is not None:
                await old.close()
        try:
            await self._receive(socket)
        except BaseException:
            self._down()
            await socket.close()
            raise
        self._down()
        return socket

    async def _open(self, address: str) -> ClientConnection:
        key = read_key(self._key_file)
        try:
            return await connect(
                f"ws{address.removeprefix('http')}{PATH}",
                additional_headers={"Authorization": f"Bearer {key}"},
                open_timeout=OPEN_TIMEOUT_S,
                close_timeout=CLOSE_TIMEOUT_S,
                ping_interval=None,  # beats find out about a dead link; more would only wake an idle daemon
                max_size=MAX_FRAME_BYTES,
                compression=None,  # costs memory per connection
                proxy=None,
            )
        except InvalidStatus as error:
            if error.response.status_code in _UNAUTHORIZED_STATUS:
                raise Unauthorized(f"{address} answers {error.response.status_code} to this daemon's key") from error
            raise

    async def _greet(self, socket: ClientConnection) -> None:
        """Hello and Welcome."""
        hello = msgspec.structs.replace(self._listener.hello(), id=next(self._ids))
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await socket.send(_encode(hello).decode())
                answer = decode(await socket.recv())
        except ConnectionClosed as error:
            if error.rcvd is not None and error.rcvd.code == _POLICY_CLOSE:
                raise Declined("refused", error.rcvd.reason or "the control plane closed the link") from error
            raise
        if isinstance(answer, Problem):
            raise Declined(answer.code, answer.detail)
        if not isinstance(answer, Welcome):
            raise Garbage(f"got {type(answer).__name__} in answer to Hello")
        self._socket = socket
        self._listener.welcomed(hello, answer)
        self._listener.link_changed(CONNECTED, "")
        self._up.set()

    async def _receive(self, socket: ClientConnection) -> None:
        """Hand on what comes, until the connection ends (raises) or is to be renewed (returns)."""
        again = asyncio.ensure_future(self._again.wait())
        try:
            while True:
                frame = asyncio.ensure_future(socket.recv())
                either: set[asyncio.Future[Any]] = {frame, again}
                try:
                    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not frame.done():
                        frame.cancel()
                if frame.done():
                    self._hand_on(decode(frame.result()))
                if self._fault:
                    raise Garbage(self._fault)
                if again.done():
                    return
        finally:
            again.cancel()

    def _hand_on(self, message: ToDaemon) -> None:
        if isinstance(message, Cancel):
            self._listener.cancelled(message)
        elif isinstance(message, Notice):
            self._listener.told(message)
        elif (waiting := self._waiting.get(message.id)) is not None and not waiting.done():
            waiting.set_result(message)
        else:
            _log.info("an answer nobody waits for", type=type(message).__name__, id=message.id)

    def _down(self) -> None:
        self._socket = None
        self._up.clear()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LinkDown("the link broke before the answer came"))


def decode(frame: str | bytes) -> ToDaemon:
    """One message; raises Garbage."""
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Garbage(f"got {frame[:80]!r}: {error}; is this a fleet control plane of this version?") from error


def read_key(path: Path) -> str:
    """The daemon's key; raises Unauthorized when there is none to use."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_KEY_FILE_BYTES).decode("ascii").strip()
    except OSError as error:
        raise Unauthorized(f"{path}: {error.strerror}; run `fleet apply` to make this daemon a key") from error
    except UnicodeDecodeError as error:
        raise Unauthorized(f"{path}: is no key; remove it and run `fleet apply`") from error
    if keys.parse(text) is None:
        raise Unauthorized(f"{path}: is no key or was cut short; remove it and run `fleet apply`")
    return text


def pause_s(failures: int, state: str, chance: float) -> float:
    """Seconds before the next connection, after so many failures in a row; `chance` is 0..1.

    A refusal needs a person, so it is asked for more seldom from the start.
    """
    refused = state in {UNAUTHORIZED, REFUSED}
    first_s, longest_s = (REFUSED_DELAY_S, LONGEST_REFUSED_DELAY_S) if refused else (FIRST_DELAY_S, LONGEST_DELAY_S)
    return backoff.delay_s(failures, first_s=first_s, longest_s=longest_s, chance=chance)
