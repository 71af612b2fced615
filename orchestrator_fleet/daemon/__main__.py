"""`python -m orchestrator_fleet.daemon NAME`: one life of an orchestrator's daemon, from start to signal.

SIGTERM, SIGINT and the end of supervisord end it at once and leave its sessions running for the next one; SIGHUP
makes it read its generation again. One daemon of a name works at a time: a second waits for the first to go.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from orchestrator_fleet import ids, log, pids
from orchestrator_fleet.clock import Clock, SystemClock
from orchestrator_fleet.daemon import processes
from orchestrator_fleet.daemon.engine import Engine, Place
from orchestrator_fleet.daemon.generation import Reader
from orchestrator_fleet.daemon.status import StatusFile
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, FleetError, UsageError

LOCK_TIMEOUT_S = 15.0
LOCK_POLL_S = 0.1
GENERATION_POLL_S = 5.0
PARENT_POLL_S = 1.0
FAULT_PAUSE_S = 2.0  # supervisord starts us again at once; a fault that stays must not eat the machine
_PRIVATE = 0o077

_log = log.get(__name__)


class AlreadyRunning(FleetError):
    """Another daemon of this name works on this machine and doesn't go."""


def place_of(arguments: list[str], environ: Mapping[str, str]) -> Place:
    """Who we are, by the command line and the environment supervisord was given; raises UsageError."""
    if len(arguments) != 1 or not ids.is_name(arguments[0]):
        raise UsageError(f"got {arguments!r}; usage: python -m orchestrator_fleet.daemon NAME")
    missing = [name for name in ("FLEET_ROOT", "FLEET_MACHINE") if not environ.get(name)]
    if missing:
        raise UsageError(
            f"not in the environment: {', '.join(missing)}; supervisord sets them, `fleet apply` starts it"
        )
    root = Path(environ["FLEET_ROOT"]).absolute()
    return Place(
        name=arguments[0],
        machine=environ["FLEET_MACHINE"],
        root=root,
        home=Path(environ.get("FLEET_HOME") or root).absolute(),
        program=environ.get("FLEET_PROGRAM", ""),
    )


async def live(place: Place, clock: Clock) -> None:
    """One life: until a signal, the end of our parent, or a fault (which is raised)."""
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    work = asyncio.create_task(_work(place, clock, reload))
    ends = [asyncio.create_task(stop.wait()), asyncio.create_task(_parent_ended(place))]
    await asyncio.wait({work, *ends}, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    if work.done():
        work.result()
    _log.info("leaving", reason="signal" if stop.is_set() else "supervisord ended")
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work


async def _work(place: Place, clock: Clock, reload: asyncio.Event) -> None:
    lock = await take_lock(place.lock_file)
    try:
        status = StatusFile(place.status_file, program=place.program, clock=clock)
        status.write()
        reader = Reader(place.root, place.name)
        reader.refresh()
        while reader.good is None:
            status.note(problem=reader.problem, link_detail="waiting for a generation")
            await _set_or_timeout(reload, GENERATION_POLL_S)
            reader.refresh()
        engine = Engine(place=place, reader=reader, generation=reader.good, status=status, clock=clock)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.run())
            tasks.create_task(_reloads(engine, reload))
    finally:
        os.close(lock)


async def _reloads(engine: Engine, reload: asyncio.Event) -> None:
    while True:
        await reload.wait()
        reload.clear()
        engine.reload()


async def _set_or_timeout(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()


async def _parent_ended(place: Place) -> None:
    """Return when the process that started us is gone: supervisord can't be left behind by its programs."""
    pid = os.getppid()
    if "SUPERVISOR_ENABLED" in os.environ and _supervisord(place) not in {None, pid}:
        return  # it ended before we came this far
    parent = pids.identify(pid)
    if parent is not None:
        await processes.ended(parent)
    while os.getppid() == pid:  # noqa: ASYNC110 - a parent outside our sight tells nobody of its end
        await asyncio.sleep(PARENT_POLL_S)


def _supervisord(place: Place) -> int | None:
    """The pid of this machine's supervisord by its own word."""
    try:
        return int((place.root / "run" / "supervisord.pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


async def take_lock(path: Path) -> int:
    """The open lock; raises AlreadyRunning when another holds it longer than `LOCK_TIMEOUT_S`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = asyncio.get_running_loop().time() + LOCK_TIMEOUT_S
    while True:
        descriptor = _try_lock(path)
        if descriptor is not None:
            return descriptor
        if asyncio.get_running_loop().time() >= deadline:
            raise AlreadyRunning(f"{path}: held by process {_holder(path)} for more than {LOCK_TIMEOUT_S:g} s; end it")
        await asyncio.sleep(LOCK_POLL_S)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:  # else it was removed while we waited
            os.ftruncate(descriptor, 0)
            os.write(descriptor, b"%d\n" % os.getpid())
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip() or "unknown"
    except (OSError, UnicodeDecodeError):
        return "unknown"


def main() -> int:
    """The process; its exit code."""
    os.umask(_PRIVATE)
    try:
        place = place_of(sys.argv[1:], os.environ)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    log.setup(stream=sys.stdout, process="daemon", orchestrator=place.name, machine=place.machine)
    try:
        asyncio.run(live(place, SystemClock()))
    except FleetError as error:
        _log.error("can't go on", problem=str(error))
        code = error.exit_code
    except Exception:  # noqa: BLE001 - the last door: it is told with its traceback, and ends the process
        _log.exception("fault")
        code = EXIT_FAILED
    else:
        return EXIT_DONE
    time.sleep(FAULT_PAUSE_S)
    return code


if __name__ == "__main__":
    sys.exit(main())
