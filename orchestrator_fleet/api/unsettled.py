"""What is passed on and not over yet, as far as this control plane has heard: so that only what matters is looked at.

Everybody's claims and finishes pass here as events, and a lookup is all that they cost. The store is the truth: what is
not heard here is found by the look at all of it, see `settle`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from orchestrator_fleet.orchestrators import passing
from orchestrator_fleet.orchestrators.coordination import LEGAL
from orchestrator_fleet.orchestrators.handoff import STOP_S
from orchestrator_fleet.orchestrators.presence import BEAT_S
from orchestrator_fleet.store.outbox import Event

OPEN = frozenset(state for state, after in LEGAL.items() if after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A handoff that waits for a session of `source` to end."""

    id: str
    source: str
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def ends_at(self) -> float:
        """When it is not waited for any more."""
        return self.heard_at + STOP_S


class Unsettled:
    """Open delegations and handoffs by task; `woken` is set when there is something to look at."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.handovers: dict[str, Handover] = {}
        self._open: dict[str, set[str]] = {}
        self._changed: set[str] = set()
        self._stopped: set[str] = set()

    def heard(self, event: Event) -> None:
        """Something happened."""
        if event.task is None:
            return
        told = event.data.get("coordination")
        if told is not None and told["kind"] in passing.KINDS:
            self.note(event.task, told["id"], kind=told["kind"], state=told["state"], source=told["from"])
        elif event.kind == "task_purged":
            self._open.pop(event.task, None)
            self.handovers.pop(event.task, None)
        elif event.task in self._open:
            self._changed.add(event.task)
            self.woken.set()

    def note(self, task: str, of: str, *, kind: str, state: str, source: str) -> None:
        """A delegation or a handoff of this task is in this state."""
        if kind == "handoff" and state == "pending":
            self.handovers.setdefault(task, Handover(id=of, source=source))
            self.woken.set()
        elif (waits := self.handovers.get(task)) is not None and waits.id == of:
            del self.handovers[task]
        known = self._open.setdefault(task, set())
        if state in OPEN:
            known.add(of)
            return
        known.discard(of)
        if not known:
            del self._open[task]

    def handed_over(self, of: str) -> None:
        """Nothing is waited for any more."""
        self.handovers = {task: waits for task, waits in self.handovers.items() if waits.id != of}

    def session_over(self, task: str, *, of: str) -> None:
        """The daemon of `of` says that its session of this task is gone."""
        if (waits := self.handovers.get(task)) is not None and waits.source == of:
            self._stopped.add(task)
            self.woken.set()

    def beaten(self, of: str, *, held: Collection[str]) -> None:
        """The daemon of `of` holds these tasks and no others; what was granted a moment ago it may not know yet."""
        for task, waits in self.handovers.items():
            if waits.source == of and task not in held and time.monotonic() - waits.heard_at > BEAT_S:
                self.session_over(task, of=of)

    def take(self) -> tuple[list[str], dict[str, bool]]:
        """What is to be looked at now: tasks that changed; handovers to complete, and whether their session is gone."""
        self.woken.clear()
        changed, self._changed = sorted(self._changed), set()
        stopped, self._stopped = self._stopped, set()
        now = time.monotonic()
        waited = self.handovers.items()
        return changed, {one.id: task in stopped for task, one in waited if task in stopped or one.ends_at <= now}

    def wait_s(self, longest_s: float) -> float:
        """How long nothing may have to be done."""
        left = min((waits.ends_at for waits in self.handovers.values()), default=float("inf")) - time.monotonic()
        return max(0.0, min(longest_s, left))
