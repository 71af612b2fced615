"""Histories for the tests: a live store and the things that happen in it, by short names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator_fleet.clock import FrozenClock
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.backoff import RetryPolicy
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.task import Grant, NewTask, TaskRow
from orchestrator_fleet.wire.link import Usage

VPS = ("vp-a", "vp-b")
SPEC: dict[str, Any] = {
    "orchestrators": {"vp-a": {"discipline": "eng"}, "vp-b": {"discipline": "sec"}},
    "routing": [
        {"name": "by-discipline", "when": "has(task.discipline)", "to": {"discipline": "{{ task.discipline }}"}}
    ],
}
RETRY = RetryPolicy(max_attempts=3, backoff_s=1.0, backoff_max_s=10.0, jitter=0.0)
DISPATCH = Dispatch.of_spec(SPEC)


class Story:
    """A live store on a file, a clock that moves when told, and what happens."""

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, f"sqlite:///{path}"
        self.store: Store = open_store(self.url)
        self.clock = FrozenClock()

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()

    def make(self, title: str = "t", **fields: Any) -> TaskRow:
        """Make a task, for vp-a unless said."""
        fields.setdefault("orchestrator", "vp-a")
        return self._do(life.create_task, new=NewTask(title=title, **fields), dispatch=DISPATCH)

    def claim(self, orchestrator: str = "vp-a", limit: int = 1) -> list[Grant]:
        """Take the first of a line."""
        return self._do(
            life.claim,
            orchestrator=orchestrator,
            machine=f"m-{orchestrator}",
            holder="boot/epoch",
            limit=limit,
            lease_s=30.0,
            sessions_max=None,
            generation="g1",
            charter_version="c1",
        )

    def finish(self, grant: Grant, outcome: str = "done", *, usage: Usage | None = None, **fields: Any) -> TaskRow:
        """End a try."""
        known = {"task_id": grant.task.id, "token": grant.token, "retry": RETRY, "roll": 0.5, "usage": usage}
        return self._do(life.finish, outcome=outcome, **known, **fields)

    def change(self, function: Any, task: TaskRow, **fields: Any) -> Any:
        """One of `life`'s functions that take a task and a reason."""
        return self._do(function, task_id=task.id, **fields)

    def expire(self) -> Any:
        """Take back what nobody holds any more."""
        return self._do(life.expire_leases)

    def run(self, title: str = "t", outcome: str = "done", run_s: float = 2.0, **fields: Any) -> TaskRow:
        """Make a task, claim it, and end the try."""
        task = self.make(title, **fields)
        (grant,) = self.claim(task.orchestrator or "vp-a")
        self.clock.advance(run_s)
        return self.finish(grant, outcome)

    def tell(self, *events: Event) -> None:
        """Write events as they are."""
        self.store.write_sync(lambda conn: outbox.append(conn, *events))

    def bulk(self, count: int, *, first: int = 0) -> None:
        """`count` small events, numbered in `data.n` from `first`."""
        for start in range(first, first + count, 1000):
            numbers = range(start, min(start + 1000, first + count))
            self.tell(
                *(Event(at_us=1_767_225_600_000_000 + n, kind="noted", actor="system", data={"n": n}) for n in numbers)
            )

    def outbox(self) -> list[Event]:
        """All of it, as it stands."""
        return list(self.store.read_sync(lambda conn: outbox.read_after(conn, 0)))

    def _do(self, function: Any, **fields: Any) -> Any:
        return self.store.write_sync(lambda c: function(c, actor="k-test", now_us=self.clock.now_us(), **fields))
