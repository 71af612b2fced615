"""Any sequence of what clients, daemons, people and time do, against a model of a few dictionaries."""

from __future__ import annotations

import tempfile
from typing import Any

import hypothesis.strategies as st
from desk import Desk, held
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from orchestrator_fleet.errors import InvalidTransition, LeaseLost
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.task import Grant, TaskRow
from orchestrator_fleet.tasks.view import to_json

VPS = ("vp-a", "vp-b")
LEASE_S = 30


class Life(RuleBasedStateMachine):
    """The model: each task's status, owner, current token, counted failures, and what it waits for."""

    tasks = Bundle("tasks")
    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.store = open_store(f"sqlite:///{self._folder.name}/store.sqlite")
        self.desk = Desk(self.store)
        self.status: dict[str, str] = {}
        self.owner: dict[str, str] = {}
        self.token: dict[str, str] = {}
        self.lease: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.wakes: dict[str, int] = {}
        self.waits_for: dict[str, set[str]] = {}
        self.most: dict[str, int] = {}
        self.starts: dict[str, int] = {}

    def teardown(self) -> None:
        """Close and remove the file."""
        self.store.close()
        self._folder.cleanup()

    @rule(target=tasks, owner=st.sampled_from(VPS), most=st.integers(1, 3))
    def create(self, owner: str, most: int) -> TaskRow:
        """A task without dependencies."""
        return self._remember(self.desk.make(orchestrator=owner, max_attempts=most))

    @rule(target=tasks, before=st.lists(tasks, min_size=1, max_size=3), owner=st.sampled_from(VPS))
    def create_dependent(self, before: list[TaskRow], owner: str) -> TaskRow:
        """A task that waits for others, some of which may have ended."""
        ids = tuple(task.id for task in before)
        return self._remember(self.desk.make(orchestrator=owner, depends_on=ids), ids)

    @rule(target=grants, owner=st.sampled_from(VPS), limit=st.integers(1, 3))
    def claim(self, owner: str, limit: int) -> Any:
        """The first of those that are TODO and awake, in order of creation (all have the same priority)."""
        ready = [t for t, s in self.status.items() if s == "TODO" and self.owner[t] == owner and self._awake(t)]
        got = self.desk.claim(owner, limit=limit, lease_s=LEASE_S)
        assert {grant.task.id for grant in got} <= set(ready)
        assert len(got) == min(limit, len(ready))
        for grant in got:
            task = grant.task.id
            self.status[task] = "IN_PROGRESS"
            self.token[task], self.lease[task] = grant.token, self.desk.now + LEASE_S * 1_000_000
            self.starts[task] += 1
            assert grant.attempt == self.starts[task]
        return multiple(*got)

    @rule(grant=grants, outcome=st.sampled_from(["done", "failed", "crashed", "failed_for_good", "released"]))
    def finish(self, grant: Grant, outcome: str) -> None:
        """By a token that may be the current one, an old one, or one that has reported already."""
        task = grant.task.id
        if self.token.get(task) != grant.token:
            self._refused_or_repeated(grant, outcome)
            return
        after = self.desk.finish(grant, outcome)
        del self.token[task], self.lease[task]
        if outcome in ("failed", "crashed", "failed_for_good"):
            self.failures[task] += 1
        if outcome == "done":
            self.status[task] = "DONE"
            self._free_those_that_waited_for(task)
        elif outcome == "failed_for_good" or self.failures[task] >= self.most[task]:
            self.status[task] = "BLOCKED"
        else:
            self.status[task] = "TODO"
        if outcome in ("failed", "crashed") and self.status[task] == "TODO":
            self.wakes[task] = self.desk.now + 2_000_000 * 2 ** (self.failures[task] - 1)
        assert after.status == self.status[task]

    @rule(some=st.lists(grants, max_size=3))
    def beat(self, some: list[Grant]) -> None:
        """Current ones are held longer, the others are told."""
        lost = self.desk.beat(*(held(grant) for grant in some), lease_s=LEASE_S)
        expected = []
        for grant in some:
            if self.token.get(grant.task.id) == grant.token:
                self.lease[grant.task.id] = self.desk.now + LEASE_S * 1_000_000
            else:
                expected.append(grant.task.id)
        assert list(lost) == expected

    @rule(some=st.lists(grants, max_size=2), owner=st.sampled_from(VPS))
    def daemon_restarts(self, some: list[Grant], owner: str) -> None:
        """It says hello with what it still holds; the rest of its attempts are taken back."""
        mine = [grant for grant in some if self.owner[grant.task.id] == owner]
        answer = self.desk.hello(*(held(grant) for grant in mine), orchestrator=owner)
        kept = {g.task.id for g in mine if self.token.get(g.task.id) == g.token}
        dropped = {t for t in self.token if self.owner[t] == owner} - kept
        for task in kept:
            self.lease[task] = self.desk.now + LEASE_S * 1_000_000
        assert {task.id for task in answer.requeued} == dropped
        for task in dropped:
            self._lose(task)

    @rule(seconds=st.sampled_from([1, 3, 10, 31, 400]))
    def time_passes(self, seconds: int) -> None:
        """Leases that ran out are taken back."""
        self.desk.clock.advance(seconds)
        expired = {task for task, until in self.lease.items() if until <= self.desk.now}
        assert {task.id for task in self.desk.expire()} == expired
        for task in expired:
            self._lose(task)

    @rule(task=tasks)
    def cancel(self, task: TaskRow) -> None:
        """What is not final ends; who ran it is named."""
        if self.status[task.id] in ("DONE", "CANCELLED"):
            try:
                self.desk.cancel(task)
            except InvalidTransition:
                return
            raise AssertionError("a final task was cancelled")
        stopped = self.desk.cancel(task).stopped
        assert (stopped.token if stopped else None) == self.token.pop(task.id, None)
        self.lease.pop(task.id, None)
        self.status[task.id] = "CANCELLED"

    @rule(task=tasks, owner=st.sampled_from(VPS))
    def assign(self, task: TaskRow, owner: str) -> None:
        """An open task moves; a running one is released first."""
        if self.status[task.id] in ("DONE", "CANCELLED"):
            return
        self.desk.assign(task, owner)
        if self.owner[task.id] != owner and self.status[task.id] == "IN_PROGRESS":
            self.status[task.id] = "TODO"
            del self.token[task.id], self.lease[task.id]
        self.owner[task.id] = owner

    @rule(task=consumes(tasks))
    def redrive(self, task: TaskRow) -> None:
        """A task that spent its tries gets them back; one that waits for cancelled ones goes on without them."""
        if self.status[task.id] != "BLOCKED":
            return
        unmet = {t for t in self.waits_for[task.id] if self.status[t] not in ("DONE", "CANCELLED")}
        if unmet:
            return
        after = self.desk.unblock(task)
        self.status[task.id] = "TODO"
        if after.failures == 0:
            self.failures[task.id] = 0
        self.waits_for[task.id] = set(after.depends_on)

    @invariant()
    def the_store_agrees(self) -> None:
        """Every row is as the model has it, and the newest event tells it."""
        found = {task.id: task for task in self.desk.page(limit=100).rows}
        assert {task: row.status for task, row in found.items()} == self.status
        assert {task: row.token for task, row in found.items() if row.token} == self.token
        assert {task: row.orchestrator for task, row in found.items()} == self.owner
        assert {task: row.failures for task, row in found.items()} == self.failures
        told: dict[str, Any] = {}
        for event in self.store.read_sync(lambda c: outbox.read_after(c, 0)):
            assert event.task is not None
            told[event.task] = event.data["task"]
        assert told == {task: to_json(row) for task, row in found.items()}
        running = [self.store.read_sync(lambda c, v=vp: life.count_by_status(c, v).get("IN_PROGRESS", 0)) for vp in VPS]
        assert sum(running) == len(self.token)

    def _remember(self, task: TaskRow, before: tuple[str, ...] = ()) -> TaskRow:
        self.status[task.id] = "BLOCKED" if any(self.status[t] != "DONE" for t in before) else "TODO"
        self.owner[task.id], self.most[task.id] = str(task.orchestrator), task.max_attempts
        self.failures[task.id], self.starts[task.id] = 0, 0
        self.waits_for[task.id] = set(before)
        return task

    def _awake(self, task: str) -> bool:
        return self.wakes.get(task, 0) <= self.desk.now

    def _lose(self, task: str) -> None:
        del self.token[task], self.lease[task]
        self.failures[task] += 1
        self.status[task] = "BLOCKED" if self.failures[task] >= self.most[task] else "TODO"

    def _free_those_that_waited_for(self, ended: str) -> None:
        for task, before in self.waits_for.items():
            waits = self.status[task] == "BLOCKED" and self.starts[task] == 0
            if waits and ended in before and all(self.status[t] == "DONE" for t in before):
                self.status[task] = "TODO"

    def _refused_or_repeated(self, grant: Grant, outcome: str) -> None:
        try:
            self.desk.finish(grant, outcome)
        except LeaseLost:
            return
        ended = next(a for a in self.desk.attempts(grant.task) if a["attempt"] == grant.attempt)
        assert ended["outcome"] == outcome


# Each step writes to a real file, and a rule whose bundle is still empty counts as filtered out.
EXPECTED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

TestLife = Life.TestCase
TestLife.settings = settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=EXPECTED)
