"""`fleet serve`: the control plane as one process.

    lock ▶ socket ▶ control.json ▶ store ▶ loops + uvicorn ▶ serve.json ▶ ... ▶ signal ▶ links end ▶ history flushed

One process serves one state folder: the lock is flock's, so a killed server never leaves it behind. Several, each with
a folder of its own, may serve one PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import uvicorn
import uvloop
from sqlalchemy import Connection

from orchestrator_fleet import log
from orchestrator_fleet.api import key_watch, loops
from orchestrator_fleet.api.app import create_app
from orchestrator_fleet.api.attend import attend
from orchestrator_fleet.api.control import Control, current_generation, load
from orchestrator_fleet.api.govern import govern
from orchestrator_fleet.api.history import History
from orchestrator_fleet.api.keep_applied import keep_applied
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.settle import settle
from orchestrator_fleet.api.timekeeping import STEP_S, keep_time
from orchestrator_fleet.clock import SECOND_US, Clock, SteadyClock, to_rfc3339
from orchestrator_fleet.errors import FleetError, Refused
from orchestrator_fleet.orchestrators import actions, attendance
from orchestrator_fleet.orchestrators.presence import LEASE_S
from orchestrator_fleet.reconcile import declare
from orchestrator_fleet.reconcile.control import ensure_published
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.store import locks, outbox, time
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life
from orchestrator_fleet.wire.http import MAX_LEASE_S
from orchestrator_fleet.wire.link import MAX_FRAME_BYTES

SHUTDOWN_S = 3
BACKLOG = 1024
KEEP_ALIVE_S = 30
# Nobody could beat while we were down: until daemons have come back, no lease ends for that.
GRACE_S = LEASE_S
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8700

_log = log.get(__name__)


class Serving(msgspec.Struct, kw_only=True, frozen=True):
    """`serve.json`: where the running control plane is."""

    pid: int
    url: str
    started: str


def serve(fleet_file: Path, host: str | None, port: int | None) -> None:
    """Run the control plane until SIGTERM or SIGINT.

    Listens where `control_plane.url` says, but for `host` and `port` if given. Raises Refused when another one
    serves this state folder, FleetError when the port is taken, SpecInvalid when nothing was applied yet and
    fleet.yaml is wrong.
    """
    log.setup(stream=sys.stdout)
    for chatty in ("uvicorn", "uvicorn.error", "websockets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    state = State(fleet_file)
    with _alone(state):
        _finish_declaring(fleet_file)
        ensure_published(fleet_file)
        control = _current(state)
        told = urlsplit(control.doc.spec["control_plane"]["url"])
        wanted = port if port is not None else told.port or DEFAULT_PORT
        listener = _listen(host or told.hostname or DEFAULT_HOST, wanted)
        with contextlib.closing(listener), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(state, control, listener))


def _finish_declaring(fleet_file: Path) -> None:
    """Where the last run was killed between a commit and the files it is of: bring the files along."""
    try:
        if declare.finish(fleet_file):
            _log.info("finished a commit that was begun", fleet_file=str(fleet_file))
    except FleetError as problem:
        _log.error("a commit that was begun is not finished; the next one tries again", problem=str(problem))


def _current(state: State) -> Control:
    generation = current_generation(state.control_root)
    if generation is None:
        raise FleetError(f"{state.control_root}: has no current generation; run `fleet apply`")
    return load(state.control_root, generation)


async def _run(state: State, control: Control, listener: socket.socket) -> None:
    store = open_store(state.store_url(control.doc.spec["control_plane"]["store"]))
    clock = SteadyClock()
    try:
        plane = Plane(
            store=store,
            control=control,
            control_root=state.control_root,
            fleet_file=state.fleet_file,
            clock=clock,
            history=History(store_url=store.url, path=state.history),
            machines=state.machine_root,
        )
        clock.set(await store.read(time.now_us))
        await _begin(plane)
        await _serve(plane, state, listener, clock)
        await key_watch.write_uses(plane)
        try:
            await plane.history.close()
        except FleetError as problem:
            # Nothing is lost: the outbox keeps it for the next run.
            _log.error("history is not up to date", problem=str(problem))
    finally:
        store.close()
    _log.info("ended")


async def _begin(plane: Plane) -> None:
    """Put the store in order after whatever ended the last run."""
    now_us = plane.clock.now_us()

    def tidy(conn: Connection) -> None:
        # Where another one serves the same store, its daemons are there, and nobody was kept from beating.
        if not locks.alone(conn):
            return
        attendance.all_gone(conn, reason="the control plane started anew", now_us=now_us)
        actions.abandon(conn, now_us=now_us)
        if (back_us := outbox.newest_at(conn) - now_us) > STEP_S * SECOND_US:
            life.after_step(conn, by_us=-back_us, lease_s=LEASE_S, longest_s=MAX_LEASE_S, now_us=now_us)
        life.hold_all(conn, until_us=now_us + round(GRACE_S * SECOND_US))

    await plane.store.write(tidy)
    await plane.pulse.start()
    await loops.in_force(plane)


async def _serve(plane: Plane, state: State, listener: socket.socket, clock: SteadyClock) -> None:
    server = _Server(
        uvicorn.Config(
            create_app(plane),
            loop="none",
            http="httptools",
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME_BYTES,
            ws_per_message_deflate=False,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )
    beside = [
        asyncio.create_task(loops.supervised(name, loop), name=name)
        for name, loop in (
            ("pulse", plane.pulse.run),
            ("reload", lambda: loops.reload(plane)),
            ("sweep", lambda: loops.sweep(plane)),
            ("time", lambda: keep_time(plane, clock)),
            ("ingest", lambda: loops.ingest(plane)),
            ("forget", lambda: loops.forget(plane)),
            ("revocations", lambda: key_watch.follow_revocations(plane)),
            ("uses", lambda: key_watch.keep_uses(plane)),
            ("attend", lambda: attend(plane)),
            ("settle", lambda: settle(plane)),
            ("help", lambda: loops.follow_help(plane)),
            ("govern", lambda: govern(plane)),
            ("route", lambda: loops.route_again(plane)),
            ("schedules", lambda: loops.follow_schedules(plane)),
            ("keep applied", lambda: keep_applied(plane)),
        )
    ]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, plane, server)
    with _announced(state, listener, clock):
        await server.serve(sockets=[listener])
    await plane.reconciler.close()
    for task in beside:
        task.cancel()
    await asyncio.gather(*beside, return_exceptions=True)


def _stop(plane: Plane, server: uvicorn.Server) -> None:
    _log.info("closing")
    plane.close()
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: it would end the process by the signal, and not with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to `_serve`."""
        yield


@contextlib.contextmanager
def _announced(state: State, listener: socket.socket, clock: Clock) -> Iterator[None]:
    """serve.json stands while we listen."""
    serving = Serving(pid=os.getpid(), url=_url(listener), started=to_rfc3339(clock.now_us()))
    part = state.serve_file.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(serving) + b"\n")
    part.replace(state.serve_file)
    _log.info("listening", url=serving.url, pid=serving.pid)
    try:
        yield
    finally:
        state.serve_file.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(state: State) -> Iterator[None]:
    state.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state.dir / "serve.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(_who_serves(state)) from None
        yield


def _who_serves(state: State) -> str:
    try:
        other = msgspec.json.decode(state.serve_file.read_bytes(), type=Serving)
    except (OSError, msgspec.DecodeError):
        return f"{state.dir}: another `fleet serve` is starting here; wait for it, or end it first"
    return f"{state.dir}: another `fleet serve` runs here, pid {other.pid} at {other.url}; end it first"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise FleetError(
            f"cannot listen on {host}:{port}: {error.strerror}; give another with --port, or change control_plane.url"
        ) from error
    listener.setblocking(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
