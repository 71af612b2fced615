"""The newest events, encoded once for all who follow them; what is older stands in the outbox.

Nobody has a buffer of his own here: a follower says behind which event it is, and takes what comes after it, from here
if it is near the end and from the outbox if it is not. So one that reads slowly costs no memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from orchestrator_fleet.api import sse
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.store.outbox import Event

MAX_KEPT = 1_000
MAX_KEPT_BYTES = 16 << 20
# The name under which followers of everything wait among `Plane.readers`; no task has it.
EVERYTHING = ""


@dataclass(frozen=True, slots=True)
class Told:
    """An event as a stream tells it."""

    seq: int
    kind: str
    of_task: bool
    text: bytes


class Feed:
    """What was passed on last, while anybody follows."""

    def __init__(self) -> None:
        self.followers = 0
        self._kept: deque[Told] = deque()
        self._bytes = 0
        self._behind = 0  # everything after this one is kept

    @contextmanager
    def following(self) -> Iterator[None]:
        """Somebody follows."""
        self.followers += 1
        try:
            yield
        finally:
            self.followers -= 1
            if not self.followers:
                self._kept.clear()
                self._bytes = 0

    def push(self, event: Event, *, after: int) -> None:
        """Keep the next event; `after` is the one before it."""
        if not self.followers:
            return
        if not self._kept:
            self._behind = after
        told = tell(event)
        self._kept.append(told)
        self._bytes += len(told.text)
        while len(self._kept) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES:
            oldest = self._kept.popleft()
            self._bytes -= len(oldest.text)
            self._behind = oldest.seq

    def after(self, seq: int) -> Sequence[Told] | None:
        """Every event after `seq`, in order; None when it is not all here."""
        if not self._kept or seq < self._behind:
            return None
        newer: list[Told] = []
        for told in reversed(self._kept):
            if told.seq <= seq:
                break
            newer.append(told)
        return newer[::-1]


def tell(event: Event) -> Told:
    """An event, encoded."""
    text = sse.event(event.kind, event_json(event), seq=event.seq)
    return Told(event.seq, event.kind, event.task is not None, text)


def event_json(event: Event) -> dict[str, Any]:
    """An event as the API shows it."""
    return {
        "seq": event.seq,
        "at": to_rfc3339(event.at_us),
        "kind": event.kind,
        "actor": event.actor,
        "task": event.task,
        "attempt": event.attempt,
        "orchestrator": event.orchestrator,
        "machine": event.machine,
        "generation": event.generation,
        "charter_version": event.charter_version,
        "route": event.route,
        "data": event.data,
    }
