"""The hands on a machine: one request in, one answer out. Everything here runs on the machine itself.

A controller on the same host calls them in a thread; any other way to a machine runs

    python -m orchestrator_fleet.machines.hands ROOT [FLEET_HOME]

which reads one request as JSON on stdin and prints one answer as JSON. Each request can be broken off at any
point and asked again: what it finds done it leaves.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import xmlrpc.client
from pathlib import Path

import msgspec

from orchestrator_fleet.clock import Clock, SystemClock
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.machines import daemons, generations, journal, lease, processes, programs, sessions, supervisord
from orchestrator_fleet.machines.declined import FAILED, FENCED, NOT_RUNNING, Declined
from orchestrator_fleet.machines.layout import TEMPORARY_PREFIX, Layout
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF
from orchestrator_fleet.wire.machine import (
    Acquire,
    Answer,
    Confirm,
    Destroy,
    Done,
    JournalEntry,
    Leased,
    Observe,
    Observed,
    Prune,
    Refusal,
    Reject,
    Release,
    Request,
    Restart,
    Stage,
    Switch,
)

MAX_REQUEST_BYTES = 256 << 20
JOURNAL_SHOWN = 20


class Hands:
    """One machine's root and what can be done to it. Safe to call from several threads and processes at once."""

    def __init__(self, root: Path, *, fleet_home: Path, python: str, clock: Clock) -> None:
        self._layout = Layout(root.resolve())
        self._home, self._python, self._clock = fleet_home.resolve(), python, clock

    def call(self, request: Request) -> Answer:
        """Do it, or say why not. Raises nothing that a request or the machine's state can cause."""
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
        except (OSError, xmlrpc.client.Error, shutil.Error) as error:
            doing = request.__struct_config__.tag
            return Refusal(code=FAILED, problem=f"{doing}: {error}; mend that and apply again")

    # -- looking -----------------------------------------------------------------------------------------------------

    def _observe(self, *, documents: bool) -> Observed:
        layout = self._layout
        if not layout.root.is_dir():
            return Observed()
        current = generations.current(layout)
        entries = journal.read(layout.journal)
        present = generations.present(layout)
        seen = generations.inspect(layout, current, documents=documents) if current is not None else None
        client = supervisord.connect(layout)
        try:
            return Observed(
                current=current,
                manifest=seen.manifest_bytes if seen is not None else b"",
                drifted=seen.drifted if seen is not None else (),
                missing=seen.missing if seen is not None else (),
                foreign=seen.foreign if seen is not None else (),
                supervisord="RUNNING" if client is not None else "DOWN",
                supervisord_pid=client.pid if client is not None else 0,
                programs=programs.observe(layout, client) if client is not None else {},
                generations=tuple(present),
                last_good=journal.last_good(entries, present=present),
                rejected=journal.rejected(entries),
                lease=lease.seen(lease.read(layout.lease), now_us=self._clock.now_us()),
                journal=tuple(entries[-JOURNAL_SHOWN:]),
                documents=dict(seen.documents) if seen is not None else {},
            )
        finally:
            if client is not None:
                client.close()

    # -- the lease ---------------------------------------------------------------------------------------------------

    def _acquire(self, request: Acquire) -> Leased:
        layout = self._layout
        with lease.locked(layout):
            taken = lease.taken(
                lease.read(layout.lease),
                holder=request.holder,
                ttl_s=request.ttl_s,
                process=request.process,
                floor=journal.highest_token(journal.read(layout.journal)),
                now_us=self._clock.now_us(),
            )
            lease.write(layout.lease, taken)
        return Leased(token=taken.token)

    def _change(self, request: Release | Stage | Switch | Restart | Confirm | Reject | Prune | Destroy) -> Done:
        """Do one change under the lock and the lease, which it lengthens on both ends."""
        layout = self._layout
        if not layout.root.is_dir():
            raise Declined(FENCED, f"{layout.root} is not there, so nobody holds its lease; take the lease first")
        with lease.locked(layout):
            held = lease.checked(lease.read(layout.lease), token=request.token)
            if isinstance(request, Release):
                lease.write(layout.lease, lease.given_back(held))
                return Done()
            lease.write(layout.lease, lease.lengthened(held, now_us=self._clock.now_us()))
            notes = self._changed(request)
            if not isinstance(request, Destroy):
                lease.write(layout.lease, lease.lengthened(held, now_us=self._clock.now_us()))
            return Done(notes=tuple(notes))

    def _changed(  # noqa: PLR0911 - one for each request
        self, request: Stage | Switch | Restart | Confirm | Reject | Prune | Destroy
    ) -> list[str]:
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
                return self._destroy()

    def _note(self, step: str, digest: str, token: int, reason: str = "") -> list[str]:
        entry = JournalEntry(
            step=step, digest=digest, at_us=self._clock.now_us(), token=token, reason=reason[: journal.MAX_REASON]
        )
        journal.append(self._layout.journal, entry)
        return [f"{step} {digest[:12]}"]

    # -- generations -------------------------------------------------------------------------------------------------

    def _stage(self, request: Stage) -> list[str]:
        said = generations.stage(
            self._layout, digest=request.digest, manifest_bytes=request.manifest, blobs=request.blobs
        )
        self._note(journal.STAGED, request.digest, request.token)
        return [said]

    def _confirm(self, request: Confirm) -> list[str]:
        current = generations.current(self._layout)
        if current != request.digest:
            raise Declined(
                FAILED, f"generation {request.digest[:12]} is not the current one, {(current or 'none')[:12]} is"
            )
        return self._note(journal.CONFIRMED, request.digest, request.token)

    def _prune(self, request: Prune) -> list[str]:
        layout = self._layout
        entries, present = journal.read(layout.journal), generations.present(layout)
        ages = journal.ages(entries)
        youngest = sorted(present, key=lambda digest: ages.get(digest, -1), reverse=True)[: request.keep]
        kept = {
            *youngest,
            *sessions.generations_in_use(layout),
            generations.current(layout),
            journal.last_good(entries, present=present),
        }
        going = [digest for digest in present if digest not in kept]
        generations.remove(layout, going)
        for digest in going:
            self._note(journal.PRUNED, digest, request.token)
        return [f"pruned {digest[:12]}" for digest in going]

    # -- programs ----------------------------------------------------------------------------------------------------

    def _switch(self, request: Switch) -> list[str]:
        layout = self._layout
        manifest = generations.require_whole(layout, request.digest)
        if SUPERVISORD_CONF in manifest.files:
            layout.create_for_programs()
        for name in manifest.programs:
            daemons.ensure_key(layout, name)
        notes = []
        if generations.make_current(layout, request.digest):
            notes += self._note(journal.SWITCHED, request.digest, request.token)
        if SUPERVISORD_CONF not in manifest.files:
            return notes
        variables = supervisord.environment(
            root=layout.root,
            socket_path=layout.socket,
            python=self._python,
            home=self._home,
            machine=manifest.target,
            declared=generations.variables_wanted(layout, request.digest),
        )
        client, started = supervisord.ensure(layout, variables=variables, python=self._python)
        try:
            if started:
                notes.append("supervisord started")
            done = programs.bring_in_line(layout, client, wanted=manifest.programs, asked=request, fresh=started)
        finally:
            client.close()
        notes += done.told()
        for name in sorted((set(request.stop) | set(done.take_out)) - set(manifest.programs)):
            self._forget(name, notes)
        return notes

    def _restart(self, request: Restart) -> list[str]:
        client = supervisord.connect(self._layout)
        if client is None:
            raise Declined(NOT_RUNNING, "no supervisord runs here; `fleet apply` starts it")
        try:
            pids = client.restart(request.programs)
        finally:
            client.close()
        return [f"{name} restarted, pid {pid}" for name, pid in pids.items()]

    def _forget(self, name: str, notes: list[str]) -> None:
        """End what an orchestrator that no longer lives here still runs, and remove its key."""
        if is_name(name):
            ended = sessions.end(self._layout, name)
            daemons.forget(self._layout, name)
            notes.append(f"{name} left, {ended} session processes ended")

    def _destroy(self) -> list[str]:
        """End all that runs here, then remove what we made; what others put into the root stays and is named.

        No notes when nothing ran and nothing stood here but the lease that this very request needs.
        """
        layout = self._layout
        idle = generations.is_untouched(layout) and not processes.leftovers(layout.root)
        left = supervisord.end(layout)
        ended = sessions.end(layout)
        left += processes.end(processes.leftovers(layout.root), term_s=0)
        if left:
            pids = ", ".join(str(process.pid) for process in sorted(set(left)))
            raise Declined(FAILED, f"processes that can't be ended: pid {pids}")
        layout.socket.unlink(missing_ok=True)
        layout.current.unlink(missing_ok=True)
        for folder in (layout.generations, layout.run, layout.log, layout.keys, layout.work):
            _remove(folder)
        for file in (layout.journal, layout.lease, *layout.root.glob(f"{TEMPORARY_PREFIX}*")):
            file.unlink(missing_ok=True)
        layout.lock.unlink(missing_ok=True)
        foreign = sorted(path.name for path in layout.root.iterdir())
        if foreign:
            return [f"{ended} session processes ended", f"left in {layout.root}, not ours: {', '.join(foreign)}"]
        layout.root.rmdir()
        return [] if idle else [f"{ended} session processes ended", f"removed {layout.root}"]


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> int:
    """Read one request on stdin, print one answer; exit code 0 whenever there is an answer."""
    parser = argparse.ArgumentParser(
        prog="orchestrator_fleet.machines.hands", description="Do one request on a machine."
    )
    parser.add_argument("root", type=Path, help="the machine's root folder")
    parser.add_argument("home", type=Path, nargs="?", help="the fleet folder, on machines that have one")
    options = parser.parse_args(arguments)
    hands = Hands(options.root, fleet_home=options.home or options.root, python=sys.executable, clock=SystemClock())
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(MAX_REQUEST_BYTES), type=Request)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        answer: Answer = Refusal(code=FAILED, problem=f"the request can't be read: {error}")
    else:
        answer = hands.call(request)
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
