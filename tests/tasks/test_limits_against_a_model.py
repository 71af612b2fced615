"""Any sequence of what happens to tasks under limits, against a model that counts by hand."""

from __future__ import annotations

import tempfile
from typing import Any

import hypothesis.strategies as st
from asker import Asker
from desk import Desk
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import limit_uses
from orchestrator_fleet.tasks import limits
from orchestrator_fleet.tasks.rules import Rules
from orchestrator_fleet.tasks.task import Grant, TaskRow

VPS = ("vp-a", "vp-b")
REPOS, TEAMS = ("r1", "r2", None), ("t1", "t2")
WINDOW_US = 60_000_000
LEASE_S = 300
RULES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"name": "per-repo", "key": "task.metadata.repo", "max_running": 1},),
    (
        {"name": "per-repo", "key": "task.metadata.repo", "max_running": 2},
        {"name": "per-team", "key": "task.metadata.team", "max_running": 2},
    ),
    (
        {"name": "per-team", "key": "task.metadata.team", "max_running": 1, "max_per_minute": 2},
        {"name": "per-repo", "key": "task.metadata.repo", "max_per_minute": 3},
    ),
    (),
)


def spec_of(number: int) -> dict[str, Any]:
    """A fleet under one of RULES."""
    return {"orchestrators": {vp: {} for vp in VPS}, "limits": list(RULES[number])}


class Limited(RuleBasedStateMachine):
    """The model: which attempts run, and of each that ever began when it did and what it counts on."""

    @initialize(number=st.integers(0, len(RULES) - 1))
    def open(self, number: int) -> None:
        """An empty store under some rules."""
        self._folder = tempfile.TemporaryDirectory()
        self.store = open_store(f"sqlite:///{self._folder.name}/store.sqlite")
        self.desk, self.number = Desk(self.store), number
        self.asker = Asker(self.desk, spec_of(number), lease_s=LEASE_S)
        self.running: dict[str, Grant] = {}
        self.begun: dict[tuple[str, int], tuple[int, dict[str, str]]] = {}
        for vp in VPS:
            for repo in ("r1", "r2", "r1", None):
                self.create(vp=vp, repo=repo, team="t1", priority="LOW", many=1)

    def teardown(self) -> None:
        """Close and remove the file."""
        if hasattr(self, "store"):
            self.store.close()
            self._folder.cleanup()

    @rule(
        vp=st.sampled_from(VPS),
        repo=st.sampled_from(REPOS),
        team=st.sampled_from(TEAMS),
        priority=st.sampled_from(["HIGH", "LOW"]),
        many=st.integers(1, 3),
    )
    def create(self, *, vp: str, repo: str | None, team: str, priority: str, many: int) -> None:
        """A few tasks of a key."""
        for _ in range(many):
            self.desk.make(orchestrator=vp, priority=priority, metadata={"repo": repo, "team": team})
            self.desk.clock.advance(0.001)

    @rule(vp=st.sampled_from(VPS), limit=st.integers(1, 4))
    def claim(self, vp: str, limit: int) -> None:
        """What is taken has room, and when less is taken than asked for, nothing that is left has any."""
        grants = self.asker.ask(vp, limit=limit).grants
        for grant in grants:
            assert self._room(grant.task) > 0
            self.running[grant.task.id] = grant
            self.begun[grant.task.id, grant.attempt] = self.desk.now, self._values(grant.task)
        if len(grants) < limit:
            waiting = [task for task in self._all("TODO") if task.orchestrator == vp and self._is_awake(task)]
            assert [task.id for task in waiting if self._room(task) > 0] == []

    @precondition(lambda self: self.running)
    @rule(vp=st.sampled_from(VPS), many=st.integers(1, 5))
    def work(self, vp: str, many: int) -> None:
        """As daemons do: one ends, the next is asked for."""
        for task in sorted(self.running)[:many]:
            self.desk.finish(self.running.pop(task))
            self.desk.clock.advance(0.001)
            self.claim(vp, 2)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "failed", "failed_for_good", "released", "quota"]))
    def finish(self, data: st.DataObject, outcome: str) -> None:
        """One attempt ends; a quota holds nobody in this model."""
        grant = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        self.desk.finish(grant, outcome, **({"until_us": self.desk.now + 1} if outcome == "quota" else {}))
        self.desk.clock.advance(0.001)

    @rule(
        data=st.data(),
        how=st.sampled_from(["cancel", "assign", "edit", "priority", "put off", "block"]),
        asked=st.booleans(),
    )
    def change(self, data: st.DataObject, how: str, *, asked: bool) -> None:
        """Somebody changes an open task: one that waits, is parked, or runs. Those who wait for work may be woken."""
        open_ones = self._all("TODO", "IN_PROGRESS")
        if not open_ones:
            return
        task = data.draw(st.sampled_from(open_ones))
        match how:
            case "cancel":
                self.desk.cancel(task)
            case "block":
                self.desk.set_status(task, "BLOCKED")
            case "assign":
                self.desk.assign(task, "vp-b" if task.orchestrator == "vp-a" else "vp-a")
            case "edit":
                self.desk.update(task, metadata={"repo": data.draw(st.sampled_from(REPOS)), "team": "t1"})
            case "priority":
                self.desk.update(task, priority="CRITICAL")
            case "put off":
                self.desk.update(task, available_at_us=self.desk.now + 5_000_000)
        if self.desk.get(task).status != "IN_PROGRESS":
            self.running.pop(task.id, None)
        if asked:
            self.everybody_asks()

    @rule()
    def everybody_asks(self) -> None:
        """More than there may be for them."""
        for vp in VPS:
            self.claim(vp, 6)

    @rule(seconds=st.sampled_from([5, 29, 61, 61, LEASE_S + 1]), asked=st.booleans())
    def time_passes(self, seconds: int, *, asked: bool) -> None:
        """Rates come free, leases run out."""
        self.desk.clock.advance(seconds)
        for task in self.desk.expire():
            self.running.pop(task.id)
        if asked:
            self.everybody_asks()

    @rule(number=st.integers(0, len(RULES) - 1))
    def rules_change(self, number: int) -> None:
        """As the control plane does it: everybody back in line, what runs counted anew."""
        self.number, self.asker.rules = number, Rules.of_spec(spec_of(number))
        while self.store.write_sync(lambda c: limits.unpark_all(c, self.desk.now)):
            pass
        after: str | None = ""
        while after is not None:
            after = self.store.write_sync(lambda c, a=after: limits.recount(c, rules=self.asker.rules, after=a))
        for task in self._all("IN_PROGRESS"):
            began_us, _ = self.begun[task.id, task.attempt]
            self.begun[task.id, task.attempt] = began_us, self._values(task)

    @rule()
    def look(self) -> None:
        """The loop calls up whom it can, and forgets what is old."""
        self.store.write_sync(lambda c: limits.call_up(c, rules=self.asker.rules, now_us=self.desk.now))
        self.store.write_sync(lambda c: limits.forget(c, self.desk.now))

    @invariant()
    def what_runs_is_counted_and_nothing_else(self) -> None:
        """A row for each limit that applies to each running attempt."""
        if not hasattr(self, "store"):
            return
        expected = sorted(
            (name, value, task)
            for task, grant in self.running.items()
            for name, value in self.begun[task, grant.attempt][1].items()
        )
        assert self._uses() == expected
        assert {task.id for task in self._all("IN_PROGRESS")} == self.running.keys()
        for task in self._all("TODO", "BLOCKED", "DONE", "CANCELLED", "IN_PROGRESS"):
            assert task.parked_by is None or task.status == "TODO"
            assert task.counts_on is None or task.status == "IN_PROGRESS"

    def _room(self, task: TaskRow) -> int:
        """By hand."""
        rooms = [99]
        current = {(one, grant.attempt) for one, grant in self.running.items()}
        for declared in RULES[self.number]:
            value = self._values(task).get(declared["name"])
            if value is None:
                continue
            same = {key: at_us for key, (at_us, on) in self.begun.items() if on.get(declared["name"]) == value}
            rooms.append(declared.get("max_running", 99) - len(current & same.keys()))
            lately = [at_us for at_us in same.values() if at_us > self.desk.now - WINDOW_US]
            rooms.append(declared.get("max_per_minute", 99) - len(lately))
        return min(rooms)

    def _values(self, task: TaskRow) -> dict[str, str]:
        """What a task that begins now would count on."""
        fields = {declared["name"]: declared["key"].rpartition(".")[2] for declared in RULES[self.number]}
        return {name: value for name, field in fields.items() if (value := task.metadata.get(field)) is not None}

    def _is_awake(self, task: TaskRow) -> bool:
        return task.available_at_us is None or task.available_at_us <= self.desk.now

    def _all(self, *statuses: str) -> list[TaskRow]:
        rows = [task for task in self.desk.page(limit=100).rows if task.status in statuses]
        return sorted(rows, key=lambda task: task.id)

    def _uses(self) -> list[tuple[str, str, str]]:
        """What the store counts as running."""
        rows = self.store.read_sync(lambda c: c.execute(limit_uses.select()).all())
        return sorted((row.limit_name, row.value, row.task) for row in rows if row.ended_at_us is None)


# Each step writes to a real file, and a rule that has nothing to act on yet counts as filtered out.
EXPECTED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

TestLimited = Limited.TestCase
TestLimited.settings = settings(max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=EXPECTED)
