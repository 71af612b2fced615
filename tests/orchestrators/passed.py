"""Short words for passing tasks on, over a desk."""

from __future__ import annotations

from typing import Any

from desk import Desk

from orchestrator_fleet.orchestrators import asked, coordination, delegation, handoff, notices, passing
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.store.database import Store
from orchestrator_fleet.tasks import rows
from orchestrator_fleet.tasks.task import Changed, TaskRow

# One of them is asked for by discipline, as the desk's tests are.
MANY: dict[str, Any] = {
    "orchestrators": {f"vp-{letter}": {"discipline": "eng" if letter == "a" else "sec"} for letter in "abcdefg"},
    "routing": [
        {"name": "by-discipline", "when": "has(task.discipline)", "to": {"discipline": "{{ task.discipline }}"}}
    ],
}


class Hands:
    """Passes tasks on, and looks at what came of it. Time goes on a little with each."""

    def __init__(self, store: Store) -> None:
        self.desk = Desk(store, MANY)

    def delegate(self, task: TaskRow, source: str, target: str, **more: Any) -> Coordination:
        """Delegate it."""
        known: dict[str, Any] = {"note": None, "fields": {}, "task_id": task.id, "source": source, "target": target}
        return self._write(delegation.delegate, **{**known, **more})[0]

    def hand_off(self, task: TaskRow, source: str, target: str, **more: Any) -> Coordination:
        """Hand it over, or begin to."""
        known: dict[str, Any] = {"notes": None, "context": {}, "completion": None}
        return self._write(handoff.begin, **{"task_id": task.id, "source": source, "target": target, **known, **more})[
            0
        ]

    def complete(self, one: Coordination, *, stopped: bool = True) -> Coordination:
        """Complete a handoff."""
        self.desk.clock.advance(1)
        now_us = self.desk.now
        return self.desk.store.write_sync(lambda c: handoff.complete(c, one.id, now_us=now_us, stopped=stopped))[0]

    def answer(self, one: Coordination, who: str, said: Any, reason: str | None = None) -> Coordination:
        """Let its target accept or reject it."""
        return self._write(asked.answer, of=one.id, orchestrator=who, said=said, reason=reason)[0]

    def settle(self, task: TaskRow) -> list[str]:
        """Write down what has become of its links; answers their states, the oldest first."""

        def write(conn: Any) -> list[str]:
            row = rows.get_to_change(conn, task.id)
            _, after = passing.settle(conn, row, coordination.of_task(conn, task.id), now_us=self.desk.now)
            return [one.state for one in after]

        return self.desk.store.write_sync(write)

    def late(self, task: TaskRow) -> bool:
        """Whether something of it is not written down yet."""
        return self.desk.store.read_sync(lambda c: passing.unsettled(c, [task.id])) == [task.id]

    def now(self, one: Coordination) -> Coordination:
        """How it stands, written down or not."""
        return self.desk.store.read_sync(lambda c: asked.find(c, one.id, one.source))

    def written(self, one: Coordination) -> Coordination:
        """How it stands in the table."""
        return self.desk.store.read_sync(lambda c: coordination.find(c, one.id))

    def told(self, orchestrator: str) -> list[str]:
        """The kinds of what an orchestrator is told."""
        now_us = self.desk.now
        waiting = self.desk.store.read_sync(lambda c: notices.waiting(c, orchestrator, limit=100, now_us=now_us))
        return [notice.kind for notice in waiting]

    def assign(self, task: TaskRow, to: str) -> Changed:
        """A person gives it to somebody."""
        self.desk.clock.advance(1)
        return self.desk.assign(task, to)

    def _write(self, do: Any, **fields: Any) -> Any:
        self.desk.clock.advance(1)
        now_us = self.desk.now
        return self.desk.store.write_sync(lambda c: do(c, actor="k-test", now_us=now_us, **fields))
