"""Any sequence of what clients, workers and people do over HTTP, against a model of a few dictionaries.

One served control plane for all of it: each example works on tasks of its own and ends them. Time is real, but for
leases, which are made to run out in the store.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import audit
import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from living_fleet import until
from serving import ControlPlane

from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.schema import tasks as table

VPS = ("vp-a", "vp-b")
PRIORITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW")
REPOS = (None, "r1", "r2")
SHAPES = (VPS, PRIORITIES, REPOS, (1, 2, 3))
EXAMPLES = int(os.environ.get("FLEET_MODEL_EXAMPLES", "30"))
STEPS = 30
BACKOFF_S = 0.06  # of which 50 ms are the fleet's
FAR = "2100-01-01T00:00:00Z"
WORDS = {"complete": "done", "fail": "failed", "fail for good": "failed_for_good", "release": "released"}
LIMITS = "limits: [{name: one-per-repo, key: task.metadata.repo, max_running: 1}]\n"
_runs = itertools.count(1)


@dataclass
class Task:
    """What the model knows of a task. `number` is its place among all that were made."""

    id: str
    number: int
    owner: str
    priority: str
    repo: str | None
    most: int
    asleep: bool
    status: str = "TODO"
    why: str | None = None
    waits_for: list[str] = field(default_factory=list)
    attempt: int = 0
    failures: int = 0
    token: str | None = None
    counts_on: str | None = None
    version: int = 0


@dataclass(frozen=True)
class Grant:
    """A claim that was answered."""

    task: str
    token: str
    attempt: int


class Life(RuleBasedStateMachine):
    """The model, and the doors it is held against."""

    plane: ControlPlane
    http: httpx.Client
    store: Store
    tasks = Bundle("tasks")
    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Task] = {}
        self.ended: dict[str, str] = {}
        self.paused: set[str] = set()
        self.tag = f"run-{next(_runs)}"
        self.began = self.store.read_sync(outbox.last_seq)

    def teardown(self) -> None:
        """The history of this example must hold by itself; then it is cleared away."""
        events = self.store.read_sync(lambda conn: outbox.read_after(conn, self.began))
        wrong = audit.of_events(events, max_running={"repo": 1})
        listed = {one["id"]: one for one in self.listed()}
        newest = {event.task: event.data["task"] for event in events if event.task in listed}
        for name in self.paused:
            self.ask("POST", f"/vps/{name}/activate", {}, 200)
        for task in self.known.values():
            if task.status not in ("DONE", "CANCELLED"):
                self.ask("POST", f"/tasks/{task.id}/cancel", {}, 200)
        assert not wrong, "\n".join(wrong)
        assert newest == listed, "the newest event of a task does not tell what it is"

    def ask(self, method: str, path: str, body: Any, *expected: int, **headers: str) -> Any:
        """The decoded answer, which must have one of these statuses."""
        answer = self.http.request(
            method, f"/api{path}", json=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        assert answer.status_code in expected, f"{method} {path} {body} -> {answer.status_code} {answer.text}"
        return answer.json()

    def listed(self) -> list[dict[str, Any]]:
        """All tasks of this example, in the order of the line."""
        found, cursor = [], ""
        while cursor is not None:
            page = self.http.get(f"/api/tasks?tag={self.tag}&limit=100{cursor and '&cursor=' + cursor}").json()
            assert page["pagination"]["total"] == len(self.known)
            found += page["data"]
            cursor = page["pagination"]["next_cursor"]
        return found

    # What clients do.

    @initialize(target=tasks, some=st.lists(st.tuples(*map(st.sampled_from, SHAPES)), min_size=4, max_size=8))
    def begin(self, some: list[tuple[str, str, str | None, int]]) -> Any:
        """There is a line to begin with."""
        return multiple(*(self._create(*one) for one in some))

    @rule(
        target=tasks,
        owner=st.sampled_from(VPS),
        priority=st.sampled_from(PRIORITIES),
        repo=st.sampled_from(REPOS),
        most=st.integers(1, 3),
        asleep=st.sampled_from([False, False, False, True]),
    )
    def create(self, owner: str, priority: str, repo: str | None, most: int, asleep: bool) -> str:  # noqa: FBT001
        """A task that waits for nobody."""
        return self._create(owner, priority, repo, most, asleep=asleep)

    @rule(
        target=tasks,
        before=st.lists(tasks, min_size=1, max_size=3, unique=True),
        owner=st.sampled_from(VPS),
        repo=st.sampled_from(REPOS),
    )
    def create_dependent(self, before: list[str], owner: str, repo: str | None) -> str:
        """A task that waits for others, which may have ended."""
        return self._create(owner, "HIGH", repo, 2, waits_for=before)

    @rule(task=tasks, priority=st.sampled_from(PRIORITIES))
    def edit_priority(self, task: str, priority: str) -> None:
        """Anything open may get another priority, with the version that was seen and not with an old one."""
        known = self.known[task]
        stale = self.ask("PUT", f"/tasks/{task}", {"priority": priority}, 412, 409, If_Match=f'"{known.version + 7}"')
        assert stale["code"] in ("stale", "final")
        if self._is_final(known):
            return
        self.ask("PUT", f"/tasks/{task}", {"priority": priority}, 200, If_Match=f'"{known.version}"')
        known.priority = priority

    @rule(task=tasks, repo=st.sampled_from(REPOS))
    def edit_what_a_limit_looks_at(self, task: str, repo: str | None) -> None:
        """A task in line is held by its new value from now on; one that runs still counts on its old one."""
        known = self.known[task]
        code = 409 if self._is_final(known) else 200
        self.ask("PUT", f"/tasks/{task}", {"metadata": {"repo": repo} if repo else {}}, code)
        if code == 200:
            known.repo = repo

    @rule(task=tasks)
    def wake(self, task: str) -> None:
        """It becomes available now."""
        known = self.known[task]
        if not self._is_final(known):
            self.ask("PUT", f"/tasks/{task}", {"available_at": None}, 200)
            known.asleep = False

    @rule(task=tasks)
    def block(self, task: str) -> None:
        """By hand: a running one loses its attempt."""
        known = self.known[task]
        legal = known.status in ("TODO", "IN_PROGRESS") or known.status == "BLOCKED"
        self.ask("PUT", f"/tasks/{task}", {"status": "BLOCKED"}, 200 if legal else 409)
        if legal and known.status != "BLOCKED":
            self._stop(known, "released")
            known.status, known.why = "BLOCKED", "manual"

    @rule(task=tasks, owner=st.sampled_from(VPS))
    def assign(self, task: str, owner: str) -> None:
        """An open task moves, a running one is taken from its worker first."""
        known = self.known[task]
        code = 207 if self._is_final(known) else 200
        self.ask("POST", "/tasks/assign", {"task_ids": [task], "orchestrator": owner}, code)
        if code == 200 and owner != known.owner:
            if known.status == "IN_PROGRESS":
                self._stop(known, "released")
                known.status, known.asleep = "TODO", False
            known.owner = owner

    @rule(task=tasks)
    def cancel(self, task: str) -> None:
        """What is open ends; what has ended stays as it is."""
        known = self.known[task]
        if self._is_final(known):
            assert self.ask("POST", f"/tasks/{task}/cancel", {}, 409)["code"] == "invalid_transition"
            return
        self.ask("POST", f"/tasks/{task}/cancel", {"reason": "model"}, 200)
        self._stop(known, "cancelled")
        known.status, known.why = "CANCELLED", None

    @rule(task=tasks, word=st.sampled_from(["unblock", "retry"]))
    def redrive(self, task: str, word: str) -> None:
        """A blocked task goes back in line unless it waits for open ones; cancelled ones are waived."""
        known = self.known[task]
        if word == "retry" and self._is_final(known):
            return
        if known.status != "BLOCKED":
            self.ask("POST", f"/tasks/{task}/{word}", {}, 409)
            return
        if any(not self._is_final(self.known[one]) for one in known.waits_for):
            assert self.ask("POST", f"/tasks/{task}/{word}", {}, 409)["code"] == "dependency_unmet"
            return
        self.ask("POST", f"/tasks/{task}/{word}", {}, 200)
        known.waits_for = [one for one in known.waits_for if self.known[one].status == "DONE"]
        known.failures = 0 if known.why == "attempts_exhausted" else known.failures
        known.status, known.why = "TODO", None

    @rule(target=tasks, task=tasks)
    def retry_ended(self, task: str) -> Any:
        """A final task becomes a new one that names it."""
        known = self.known[task]
        if not self._is_final(known):
            return multiple()
        new = self.ask("POST", f"/tasks/{task}/retry", {}, 201)
        assert new["parent"] == task
        self._remember(new["id"], known.owner, known.priority, known.repo, known.most)
        return new["id"]

    @rule(task=tasks, word=st.sampled_from(["approve", "reject"]))
    def decide(self, task: str, word: str) -> None:
        """Nothing here waits for an approval."""
        assert self.ask("POST", f"/tasks/{task}/{word}", {}, 409)["code"] == "not_awaiting_approval"

    @rule(some=st.lists(tasks, min_size=1, max_size=4, unique=True), dry=st.booleans())
    def cancel_many(self, some: list[str], dry: bool) -> None:  # noqa: FBT001
        """Each by itself; dry, the same answer and nothing done."""
        final = {task for task in some if self._is_final(self.known[task])}
        told = self.ask(
            "POST", "/tasks/bulk", {"action": "cancel", "task_ids": some, "dry_run": dry}, 207 if final else 200
        )
        assert [one["id"] for one in told["results"]] == some
        assert {one["id"] for one in told["results"] if not one["ok"]} == final
        assert told["changed"] == len(some) - len(final)
        for task in set(some) - final if not dry else ():
            self._stop(self.known[task], "cancelled")
            self.known[task].status, self.known[task].why = "CANCELLED", None

    @precondition(lambda self: len(self.known) > len(self.paused) * 12)
    @rule(owner=st.sampled_from(VPS), drain=st.booleans())
    def pause(self, owner: str, drain: bool) -> None:  # noqa: FBT001
        """It claims nothing until it is activated; without draining, what it runs goes back in line."""
        self.ask("POST", f"/vps/{owner}/deactivate", {"reason": "model", "drain": drain}, 200)
        self.paused.add(owner)
        for task in self.known.values() if not drain else ():
            if task.owner == owner and task.status == "IN_PROGRESS":
                self._stop(task, "released")
                task.status, task.asleep = "TODO", False

    @precondition(lambda self: self.paused)
    @rule(owner=st.sampled_from(VPS))
    def resume(self, owner: str) -> None:
        """It claims again."""
        told = self.ask("POST", f"/vps/{owner}/activate", {}, 200)
        assert told["changed"] == (owner in self.paused)
        self.paused.discard(owner)

    # What workers do.

    @rule(target=grants, owner=st.sampled_from(VPS), limit=st.integers(1, 4))
    def poll(self, owner: str, limit: int) -> Any:
        """Exactly the first of the line that no limit holds, in its order."""
        return multiple(*self._poll(owner, limit))

    @rule(
        target=grants, owner=st.sampled_from(VPS), words=st.lists(st.sampled_from(list(WORDS)), min_size=1, max_size=4)
    )
    def work(self, owner: str, words: list[str]) -> Any:
        """A worker that claims and reports, one task after another."""
        got = []
        for word in words:
            for grant in self._poll(owner, 1):
                self._report(grant, word)
                got.append(grant)
        return multiple(*got)

    def _poll(self, owner: str, limit: int) -> list[Grant]:
        told = self.ask("POST", "/tasks/poll", {"orchestrator": owner, "limit": limit, "lease_s": 3600}, 200)
        expected = [] if owner in self.paused else self._first(owner, limit)
        assert [one["task"]["id"] for one in told["data"]] == expected, told.get("reason")
        assert bool(told["data"]) != bool(told.get("reason"))
        got = []
        for one in told["data"]:
            known, lease = self.known[one["task"]["id"]], one["lease"]
            known.attempt += 1
            known.status, known.token, known.counts_on = "IN_PROGRESS", lease["token"], known.repo
            assert lease["attempt"] == known.attempt
            assert lease["token"] not in self.ended
            got.append(Grant(known.id, lease["token"], known.attempt))
        return got

    @rule(grant=grants, word=st.sampled_from(list(WORDS)))
    def report(self, grant: Grant, word: str) -> None:
        """With a token that may be the current one, an old one, or one that has reported already."""
        self._report(grant, word)

    def _report(self, grant: Grant, word: str) -> None:
        known, outcome = self.known[grant.task], WORDS[word]
        body: dict[str, Any] = {"token": grant.token}
        if word.startswith("fail"):
            body["error"] = {"message": "m", "retryable": word == "fail"}
        current = known.token == grant.token
        repeated = self.ended.get(grant.token) == outcome
        told = self.ask(
            "POST", f"/tasks/{known.id}/{word.split(maxsplit=1)[0]}", body, 200 if current or repeated else 409
        )
        if not current:
            assert repeated or told["code"] == "lease_lost"
            return
        self._stop(known, outcome)
        known.failures += outcome in ("failed", "failed_for_good")
        if outcome == "done":
            known.status = "DONE"
            self._follow(known.id)
        elif outcome == "failed_for_good" or (outcome == "failed" and known.failures >= known.most):
            known.status, known.why = "BLOCKED", "attempts_exhausted"
        else:
            known.status, known.asleep = "TODO", False
            time.sleep(BACKOFF_S if outcome == "failed" else 0)
        assert told["status"] == known.status

    @rule(grant=grants)
    def beat(self, grant: Grant) -> None:
        """Only the current token holds its task."""
        current = self.known[grant.task].token == grant.token
        told = self.ask(
            "POST", f"/tasks/{grant.task}/heartbeat", {"token": grant.token, "lease_s": 3600}, 200 if current else 409
        )
        assert current or told["code"] == "lease_lost"

    @rule(grant=grants)
    def lease_runs_out(self, grant: Grant) -> None:
        """The task is somebody else's to take, at the latest a look of the sweep later; the try counts."""
        known = self.known[grant.task]
        if known.token != grant.token:
            return
        out = table.update().where(table.c.id == known.id).values(lease_until_us=1)
        self.store.write_sync(lambda conn: conn.execute(out).rowcount)
        until(
            lambda: self.ask("GET", f"/tasks/{known.id}", None, 200)["status"] != "IN_PROGRESS", "it is taken back", 5
        )
        self._stop(known, "lease_lost")
        known.failures += 1
        spent = known.failures >= known.most
        known.status, known.why = ("BLOCKED", "attempts_exhausted") if spent else ("TODO", None)
        known.asleep = False

    # What must be so after each step.

    @invariant()
    def what_is_listed_is_what_the_model_has(self) -> None:
        """Every task, in the order of the line; a task that changed has a higher version; tokens are as answered."""
        listed = self.listed()
        for one in listed:
            known = self.known[one["id"]]
            seen = (one["status"], one["blocked_reason"], one["orchestrator"], one["priority"], one["attempt"])
            assert seen == (known.status, known.why, known.owner, known.priority, known.attempt), (one, known)
            assert one["version"] >= known.version
            assert (one["completed_at"] is not None) == self._is_final(known)
            assert (one["started_at"] is not None) == (known.attempt > 0)
            known.version = one["version"]
        line = [one["id"] for one in listed if one["status"] == "TODO"]
        todo = [task for task in self.known.values() if task.status == "TODO"]
        assert line == [task.id for task in sorted(todo, key=_place)]
        tokens = self.store.read_sync(
            lambda conn: {row.id: row.token for row in conn.execute(table.select()) if row.id in self.known}
        )
        assert tokens == {task.id: task.token for task in self.known.values()}

    def _create(
        self,
        owner: str,
        priority: str,
        repo: str | None,
        most: int,
        *,
        asleep: bool = False,
        waits_for: list[str] | None = None,
    ) -> str:
        body = {
            "title": "t",
            "tags": [self.tag],
            "orchestrator": owner,
            "priority": priority,
            "max_attempts": most,
            "depends_on": waits_for or [],
            "metadata": {"repo": repo} if repo else {},
            **({"available_at": FAR} if asleep else {}),
        }
        key = f"{self.tag}-{len(self.known)}"
        made = self.ask("POST", "/tasks", body, 201, Idempotency_Key=key)
        assert self.ask("POST", "/tasks", body, 201, Idempotency_Key=key) == made
        known = self._remember(made["id"], owner, priority, repo, most, asleep=asleep)
        known.waits_for = list(waits_for or [])
        if any(self.known[one].status != "DONE" for one in known.waits_for):
            known.status, known.why = "BLOCKED", "dependency"
        return known.id

    def _remember(
        self, task: str, owner: str, priority: str, repo: str | None, most: int, *, asleep: bool = False
    ) -> Task:
        known = Task(task, len(self.known), owner, priority, repo, most, asleep)
        self.known[task] = known
        return known

    def _first(self, owner: str, limit: int) -> list[str]:
        """Who is next: the line, without those whose repo is in use."""
        used = {task.counts_on for task in self.known.values() if task.status == "IN_PROGRESS"} - {None}
        taken: list[str] = []
        ready = [t for t in self.known.values() if t.status == "TODO" and t.owner == owner and not t.asleep]
        for task in sorted(ready, key=_place):
            if len(taken) < limit and task.repo not in used:
                taken.append(task.id)
                used |= {task.repo} - {None}
        return taken

    def _stop(self, task: Task, outcome: str) -> None:
        """Its attempt, if one runs, has ended so."""
        if task.token is not None:
            self.ended[task.token] = outcome
        task.token = task.counts_on = None

    def _follow(self, ended: str) -> None:
        for task in self.known.values():
            met = ended in task.waits_for and all(self.known[one].status == "DONE" for one in task.waits_for)
            if task.why == "dependency" and met:
                task.status, task.why = "TODO", None

    @staticmethod
    def _is_final(task: Task) -> bool:
        return task.status in ("DONE", "CANCELLED")


def _place(task: Task) -> tuple[int, int]:
    return PRIORITIES.index(task.priority), task.number


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[type[Life]]:
    plane = ControlPlane(folder / "home")
    text = (plane.home / "fleet.yaml").read_text()
    (plane.home / "fleet.yaml").write_text(text + LIMITS)
    plane.start()
    store = open_store(f"sqlite:///{plane.state}/store.sqlite")
    bearer = {"Authorization": f"Bearer {plane.keys['admin']}"}
    try:
        with httpx.Client(base_url=plane.url, headers=bearer, timeout=30) as http:
            yield type("ServedLife", (Life,), {"plane": plane, "http": http, "store": store})
    finally:
        store.close()
        plane.close()


@pytest.mark.timeout(600)
def test_any_sequence_of_requests_does_to_the_store_what_it_does_to_the_model() -> None:
    """Statuses, tokens, dependencies, limits, pauses, the order of the line, versions and events."""
    with tempfile.TemporaryDirectory() as folder, _served(Path(folder)) as life:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            life,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
