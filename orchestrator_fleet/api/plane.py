"""The running control plane as one value: what every handler and loop works with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from orchestrator_fleet import log
from orchestrator_fleet.api.control import Control, current_generation, load
from orchestrator_fleet.api.feed import EVERYTHING, Feed
from orchestrator_fleet.api.history import History
from orchestrator_fleet.api.pulse import Pulse
from orchestrator_fleet.api.rate import Rate
from orchestrator_fleet.api.waiters import Waiters
from orchestrator_fleet.clock import Clock
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.orchestrators import attendance
from orchestrator_fleet.orchestrators.access import Denied, KnownKey, check, still_good
from orchestrator_fleet.orchestrators.presence import Seen
from orchestrator_fleet.store.database import Store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks.task import TaskRow

KEYS_REREAD_S = 0.05
VALIDATE_BURST, VALIDATE_PER_S = 60, 10.0
# What lets an orchestrator claim again though none of its tasks moved.
OPENS_LINE = ("limit_freed", "orchestrator_resumed")
GOING_AWAY, POLICY = 1001, 1008  # WebSocket close codes

_log = log.get(__name__)


class Connected(Protocol):
    """A daemon's connection, as the rest of the control plane sees it."""

    key: KnownKey
    machine: str
    gone: asyncio.Event

    @property
    def seen(self) -> Seen:
        """What it shows of its orchestrator."""

    def taken_away(self, task: str, *, attempt: int, reason: str) -> None:
        """A task is not IN_PROGRESS under `attempt` any more."""

    def end(self, code: int, reason: str) -> None:
        """Let the connection end soon."""


class Plane:
    """What is in force now, and who is connected. All of it belongs to one event loop.

    `control` is replaced as a whole when another generation is applied under `control_root`.
    `workers` wait for tasks, by orchestrator; `readers` for events and output, by task; `feed` has the newest events,
    for those who follow them all. `moved` is set when something happened that history lacks.
    """

    def __init__(
        self,
        *,
        store: Store,
        control: Control,
        control_root: Path,
        clock: Clock,
        history: History,
        machines: Callable[[str], Path],
    ) -> None:
        self.store, self.clock, self.control = store, clock, control
        self._control_root, self._refused = control_root, ""
        self.history, self.machine_root = history, machines
        self.links: dict[str, Connected] = {}
        self.workers, self.readers, self.feed = Waiters(), Waiters(), Feed()
        self.pulse = Pulse(store, pass_on=self._pass_on)
        self.closing, self.moved, self.astray = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.validations = Rate(burst=VALIDATE_BURST, per_s=VALIDATE_PER_S, now_us=clock.now_us)
        self._daemon_keys: Mapping[str, KnownKey] = {}
        self._keys_read_at = float("-inf")
        self._reading_keys = asyncio.Lock()

    async def authenticate(self, text: str) -> KnownKey | Denied:
        """The key that `text` is. One that is not known may have been made a moment ago: looks once more."""
        found = self._check(text)
        if found == Denied("unknown") and await self.reread_control():
            found = self._check(text)
        if found == Denied("unknown"):
            await self.reread_daemon_keys()
            found = self._check(text)
        return found

    def _check(self, text: str) -> KnownKey | Denied:
        return check(text, rings=(self.control.keys, self._daemon_keys), now_us=self.clock.now_us())

    def why_no_longer(self, key: KnownKey) -> str | None:
        """Why a key that was good at connecting is good no more; None while it is."""
        if key.machine and key.owner not in self.control.orchestrators:
            return "of an orchestrator that is no longer declared"
        ring = self._daemon_keys if key.machine else self.control.keys
        return still_good(ring.get(key.id), now_us=self.clock.now_us())

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

    def end_links(self) -> None:
        """Drop the connections whose key or orchestrator is no longer good."""
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
        if event.task is None:
            if event.kind in OPENS_LINE and event.orchestrator:
                self.workers.wake([event.orchestrator])
            return
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
