"""The daemon's loop: claims while there are free slots, works what it got, tells how it ended.

Four things run side by side for as long as the daemon lives: the link (connects for ever), the claims (one waiting
question at a time), the beats, and the inbox, which keeps what others tell. Each session has a task of its own from
claim to the answer to its Finish; until that answer the attempt is held, and holds its slot.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator_fleet import ids, log, pids
from orchestrator_fleet.clock import SECOND_US, Clock
from orchestrator_fleet.daemon import adoption, backoff, outcome
from orchestrator_fleet.daemon.folder import Record, SessionFolder, drop_old, is_safe_task_id
from orchestrator_fleet.daemon.generation import Generation, Reader
from orchestrator_fleet.daemon.inbox import Inbox
from orchestrator_fleet.daemon.link import Declined, Link, LinkDown
from orchestrator_fleet.daemon.sessions import LOST, Session, SessionFailed
from orchestrator_fleet.daemon.status import StatusFile
from orchestrator_fleet.wire.link import (
    Beat,
    Beaten,
    Cancel,
    Claim,
    Claimed,
    Finish,
    Finished,
    Grant,
    Held,
    Hello,
    Log,
    Notice,
    Noticed,
    Welcome,
)

CLAIM_WAIT_S = 30.0
ANSWER_TIMEOUT_S = 10.0
EMPTY_PAUSE_S = 1.0
RETRY_FIRST_S, RETRY_LONGEST_S = 0.5, 15.0
DEFAULT_BEAT_S = 5.0
SHORTEST_BEAT_S, LONGEST_BEAT_S = 0.1, 60.0
MAX_TOLD = 200  # notices that wait to be written down; what is more comes again
INVALID_CODE = "invalid"
TRY_AGAIN_CODES = frozenset({"unavailable", "internal", "rate_limited"})

_log = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Who this daemon is and where it stands. `root` is the machine's folder, `home` the fleet's."""

    name: str
    machine: str
    root: Path
    home: Path
    program: str

    @property
    def key_file(self) -> Path:
        """The daemon's own key."""
        return self.root / "keys" / f"{self.name}.key"

    @property
    def work(self) -> Path:
        """Where its session folders stand."""
        return self.root / "work" / self.name

    @property
    def status_file(self) -> Path:
        """What it tells of itself."""
        return self.root / "run" / f"{self.name}.json"

    @property
    def inbox_file(self) -> Path:
        """What it was told, for its sessions to read."""
        return self.root / "run" / f"{self.name}.inbox.jsonl"

    @property
    def lock_file(self) -> Path:
        """One daemon at a time holds it."""
        return self.root / "run" / f"{self.name}.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Teller:
    """Sends one session's output."""

    link: Link
    held: Held

    async def __call__(self, stream: str, offset: int, text: str) -> None:
        """Send a piece; raises LinkDown."""
        await self.link.tell(Log(task=self.held.task, token=self.held.token, stream=stream, offset=offset, text=text))


class Engine:
    """One life of a daemon. `run` ends only by being cancelled; sessions go on without it."""

    def __init__(
        self, *, place: Place, reader: Reader, generation: Generation, status: StatusFile, clock: Clock
    ) -> None:
        self._place, self._reader, self._status, self._clock = place, reader, status, clock
        self._generation = generation
        self._epoch = ids.new_token()
        self._boot = pids.boot_id()
        self._sessions: dict[str, Session] = {}
        self._beat_s = DEFAULT_BEAT_S
        self._slots_changed = asyncio.Event()
        self._link = Link(address=lambda: self._generation.doc.control_url, key_file=place.key_file, listener=self)
        self._inbox = Inbox(place.inbox_file)
        self._told: asyncio.Queue[Notice] = asyncio.Queue(MAX_TOLD)
        self._tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Adopt what is there, then work until cancelled."""
        async with self._tasks:
            for session in adoption.adopt(self._place.work, clock=self._clock):
                self._sessions[session.record.token] = session
                self._tasks.create_task(self._go_on(session))
            self._note()
            self._tasks.create_task(self._link.run())
            self._tasks.create_task(self._beats())
            self._tasks.create_task(self._claims())
            self._tasks.create_task(self._keep_told())

    def reload(self) -> None:
        """Read the generation again (SIGHUP); new sessions use it, running ones keep theirs.

        The status file is written in any case: an observer that misses it asks for it this way.
        """
        self._refresh(force=True)
        self._status.write()
        if not self._link.is_up:
            self._link.renew()

    def _refresh(self, *, force: bool = False) -> None:
        if not self._reader.refresh(force=force):
            return
        before, self._generation = self._generation, self._reader.good or self._generation
        self._note()
        if self._reader.problem:
            _log.error("the current generation can't be used; the last good one stays", problem=self._reader.problem)
        if self._generation != before:
            _log.info(
                "new generation",
                generation=self._generation.digest,
                charter_version=self._generation.doc.charter_version,
            )
            # The waiting claim names the old one. Coming anew, with what is held, replaces it.
            self._link.renew()
            self._slots_changed.set()

    def _note(self) -> None:
        self._status.note(
            generation=self._generation.digest,
            charter_version=self._generation.doc.charter_version,
            sessions=len(self._sessions),
            problem=self._reader.problem,
        )

    # What the link hears and asks.

    def hello(self) -> Hello:
        """Who this is, and what it holds."""
        return Hello(
            orchestrator=self._place.name,
            machine=self._place.machine,
            boot=self._boot,
            epoch=self._epoch,
            pid=os.getpid(),
            generation=self._generation.digest,
            charter_version=self._generation.doc.charter_version,
            sessions_max=self._generation.doc.sessions_max,
            held=self._held(),
        )

    def welcomed(self, hello: Hello, welcome: Welcome) -> None:
        """In: end what is no longer ours."""
        self._beat_s = min(max(welcome.beat_s, SHORTEST_BEAT_S), LONGEST_BEAT_S)
        self._lose(hello.held, welcome.lost)

    def cancelled(self, cancel: Cancel) -> None:
        """End the session of a cancelled task; its Finish tells when that is done."""
        session = self._sessions.get(cancel.token)
        if session is not None and session.record.task == cancel.task:
            _log.info("cancel", task=cancel.task, reason=cancel.reason)
            session.end(outcome.CANCELLED)

    def told(self, notice: Notice) -> None:
        """Let it be written down; the control plane hears of it after that."""
        with suppress(asyncio.QueueFull):
            self._told.put_nowait(notice)

    def link_changed(self, state: str, detail: str) -> None:
        """Put it into the status file, and the log."""
        _log.info("link", state=state, detail=detail)
        self._status.note(link=state, link_detail=detail)

    def _held(self) -> tuple[Held, ...]:
        return tuple(session.held for session in self._sessions.values())

    def _lose(self, held: Iterable[Held], lost: tuple[str, ...]) -> None:
        """End the attempts that were told as held and are lost; one claimed since then has another token."""
        for entry in held:
            if entry.task in lost and (session := self._sessions.get(entry.token)) is not None:
                _log.warning("lease lost", task=entry.task)
                session.end(LOST)

    # What runs side by side.

    async def _beats(self) -> None:
        while True:
            await self._link.up()
            await asyncio.sleep(self._beat_s)
            held = self._held()
            beat = Beat(
                held=held,
                generation=self._generation.digest,
                charter_version=self._generation.doc.charter_version,
                sessions_max=self._generation.doc.sessions_max,
            )
            try:
                beaten = await self._link.ask(beat, Beaten, timeout_s=ANSWER_TIMEOUT_S)
            except LinkDown:
                continue
            except Declined as error:
                _log.warning("beat refused", problem=str(error))
                continue
            self._lose(held, beaten.lost)

    async def _claims(self) -> None:
        loop = asyncio.get_running_loop()
        refusals = 0
        while True:
            await self._link.up()
            self._refresh()
            self._slots_changed.clear()
            free = self._generation.doc.sessions_max - len(self._sessions)
            if free <= 0:
                await self._slots_changed.wait()
                continue
            generation, asked_at = self._generation, loop.time()
            claim = Claim(
                limit=free,
                wait_s=CLAIM_WAIT_S,
                generation=generation.digest,
                charter_version=generation.doc.charter_version,
            )
            try:
                claimed = await self._link.ask(claim, Claimed, timeout_s=CLAIM_WAIT_S + ANSWER_TIMEOUT_S)
            except LinkDown:
                continue
            except Declined as error:
                refusals += 1
                _log.warning("claim refused", problem=str(error))
                await asyncio.sleep(_retry_s(refusals))
                continue
            refusals = 0
            for grant in claimed.grants:
                self._accept(grant, generation)
            if not claimed.grants and loop.time() - asked_at < EMPTY_PAUSE_S:
                await asyncio.sleep(EMPTY_PAUSE_S)  # a control plane that doesn't wait is not asked in a circle

    async def _keep_told(self) -> None:
        """Write what is told into the inbox, and say so. What can't be written comes again."""
        while True:
            some = [await self._told.get()]
            while not self._told.empty():
                some.append(self._told.get_nowait())
            try:
                await asyncio.to_thread(self._inbox.keep, some)
            except OSError as error:
                _log.error("the inbox can't be written", path=str(self._place.inbox_file), problem=str(error))
                continue
            with suppress(LinkDown):
                await self._link.tell(Noticed(notices=tuple(notice.notice for notice in some)))

    def _accept(self, grant: Grant, generation: Generation) -> None:
        """Take a granted task on. The generation is the one named in the claim: what runs is what is recorded."""
        task = grant.task.get("id")
        if not is_safe_task_id(task) or not isinstance(task, str):
            _log.error("a grant without a usable task id is ignored", task=repr(task)[:200])
            return
        folder = SessionFolder(self._place.work / f"{task}.{grant.attempt}")
        known = folder.record()
        if grant.token in self._sessions or (known is not None and known.token == grant.token):
            _log.info("a grant that came twice is ignored", task=task)
            return
        if any(session.folder.path == folder.path for session in self._sessions.values()):
            _log.error("another session has this attempt's folder; the grant is ignored", task=task)
            return
        now = self._clock.now_us()
        record = Record(
            task=task,
            token=grant.token,
            attempt=grant.attempt,
            generation=generation.digest,
            charter_version=generation.doc.charter_version,
            boot=self._boot,
            started_us=now,
            deadline_us=now + int(generation.doc.session_timeout_s * SECOND_US),
        )
        session = Session(folder=folder, record=record, timeout_s=generation.doc.session_timeout_s, clock=self._clock)
        self._sessions[grant.token] = session
        self._note()
        self._tasks.create_task(self._attempt(session, grant, generation))

    async def _attempt(self, session: Session, grant: Grant, generation: Generation) -> None:
        """From a fresh grant to the control plane's answer."""
        try:
            await session.start(grant=grant, generation=generation, home=self._place.home, inbox=self._place.inbox_file)
        except SessionFailed as error:
            _log.warning("session not started", task=session.record.task, problem=str(error))
            session.fail(str(error), for_good=error.for_good)
        except Exception as error:  # noqa: BLE001 - one session must not take the others' daemon with it
            self._fault(session, error)
        else:
            _log.info("session", task=session.record.task, attempt=session.record.attempt, pid=session.record.pid)
        await self._go_on(session)

    async def _go_on(self, session: Session) -> None:
        """From a session that runs, or is over, to the control plane's answer."""
        finish = session.record.finished
        if finish is None:
            try:
                finish = await session.work(self._teller(session))
            except Exception as error:  # noqa: BLE001 - as above
                finish = self._fault(session, error)
        if finish is not None:
            await self._deliver(session, finish)
        del self._sessions[session.record.token]
        self._slots_changed.set()
        self._note()
        await asyncio.to_thread(drop_old, self._place.work)

    def _fault(self, session: Session, error: Exception) -> Finish:
        """A bug of ours met by one session: told with its traceback, and the attempt has failed."""
        _log.exception("fault in a session", task=session.record.task)
        return session.fail(f"fault of the daemon: {error!r}")

    def _teller(self, session: Session) -> Teller:
        return Teller(link=self._link, held=session.held)

    async def _deliver(self, session: Session, finish: Finish) -> None:
        """Tell how it ended until that is answered, over as many links as it takes."""
        failures = 0
        while session.cause != LOST:
            await self._link.up()
            try:
                await session.output.send_rest(self._teller(session))
                answer = await self._link.ask(finish, Finished, timeout_s=ANSWER_TIMEOUT_S)
            except LinkDown:
                continue
            except Declined as error:
                _log.warning("finish refused", task=finish.task, outcome=finish.outcome, problem=str(error))
                if error.code == INVALID_CODE and finish.result is not None:
                    finish = session.fail(f"the control plane refused the result: {error}")
                    continue
                if error.code not in TRY_AGAIN_CODES:
                    break
                failures += 1
                await asyncio.sleep(_retry_s(failures))
            else:
                _log.info("finished", task=finish.task, outcome=finish.outcome, status=answer.status)
                break
        session.told()


def _retry_s(failures: int) -> float:
    """Seconds before asking again what was refused."""
    return backoff.delay_s(failures, first_s=RETRY_FIRST_S, longest_s=RETRY_LONGEST_S, chance=backoff.chance())
