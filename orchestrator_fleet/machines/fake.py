"""A machine in memory: every request of `wire.machine`, for tests and simulations, with faults on demand.

It keeps what a real one keeps (generations, link, journal, lease, programs, keys), decides by the same rules, and
refuses what a real one refuses. People's hands on it are methods: `edit`, `kill_program`, `stop_supervisord`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from orchestrator_fleet.clock import Clock
from orchestrator_fleet.errors import Unreachable
from orchestrator_fleet.keys import MintedKey, mint
from orchestrator_fleet.machines import journal, programs
from orchestrator_fleet.machines import lease as leases
from orchestrator_fleet.machines.declined import FAILED, NOT_RUNNING, NOT_STAGED, Declined
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF
from orchestrator_fleet.wire.documents import MANIFEST, Manifest, OrchestratorDoc, sha256
from orchestrator_fleet.wire.machine import (
    Acquire,
    Answer,
    Confirm,
    DaemonKey,
    Destroy,
    Done,
    JournalEntry,
    Leased,
    Observe,
    Observed,
    ProgramSeen,
    Prune,
    Refusal,
    Reject,
    Release,
    Request,
    Restart,
    Stage,
    Switch,
)

MAX_JOURNAL_SHOWN = 100
CRASHES = ("staged", "linked", "stopped", "started", "confirmed", "pruned")
_FIRST_PID = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong.

    `unreachable`: no request arrives. `delay_s`: each answer takes so long; past the caller's time limit it is lost,
    though the request took effect. `refuse`: request name (`stage`, `switch`, ...) -> why it is refused.
    `disk_full`: nothing can be staged. `never_run`: programs that end as FATAL. `crash_after`: one of `CRASHES`; the
    machine's side dies there, once, and no answer comes.
    """

    unreachable: bool = False
    delay_s: float = 0.0
    refuse: Mapping[str, str] = field(default_factory=dict)
    disk_full: bool = False
    never_run: frozenset[str] = frozenset()
    crash_after: str | None = None


class _Crash(Exception):
    pass


@dataclass(slots=True, kw_only=True)
class _Root:
    """What stands on the machine's disk, and what runs."""

    generations: dict[str, dict[str, bytes]] = field(default_factory=dict)
    current: str | None = None
    journal: list[JournalEntry] = field(default_factory=list)
    lease: leases.Lease | None = None
    supervisord_pid: int = 0
    programs: dict[str, ProgramSeen] = field(default_factory=dict)
    keys: dict[str, MintedKey] = field(default_factory=dict)


class FakeTransport:
    """A `Transport` to a machine of its own; `faults` may be replaced at any time."""

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        faults: Faults | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._name, self._clock, self._sleep = name, clock, sleep
        self.faults = faults or Faults()
        self._root = _Root()
        self._next_pid = _FIRST_PID

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._name

    async def call(self, request: Request, *, timeout_s: float) -> Answer:
        """Ask the machine; see `Transport.call`."""
        if self.faults.unreachable:
            raise Unreachable(self._name, "no route to it")
        try:
            answer = self._answer(request)
        except _Crash:
            self.faults = replace(self.faults, crash_after=None)
            raise Unreachable(self._name, "the connection was lost before the answer") from None
        if self.faults.delay_s:
            await self._sleep(min(self.faults.delay_s, timeout_s))
        if self.faults.delay_s > timeout_s:
            raise Unreachable(self._name, f"no answer in {timeout_s:g} s")
        return answer

    async def close(self) -> None:
        """Nothing is held open."""

    def edit(self, path: str, content: bytes | None) -> None:
        """Change, add or (None) remove a file of the current generation, as a person at the machine does."""
        generation = self._generation()
        if content is None:
            generation.pop(path, None)
        else:
            generation[path] = content

    def stop_supervisord(self) -> None:
        """End supervisord and with it every daemon."""
        self._root.supervisord_pid = 0
        self._root.programs.clear()

    def kill_program(self, program: str, *, state: str = "FATAL", detail: str = "") -> None:
        """Leave a program in another state than RUNNING."""
        seen = self._root.programs[program]
        self._root.programs[program] = msgspec.structs.replace(seen, state=state, detail=detail, pid=0)

    def run_program(self, program: str, *, digest: str, generation: str | None = None) -> None:
        """Have supervisord run a program started with this digest, whatever the generation says."""
        seen = ProgramSeen(state="RUNNING", pid=self._pid(), program=digest, generation=generation)
        self._root.programs[program] = seen

    def _answer(self, request: Request) -> Answer:
        refused = self.faults.refuse.get(type(request).__name__.lower())
        if refused is not None:
            return Refusal(code=FAILED, problem=refused)
        try:
            match request:
                case Observe():
                    return self._observe(documents=request.documents)
                case Acquire():
                    return self._acquire(request)
                case _:
                    return self._change(request)
        except Declined as declined:
            return Refusal(code=declined.code, problem=str(declined))

    def _change(self, request: Release | Stage | Switch | Restart | Confirm | Reject | Prune | Destroy) -> Done:
        held = leases.checked(self._root.lease, token=request.token)
        if isinstance(request, Release):
            self._root.lease = leases.given_back(held)
            return Done()
        notes = self._changed(request)
        if not isinstance(request, Destroy):
            self._root.lease = leases.lengthened(held, now_us=self._clock.now_us())
        return Done(notes=notes)

    def _changed(  # noqa: PLR0911 - one for each request
        self, request: Stage | Switch | Restart | Confirm | Reject | Prune | Destroy
    ) -> tuple[str, ...]:
        match request:
            case Stage():
                return self._stage(request)
            case Switch():
                return self._switch(request)
            case Restart():
                return self._restart(request)
            case Confirm():
                return self._confirm(request)
            case Reject():
                return self._note(journal.REJECTED, request.digest, request.token, request.reason)
            case Prune():
                return self._prune(request)
            case Destroy():
                untouched = not (self._root.journal or self._root.generations or self._root.supervisord_pid)
                self._root = _Root()
                return () if untouched else ("removed the root",)

    def _observe(self, *, documents: bool) -> Observed:
        root = self._root
        files = self._generation()
        intact = sha256(files.get(MANIFEST, b"")) == root.current
        wanted = msgspec.json.decode(files[MANIFEST], type=Manifest).files if intact else {}
        present = files.keys() - {MANIFEST} if intact else set()
        drifted = {path for path in present & wanted.keys() if sha256(files[path]) != wanted[path]}
        missing = wanted.keys() - present
        if root.current is not None and not intact:
            (drifted if MANIFEST in files else missing).add(MANIFEST)
        keys = {name: DaemonKey(id=key.id, sha256=key.sha256) for name, key in root.keys.items()}
        return Observed(
            current=root.current,
            manifest=files[MANIFEST] if intact else b"",
            drifted=tuple(sorted(drifted)),
            missing=tuple(sorted(missing)),
            foreign=tuple(sorted(present - wanted.keys())),
            supervisord="RUNNING" if root.supervisord_pid else "DOWN",
            supervisord_pid=root.supervisord_pid,
            programs={name: msgspec.structs.replace(seen, key=keys.get(name)) for name, seen in root.programs.items()},
            generations=tuple(root.generations),
            last_good=journal.last_good(root.journal, present=root.generations),
            rejected=journal.rejected(root.journal),
            lease=leases.seen(root.lease, now_us=self._clock.now_us()),
            journal=tuple(root.journal[-MAX_JOURNAL_SHOWN:]),
            documents={path: files[path] for path in sorted((present & wanted.keys()) - drifted)} if documents else {},
        )

    def _acquire(self, request: Acquire) -> Leased:
        root = self._root
        root.lease = leases.taken(
            root.lease,
            holder=request.holder,
            ttl_s=request.ttl_s,
            process="",
            floor=journal.highest_token(root.journal),
            now_us=self._clock.now_us(),
        )
        return Leased(token=root.lease.token)

    def _stage(self, request: Stage) -> tuple[str, ...]:
        if self.faults.disk_full:
            raise Declined(FAILED, "stage: no space left on device")
        if sha256(request.manifest) != request.digest:
            raise Declined(FAILED, f"manifest: its SHA-256 is not {request.digest}")
        spoiled = [digest for digest, data in request.blobs.items() if sha256(data) != digest]
        if spoiled:
            raise Declined(FAILED, f"blob {spoiled[0]}: its content has another SHA-256")
        manifest = msgspec.json.decode(request.manifest, type=Manifest)
        have = {sha256(data): data for files in self._root.generations.values() for data in files.values()}
        have.update(request.blobs)
        lacking = [digest for digest in manifest.files.values() if digest not in have]
        if lacking:
            raise Declined(
                FAILED, f"content {lacking[0]} came neither with the request nor stands in a generation here"
            )
        files = {path: have[digest] for path, digest in manifest.files.items()}
        self._root.generations[request.digest] = {**files, MANIFEST: request.manifest}
        notes = self._note(journal.STAGED, request.digest, request.token)
        self._crash("staged")
        return notes

    def _switch(self, request: Switch) -> tuple[str, ...]:
        root = self._root
        manifest = self._require_whole(request.digest)
        for name in manifest.programs:
            root.keys.setdefault(name, mint())
        notes: tuple[str, ...] = ()
        if root.current != request.digest:
            root.current = request.digest
            notes = self._note(journal.SWITCHED, request.digest, request.token)
        self._crash("linked")
        if SUPERVISORD_CONF not in manifest.files:
            return notes
        if not root.supervisord_pid:
            root.supervisord_pid = self._pid()
            root.programs.clear()
        todo = programs.steps(wanted=manifest.programs, seen=root.programs, changed=(), asked=request)
        for name in (*todo.take_out, *todo.renew):
            root.programs.pop(name)
        for name in {*request.stop, *todo.take_out} - manifest.programs.keys():
            root.keys.pop(name, None)
        self._crash("stopped")
        for name in (*todo.renew, *todo.put_in):
            self._start(name, digest=manifest.programs[name])
        for name in todo.reread:
            self._reread(name)
        self._crash("started")
        return (*notes, *todo.told())

    def _restart(self, request: Restart) -> tuple[str, ...]:
        root = self._root
        if not root.supervisord_pid:
            raise Declined(NOT_RUNNING, "no supervisord runs here; `fleet apply` starts it")
        unknown = sorted(set(request.programs) - root.programs.keys())
        if unknown:
            raise Declined(
                NOT_RUNNING, f"supervisord has no {', '.join(unknown)}; `fleet apply` brings what is declared"
            )
        manifest = _manifest(self._generation())
        declared = {} if manifest is None else manifest.programs
        for name in request.programs:
            self._start(name, digest=root.programs[name].program or declared.get(name))
        self._crash("started")
        return tuple(f"{name} restarted, pid {root.programs[name].pid}" for name in request.programs)

    def _require_whole(self, digest: str) -> Manifest:
        files = self._root.generations.get(digest, {})
        manifest = _manifest(files)
        if (
            manifest is None
            or {path: sha256(data) for path, data in files.items() if path != MANIFEST} != manifest.files
        ):
            raise Declined(NOT_STAGED, f"generation {digest[:12]} is not here, or not whole; stage it")
        return manifest

    def _start(self, program: str, *, digest: str | None) -> None:
        root = self._root
        since_us = self._clock.now_us()
        if program in self.faults.never_run:
            root.programs[program] = ProgramSeen(state="FATAL", since_us=since_us, detail="Exited too quickly")
            return
        root.programs[program] = ProgramSeen(
            state="RUNNING", pid=self._pid(), since_us=since_us, program=digest, link="connected"
        )
        self._reread(program)

    def _reread(self, program: str) -> None:
        """What a daemon does when it is told to read its files again."""
        seen = self._root.programs[program]
        if seen.state != "RUNNING":
            return
        document = self._generation().get(f"orchestrators/{program}/orchestrator.json", b"")
        try:
            charter_version = msgspec.json.decode(document, type=OrchestratorDoc).charter_version
        except msgspec.DecodeError:
            charter_version = None
        self._root.programs[program] = msgspec.structs.replace(
            seen, generation=self._root.current, charter_version=charter_version
        )

    def _confirm(self, request: Confirm) -> tuple[str, ...]:
        if self._root.current != request.digest:
            raise Declined(FAILED, f"generation {request.digest[:12]} is not the current one")
        notes = self._note(journal.CONFIRMED, request.digest, request.token)
        self._crash("confirmed")
        return notes

    def _prune(self, request: Prune) -> tuple[str, ...]:
        root = self._root
        ages = journal.ages(root.journal)
        youngest = sorted(root.generations, key=lambda digest: ages.get(digest, -1), reverse=True)[: request.keep]
        last_good = journal.last_good(root.journal, present=root.generations)
        in_use = {seen.generation for seen in root.programs.values()}
        going = sorted(root.generations.keys() - {*youngest, root.current, last_good, *in_use})
        for digest in going:
            del root.generations[digest]
        notes = [self._note(journal.PRUNED, digest, request.token) for digest in going]
        self._crash("pruned")
        return tuple(line for lines in notes for line in lines)

    def _generation(self) -> dict[str, bytes]:
        """The files of the current generation."""
        return self._root.generations.get(self._root.current or "", {})

    def _note(self, step: str, digest: str, token: int, reason: str = "") -> tuple[str]:
        entry = JournalEntry(step=step, digest=digest, at_us=self._clock.now_us(), token=token, reason=reason)
        self._root.journal.append(entry)
        return (f"{step} {digest[:12]}",)

    def _crash(self, step: str) -> None:
        if self.faults.crash_after == step:
            raise _Crash

    def _pid(self) -> int:
        self._next_pid += 1
        return self._next_pid


def _manifest(files: Mapping[str, bytes]) -> Manifest | None:
    try:
        return msgspec.json.decode(files.get(MANIFEST, b""), type=Manifest)
    except msgspec.DecodeError:
        return None
