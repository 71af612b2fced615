"""A desk: an open store, a frozen clock and short words for what the tests do with tasks."""

from __future__ import annotations

from typing import Any

from orchestrator_fleet.clock import FrozenClock
from orchestrator_fleet.store.database import Store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life, reroute
from orchestrator_fleet.tasks.backoff import RetryPolicy
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.queries import Filters, Page
from orchestrator_fleet.tasks.task import Changed, Grant, Held, NewTask, TaskRow

SPEC: dict[str, Any] = {
    "orchestrators": {
        "vp-a": {"discipline": "eng", "labels": {"team": "x"}, "retry": {"max_attempts": 3, "backoff": "2s"}},
        "vp-b": {"discipline": "sec", "labels": {"team": "x"}, "retry": {"max_attempts": 5}},
    },
    "routing": [
        {"name": "by-discipline", "when": "has(task.discipline)", "to": {"discipline": "{{ task.discipline }}"}}
    ],
}
RETRY = RetryPolicy(max_attempts=3, backoff_s=2.0, backoff_max_s=300.0, jitter=0.2)


class Desk:
    """Everything a test does to tasks, by short names, at the clock's time."""

    def __init__(self, store: Store, spec: dict[str, Any] = SPEC) -> None:
        self.store, self.clock = store, FrozenClock()
        self.dispatch = Dispatch.of_spec(spec)

    @property
    def now(self) -> int:
        """The clock's time, in microseconds."""
        return self.clock.now_us()

    def make(self, title: str = "t", *, orchestrator: str | None = "vp-a", **fields: Any) -> TaskRow:
        """Create a task, for vp-a unless told otherwise."""
        new = NewTask(title=title, orchestrator=orchestrator, **fields)
        return self._write(life.create_task, new=new, dispatch=self.dispatch)

    def claim(self, orchestrator: str = "vp-a", limit: int = 1, **fields: Any) -> list[Grant]:
        """Claim for a daemon on m1."""
        known = {
            "machine": "m1",
            "holder": "boot/epoch",
            "lease_s": 30.0,
            "sessions_max": None,
            "generation": "g1",
            "charter_version": "c1",
        }
        return self._write(life.claim, orchestrator=orchestrator, limit=limit, **{**known, **fields})

    def run(self, title: str = "t", **fields: Any) -> Grant:
        """Make a task and claim it."""
        task = self.make(title, **fields)
        (grant,) = self.claim(fields.get("orchestrator", "vp-a"))
        assert grant.task.id == task.id
        return grant

    def finish(self, grant: Grant, outcome: str = "done", **fields: Any) -> TaskRow:
        """Report how an attempt ended."""
        known = {"task_id": grant.task.id, "token": grant.token, "retry": RETRY, "roll": 0.5}
        return self._write(life.finish, outcome=outcome, **{**known, **fields})

    def beat(self, *held: Held, lease_s: float = 30.0) -> tuple[str, ...]:
        """Lengthen leases; answers what is lost."""
        return self.store.write_sync(lambda c: life.beat(c, held=held, lease_s=lease_s, now_us=self.now))

    def expire(self) -> list[TaskRow]:
        """Take back what nobody holds any more."""
        return self._write(life.expire_leases)

    def hello(
        self, *held: Held, orchestrator: str = "vp-a", machine: str = "m1", holder: str = "boot/later epoch"
    ) -> Any:
        """What a daemon that says hello causes; by default one that was started after the claims."""
        return self._write(
            life.reconcile_held, orchestrator=orchestrator, machine=machine, holder=holder, held=held, lease_s=30.0
        )

    def route_again(self) -> list[TaskRow]:
        """Route what nobody has; answers what found somebody."""
        return self._write(
            lambda conn, **by: reroute.again(
                conn, reroute.astray(conn, self.dispatch, rules_changed=False), dispatch=self.dispatch, **by
            )
        )

    def cancel(self, task: TaskRow) -> Changed:
        """Cancel it."""
        return self._write(life.cancel, task_id=task.id, reason="because")

    def unblock(self, task: TaskRow) -> TaskRow:
        """Unblock it."""
        return self._write(life.unblock, task_id=task.id, reason="because")

    def retry(self, task: TaskRow) -> TaskRow:
        """Try it again."""
        return self._write(life.retry, task_id=task.id, dispatch=self.dispatch, reason="because")

    def assign(self, task: TaskRow, orchestrator: str) -> Changed:
        """Give it to another."""
        return self._write(life.assign, task_id=task.id, orchestrator=orchestrator, reason="because")

    def update(self, task: TaskRow, *, version: int | None = None, **fields: Any) -> TaskRow:
        """Edit it."""
        return self._write(life.update_task, task_id=task.id, fields=fields, version=version)

    def set_status(self, task: TaskRow, status: Any) -> Changed:
        """Move it as a person's PUT does."""
        return self._write(life.set_status, task_id=task.id, status=status, reason="because")

    def log(self, grant: Grant, text: str, *, offset: int = 0, stream: str = "stdout") -> bool:
        """Keep a piece of output; answers whether anything was new."""
        return self.store.write_sync(
            lambda c: life.append_log(
                c, task_id=grant.task.id, token=grant.token, stream=stream, offset=offset, text=text, now_us=self.now
            )
        )

    def get(self, task: TaskRow) -> TaskRow:
        """The task as it stands."""
        return self.store.read_sync(lambda c: life.get_task(c, task.id))

    def page(self, **asked: Any) -> Page:
        """One page of the list."""
        filters = asked.pop("filters", Filters())
        return self.store.read_sync(lambda c: life.list_tasks(c, filters=filters, now_us=self.now, **asked))

    def events(self, task: TaskRow) -> list[Event]:
        """What happened to it."""
        return list(self.store.read_sync(lambda c: life.events_of(c, task_id=task.id)))

    def kinds(self, task: TaskRow) -> list[str]:
        """The kinds of what happened to it."""
        return [event.kind for event in self.events(task)]

    def attempts(self, task: TaskRow) -> list[dict[str, Any]]:
        """Its tries."""
        return self.store.read_sync(lambda c: life.attempts_of(c, task.id))

    def _write(self, do: Any, **fields: Any) -> Any:
        return self.store.write_sync(lambda c: do(c, actor="k-test", now_us=self.now, **fields))


def held(grant: Grant) -> Held:
    return Held(task=grant.task.id, token=grant.token)
