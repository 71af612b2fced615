"""One session from claim to end: started detached, watched, ended when it must be, and judged by what it left.

The state stands in the session's folder, so that a daemon that comes later can go on with it. The order of writes
leaves no gap: the record before the start, the session's own word of who it is before anything runs, the exit
code in one rename after all that, and how it ended before anybody is told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_fleet import log, pids
from orchestrator_fleet.clock import SECOND_US, Clock
from orchestrator_fleet.daemon import outcome, processes, references, workspace
from orchestrator_fleet.daemon.folder import Record, SessionFolder
from orchestrator_fleet.daemon.generation import Generation
from orchestrator_fleet.daemon.link import LinkDown
from orchestrator_fleet.daemon.output import MAX_OUTPUT_BYTES, Output, Tell
from orchestrator_fleet.daemon.runners import claude_code, command
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.wire.link import Finish, Grant, Held

TURN_S = 0.2
GRACE_S = 5.0
REAP_S = 5.0
LOST = "lost"

_log = log.get(__name__)


class SessionFailed(FleetError):
    """The session can't be started; `for_good` when trying again can't help."""

    def __init__(self, problem: str, *, for_good: bool = False) -> None:
        self.for_good = for_good
        super().__init__(problem)


class Session:
    """One attempt on this machine, running or over and not told yet."""

    def __init__(self, *, folder: SessionFolder, record: Record, timeout_s: float, clock: Clock) -> None:
        self.folder, self.record = folder, record
        self.output = Output(folder)
        self._timeout_s, self._clock = timeout_s, clock
        self._child: subprocess.Popen[bytes] | None = None
        self._cause: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def held(self) -> Held:
        """How the link names it."""
        return Held(task=self.record.task, token=self.record.token)

    def end(self, cause: str) -> None:
        """End it soon, because of `cause`; the first cause counts."""
        if not self._cause.done():
            self._cause.set_result(cause)

    @property
    def cause(self) -> str:
        """Why the daemon ended it; empty when it didn't."""
        return self._cause.result() if self._cause.done() else ""

    async def start(self, *, grant: Grant, generation: Generation, home: Path, inbox: Path) -> None:
        """Make the folder and start the process; raises SessionFailed, having started nothing."""
        try:
            self.folder.create()
            self.folder.keep(self.record)
        except OSError as error:
            raise SessionFailed(f"no session folder could be made: {error}") from error
        doc = generation.doc
        if doc.runner.type != "command":
            raise SessionFailed(claude_code.unavailable(doc.name), for_good=True)
        if not doc.runner.command:
            raise SessionFailed("runner.command is empty; set it in fleet.yaml and run `fleet apply`", for_good=True)
        try:
            place = workspace.choose(doc.workspace, folder=self.folder.path, fleet_home=home) if doc.workspace else None
        except workspace.WorkspaceInvalid as error:
            raise SessionFailed(str(error), for_good=True) from error
        try:
            secrets = await references.resolve_all(doc.runner.secrets, home=home)
        except references.SecretUnavailable as error:
            raise SessionFailed(str(error)) from error
        if self._cause.done():
            return
        told: dict[str, Any] = {**grant.task, **({"workspace": str(place.path)} if place else {})}
        start = command.launch(
            generation=generation,
            folder=self.folder,
            task=self.record.task,
            attempt=self.record.attempt,
            workspace=place,
            secrets=secrets,
            inbox=inbox,
            environ=os.environ,
        )
        try:
            self.folder.task.write_bytes(msgspec.json.encode(told) + b"\n")
            self.folder.copy_assets(generation.assets, doc.assets)
            self._child = _spawn(start, self.folder)
        except (OSError, ValueError) as error:
            raise SessionFailed(f"the session can't be started: {error}") from error
        identity = pids.identify(self._child.pid)
        self._keep(pid=self._child.pid, start_ticks=identity.start_ticks if identity else 0)

    async def work(self, tell: Tell) -> Finish | None:
        """From a process that runs (or is over, or never was) to what is to be told; None when the lease was lost."""
        process = pids.Process(pid=self.record.pid, start_ticks=self.record.start_ticks)
        if pids.is_alive(process):
            over = asyncio.ensure_future(processes.ended(process))
            try:
                await self._watch(over, tell)
                if not over.done():
                    await self._ladder(process, over)
            finally:
                over.cancel()
        self._leave_nothing()
        return self._conclude()

    async def _watch(self, over: asyncio.Future[None], tell: Tell) -> None:
        """Until it is over or has to end: send its output, hold it to its limits."""
        left_s = (self.record.deadline_us - self._clock.now_us()) / SECOND_US
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(max(left_s, 0.0), self._timeout_s)  # a clock set back lengthens nothing
        while not over.done() and not self._cause.done():
            turn_s = max(0.0, min(TURN_S, deadline - loop.time()))
            either: set[asyncio.Future[Any]] = {over, self._cause}
            await asyncio.wait(either, timeout=turn_s, return_when=asyncio.FIRST_COMPLETED)
            with suppress(LinkDown):  # what is not sent stays unsent, and goes once the link is up
                await self.output.send_new(tell)
            if over.done():
                return
            if self.output.size() > MAX_OUTPUT_BYTES:
                self.end(outcome.FLOOD)
            if loop.time() >= deadline:
                self.end(outcome.TIMEOUT)

    async def _ladder(self, process: pids.Process, over: asyncio.Future[None]) -> None:
        """TERM to the process group; after `GRACE_S`, KILL."""
        _log.info("ending session", task=self.record.task, attempt=self.record.attempt, cause=self.cause)
        for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, REAP_S)):
            processes.signal_group(process, number)
            await asyncio.wait({over}, timeout=wait_s)
            if over.done():
                return

    def _leave_nothing(self) -> None:
        """End what the session left running, and take in the exit of our child."""
        left = processes.sweep(self.folder.mark)
        if left:
            _log.info("ended what the session left running", task=self.record.task, processes=left)
        if self._child is not None and self._child.poll() is None:
            _log.error("the session's process does not end", task=self.record.task, pid=self.record.pid)

    def _conclude(self) -> Finish | None:
        """Write down how it ended; None when the lease was lost."""
        if self.cause == LOST:
            self._keep(told=True)
            return None
        return self._finish(
            outcome.conclude(
                task=self.record.task,
                token=self.record.token,
                folder=self.folder,
                cause=self.cause,
                timeout_s=self._timeout_s,
            )
        )

    def fail(self, error: str, *, for_good: bool = False) -> Finish:
        """Write down that it failed by something that is not of its own making; nothing of it runs on."""
        self._leave_nothing()
        return self._finish(
            outcome.failed(task=self.record.task, token=self.record.token, error=error, for_good=for_good)
        )

    def _finish(self, finish: Finish) -> Finish:
        """Write down, durably, what the control plane is to be told."""
        self._keep(finished=finish, durable=True)
        return finish

    def told(self) -> None:
        """The control plane has answered: there is nothing more to tell."""
        self._keep(told=True)

    def _keep(self, *, durable: bool = False, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)
        try:
            self.folder.keep(self.record, durable=durable)
        except OSError as error:
            # A full disk must not end the daemon: what it knows in memory still reaches the control plane.
            _log.error("the session's record can't be written", task=self.record.task, problem=str(error))


def _spawn(start: command.Launch, folder: SessionFolder) -> subprocess.Popen[bytes]:
    """Start it in a session (setsid) of its own, with files instead of pipes: it needs no daemon to go on."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    opened: list[int] = []
    try:
        opened.append(os.open(folder.task, os.O_RDONLY))
        opened.extend(os.open(path, append, 0o600) for path in (folder.stdout, folder.stderr))
        return subprocess.Popen(
            start.argv,
            cwd=folder.path,
            env=dict(start.environment),
            stdin=opened[0],
            stdout=opened[1],
            stderr=opened[2],
            start_new_session=True,
        )
    finally:
        for descriptor in opened:
            os.close(descriptor)
