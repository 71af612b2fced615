"""The running control plane as one value: what every handler and loop works with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from orchestrator_fleet import log
from orchestrator_fleet.api.control import Control, current_generation, load
from orchestrator_fleet.api.errands import Errands
from orchestrator_fleet.api.feed import EVERYTHING, Feed
from orchestrator_fleet.api.history import History
from orchestrator_fleet.api.pending import Pending
from orchestrator_fleet.api.pulse import Pulse
from orchestrator_fleet.api.rate import Rate
from orchestrator_fleet.api.reconciler import Reconciler
from orchestrator_fleet.api.unsettled import Unsettled
from orchestrator_fleet.api.uses import Uses
from orchestrator_fleet.api.waiters import Waiters
from orchestrator_fleet.clock import Clock
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.orchestrators import attendance, keyring
from orchestrator_fleet.orchestrators.access import Denied, KnownKey, Shown, check, still_good
from orchestrator_fleet.orchestrators.presence import Seen
from orchestrator_fleet.store import daemon_keys
from orchestrator_fleet.store.daemon_keys import KeyRow
from orchestrator_fleet.store.database import Store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks.task import TaskRow
from orchestrator_fleet.wire.link import Held

KEYS_REREAD_S = 0.05
VALIDATE_BURST, VALIDATE_PER_S = 60, 10.0
# A client that has an old key tries again a few times a second, and many may stand behind one address.
FAILURE_BURST, FAILURE_PER_S = 100, 10.0
# Far above what one client needs, and below what would leave the others nothing.
REQUEST_BURST, REQUESTS_PER_S = 20_000, 10_000.0
# What lets an orchestrator claim again though none of its tasks moved.
OPENS_LINE = ("limit_freed", "orchestrator_resumed")
GOING_AWAY, POLICY = 1001, 1008  # WebSocket close codes

_log = log.get(__name__)


class Connected(Protocol):
    """A daemon's connection, as the rest of the control plane sees it. `said`: what it told last that it works on."""

    key: KnownKey
    machine: str
    gone: asyncio.Event
    said: tuple[Held, ...]
    said_at_us: int

    @property
    def seen(self) -> Seen:
        """What it shows of its orchestrator."""

    def taken_away(self, task: str, *, attempt: int, reason: str) -> None:
        """A task is not IN_PROGRESS under `attempt` any more."""

    def notice_kept(self) -> None:
        """Something waits to be told to its orchestrator."""

    def end(self, code: int, reason: str) -> None:
        """Let the connection end soon."""


class Plane:
    """What is in force now, and who is connected. All of it belongs to one event loop.

    `control` is replaced as a whole when another generation is applied under `control_root`.
    `workers` wait for tasks, by orchestrator; `readers` for events and output, by task; `feed` has the newest events,
    for those who follow them all. `moved` is set when something happened that history lacks, `tasks_moved` when it
    happened to a task. `revoked` are the keys that were revoked in the store, and when; `callers` wait to hear, by key
    id, that theirs may be good no more.
    `unsettled` are the tasks that were passed on, as far as that is not over.
    """

    def __init__(
        self,
        *,
        store: Store,
        control: Control,
        control_root: Path,
        fleet_file: Path,
        clock: Clock,
        history: History,
        machines: Callable[[str], Path],
    ) -> None:
        self.store, self.clock, self.control, self.fleet_file = store, clock, control, fleet_file
        self._control_root, self._refused = control_root, ""
        self.history, self.machine_root = history, machines
        self.links: dict[str, Connected] = {}
        self.workers, self.readers, self.feed = Waiters(), Waiters(), Feed()
        self.pulse = Pulse(store, pass_on=self._pass_on)
        self.closing, self.moved, self.astray = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.tasks_moved = asyncio.Event()
        # What the list of orchestrators was made of, and the list.
        self.board: tuple[object, Sequence[dict[str, Any]]] | None = None
        self.validations = Rate(burst=VALIDATE_BURST, per_s=VALIDATE_PER_S, now_us=clock.now_us)
        self.failures = Rate(burst=FAILURE_BURST, per_s=FAILURE_PER_S, now_us=clock.now_us)
        self.requests = Rate(burst=REQUEST_BURST, per_s=REQUESTS_PER_S, now_us=clock.now_us)
        self.callers, self.uses = Waiters(), Uses()
        self.errands = Errands()
        self.unsettled = Unsettled()
        self.revoked: Mapping[str, int] = {}
        self.pending = Pending(fleet_file.parent)
        self.reconciler = Reconciler(fleet_file, register=self._register, applied=self.reread_control)
        self._daemon_keys: Mapping[str, KnownKey] = {}
        self._keys_read_at = float("-inf")
        self._reading_keys = asyncio.Lock()

    async def authenticate(self, text: str) -> KnownKey | Denied:
        """The key that `text` is. One that is not known may have been made a moment ago: looks once more.

        What is refused costs one digest and one comparison, whyever it is refused.
        """
        shown = Shown.of(text)
        known = shown.among(self._rings)
        found = check(shown, known, now_us=self.clock.now_us(), revoked=self.revoked)
        for look in (self.reread_control, self.reread_daemon_keys):
            if found != Denied("unknown"):
                break
            await look()
            before, known = known, shown.among(self._rings)
            if known is not None and (before is None or before.sha256 != known.sha256):
                found = check(shown, known, now_us=self.clock.now_us(), revoked=self.revoked)
        return found

    @property
    def declared(self) -> Mapping[str, Mapping[str, Any]]:
        """Orchestrators as the files have them: those in force, and what was changed here since."""
        return self.pending.over(self.control.orchestrators)

    @property
    def _rings(self) -> tuple[Mapping[str, KnownKey], ...]:
        return self.control.keys, self._daemon_keys

    def why_no_longer(self, key: KnownKey) -> str | None:
        """Why a key that was good at connecting is good no more; None while it is."""
        if key.machine and key.owner not in self.control.orchestrators:
            return "of an orchestrator that is no longer declared"
        known = (self._daemon_keys if key.machine else self.control.keys).get(key.id)
        why = still_good(known, now_us=self.clock.now_us(), revoked=self.revoked)
        if why is None and known is not None and not set(key.scopes) <= set(known.scopes):
            return "of fewer scopes now"
        return why

    async def reread_control(self) -> bool:
        """Use the generation that is current now; whether that is another one. One that can't be read is left."""
        generation = current_generation(self._control_root)
        if generation is None or generation in (self.control.generation, self._refused):
            return False
        try:
            self.control = await asyncio.to_thread(load, self._control_root, generation)
        except FleetError:
            self._refused = generation
            _log.exception("a new generation can't be used; the old one stays", generation=generation)
            return False
        return True

    async def reread_daemon_keys(self) -> None:
        """Know the daemons' keys as they are now. Many who ask at once share a read, at most one each KEYS_REREAD_S."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        async with self._reading_keys:
            if self._keys_read_at > asked_at:
                return
            await asyncio.sleep(self._keys_read_at + KEYS_REREAD_S - asked_at)
            self._keys_read_at = loop.time()
            self._daemon_keys = await self.store.read(attendance.keys)

    async def reread_revocations(self) -> None:
        """Know which keys were revoked in the store."""
        self.know_revoked(await self.store.read(keyring.revoked))

    def know_revoked(self, revoked: Mapping[str, int]) -> None:
        """Know these too. What was revoked once stays so, and whoever is connected with one is dropped."""
        if new := {key_id: at_us for key_id, at_us in revoked.items() if key_id not in self.revoked}:
            self.revoked = {**self.revoked, **new}
            self.end_links()

    def _register(self, rows: Sequence[KeyRow]) -> int:
        """Let the daemons connect that a pass has started. Called on the pass's thread."""
        if not self.store.read_sync(lambda conn: daemon_keys.missing(conn, rows)):
            return 0
        return self.store.write_sync(lambda conn: daemon_keys.register(conn, rows))

    def end_links(self) -> None:
        """Drop the connections whose key or orchestrator is no longer good; long answers end likewise."""
        self.callers.wake_all()
        for link in list(self.links.values()):
            why = self.why_no_longer(link.key)
            if why is not None:
                link.end(POLICY, f"its key is {why}")

    def close(self) -> None:
        """Stop waiting: long polls answer, streams end, links close."""
        self.closing.set()
        self.workers.wake_all()
        self.readers.wake_all()
        for link in list(self.links.values()):
            link.end(GOING_AWAY, "the control plane is closing; connect again")

    def stands_in_line(self, task: TaskRow) -> None:
        """Somebody may claim it now."""
        if task.status == "TODO" and task.orchestrator is not None:
            self.workers.wake([task.orchestrator])

    def _pass_on(self, event: Event) -> None:
        self.moved.set()
        self.feed.push(event, after=self.pulse.seq)
        self.readers.wake([EVERYTHING])
        self.unsettled.heard(event)
        if event.kind == keyring.REVOKED:
            self.know_revoked({event.data["key"]: event.at_us})
        if event.task is None:
            if event.kind in OPENS_LINE and event.orchestrator:
                self.workers.wake([event.orchestrator])
            if event.kind == "notice_kept" and (link := self.links.get(event.orchestrator or "")) is not None:
                link.notice_kept()
            return
        self.tasks_moved.set()
        self.readers.wake([event.task])
        task = event.data.get("task", {})
        if task.get("status") == "IN_PROGRESS":
            return
        if event.attempt and task.get("status") in ("TODO", "BLOCKED") and self._is_gone(task.get("orchestrator")):
            self.astray.set()
        # It stands in line now, or it left a place free: its orchestrator's, or its machine's.
        names = (task.get("orchestrator"), event.orchestrator, *self._neighbours(event.machine))
        self.workers.wake([name for name in names if name])
        for link in list(self.links.values()):
            link.taken_away(event.task, attempt=event.attempt or 0, reason=event.data.get("reason") or event.kind)

    def _neighbours(self, machine: str | None) -> Sequence[str]:
        """Who is connected from a machine whose sessions are counted."""
        if machine not in self.control.rules.sessions_on:
            return ()
        return [name for name, link in self.links.items() if link.machine == machine]

    def _is_gone(self, orchestrator: str | None) -> bool:
        return orchestrator is not None and orchestrator not in self.control.orchestrators
