"""Asking above: the ladder, its time-outs, who may decide, and that each level is asked once. Both stores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from desk import Desk

from orchestrator_fleet.errors import Conflict, Invalid, InvalidTransition, TaskError
from orchestrator_fleet.orchestrators import coordination, escalation, notices
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.orchestrators.escalation import Escalated, above, ladder
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life, why
from orchestrator_fleet.tasks.rules import ANYTHING_GOES
from orchestrator_fleet.tasks.task import TaskRow

NAMES = ("vp-a", "vp-b", "vp-c", "vp-d")
DECLARED: dict[str, dict[str, Any]] = {
    "vp-a": {"escalate_to": ["vp-b", "vp-c"], "escalation_timeout": "10m"},
    "vp-b": {"escalate_to": ["vp-d"]},
    "vp-c": {"escalate_to": ["vp-d", "human:oncall"], "escalation_timeout": "1h"},
    "vp-d": {},
}


@pytest.fixture
def desk(store_url: str) -> Iterator[Desk]:
    """Four orchestrators, one above the other."""
    store = open_store(store_url)
    yield Desk(store, {"orchestrators": {name: {} for name in NAMES}, "routing": []})
    store.close()


def escalate(desk: Desk, task: TaskRow, *, source: str = "vp-a", **fields: Any) -> Escalated:
    known = {"reason": "which of the two?", "severity": None, "to": None, "declared": DECLARED, "actor": "k-a"}
    asked = {"source": source, "task_id": task.id, "now_us": desk.now, **known, **fields}
    return desk.store.write_sync(lambda c: escalation.escalate(c, **asked))


def climb(desk: Desk, **fields: Any) -> int:
    asked = {"declared": DECLARED, "now_us": desk.now, **fields}
    return desk.store.write_sync(lambda c: escalation.climb(c, **asked))


def levels(desk: Desk, task: TaskRow) -> list[tuple[str | None, str]]:
    """(who was asked, what came of it), in order."""
    found = desk.store.read_sync(lambda c: coordination.of_task(c, task.id))
    return [(one.target, one.state) for one in sorted(found, key=lambda one: (one.created_at_us, one.hop))]


def newest(desk: Desk, task: TaskRow) -> Coordination:
    found = desk.store.read_sync(lambda c: coordination.of_task(c, task.id))
    return max(found, key=lambda one: (one.created_at_us, one.hop))


def told(desk: Desk, name: str) -> list[str]:
    return [one.kind for one in desk.store.read_sync(lambda c: notices.waiting(c, name, limit=50, now_us=desk.now))]


def decide(desk: Desk, task: TaskRow, verb: str, **fields: Any) -> Any:
    known = {"task_id": task.id, "reason": None, "actor": "k-boss", "now_us": desk.now, **fields}
    return desk.store.write_sync(lambda c: getattr(life, verb)(c, **known))


@pytest.mark.parametrize(
    ("declared", "first", "wanted"),
    [
        ({"vp-a": {}}, None, [None]),
        ({"vp-a": {"escalate_to": ["vp-b"]}, "vp-b": {}}, None, ["vp-b", None]),
        ({"vp-a": {"escalate_to": ["human:me", "vp-b"]}, "vp-b": {}}, None, ["human:me"]),
        (DECLARED, None, ["vp-b", "vp-c", "vp-d", "human:oncall"]),
        (DECLARED, "vp-c", ["vp-c", "vp-d", "human:oncall"]),
        (DECLARED, "vp-d", ["vp-d", "human:oncall"]),
        (DECLARED, "human:anna", ["human:anna"]),
        ({**DECLARED, "vp-e": {"escalate_to": ["vp-b"]}}, "vp-e", ["vp-e", "vp-b", "vp-d", None]),
        ({"vp-a": {"escalate_to": ["vp-gone", "vp-b"]}, "vp-b": {}}, None, ["vp-b", None]),
        # What validation refuses must not go round for ever either.
        ({"vp-a": {"escalate_to": ["vp-b"]}, "vp-b": {"escalate_to": ["vp-a", "vp-b"]}}, None, ["vp-b", None]),
        (
            {f"vp-{n}": {"escalate_to": [f"vp-{n + 1}"]} for n in range(9)} | {"vp-a": {"escalate_to": ["vp-0"]}},
            None,
            ["vp-0", "vp-1", "vp-2", "vp-3", "vp-4", None],
        ),
    ],
)
def test_the_ladder_ends_at_a_person_and_names_nobody_twice(
    declared: dict[str, Any], first: str | None, wanted: list[str | None]
) -> None:
    """Its own list in order, then the list of whom it ends with; at most five, then anybody."""
    way = ladder(declared, "vp-a", first=first)
    assert [level.target for level in way] == wanted
    assert [level.timeout_s is None for level in way] == [not (t or "human:").startswith("vp-") for t in wanted]
    asked: list[str | None] = [way[0].target]
    while asked[-1] is not None and not asked[-1].startswith("human:"):
        asked.append(above(declared, "vp-a", asked).target)
    assert asked == wanted


def test_the_time_out_is_of_whose_list_it_is() -> None:
    """In the spec's own words, or in seconds."""
    way = ladder(DECLARED, "vp-a")
    assert [level.timeout_s for level in way] == [600.0, 600.0, 3600.0, None]


def test_the_next_is_looked_up_in_what_is_declared_now() -> None:
    """Also after the one who was asked last is gone, or the list has changed."""
    assert above({"vp-a": {"escalate_to": ["vp-c"]}, "vp-c": {}}, "vp-a", ["vp-b"]).target is None
    changed = {"vp-a": {"escalate_to": ["vp-c"]}, "vp-b": {"escalate_to": ["vp-a", "human:me"]}, "vp-c": {}}
    assert above(changed, "vp-a", ["vp-b"]).target == "human:me"


def test_a_task_waits_and_the_first_above_is_told(desk: Desk) -> None:
    """One transaction: the task, the question, its events and notices."""
    task = desk.make("choose", priority="HIGH")
    done = escalate(desk, task)
    after = desk.get(task)
    assert (after.status, after.blocked_reason) == ("BLOCKED", "escalation")
    assert after.condition == "vp-b is asked: which of the two?"
    assert desk.kinds(task) == ["task_created", "task_blocked", "escalation_pending"]
    event = desk.events(task)[-1]
    assert event.data["task"]["status"] == "BLOCKED"
    assert (event.actor, event.data["reason"]) == ("k-a", "which of the two?")
    shown = event.data["coordination"]
    assert (shown["to"], shown["level"], shown["severity"]) == ("vp-b", 1, "HIGH")
    assert shown == coordination.to_json(done.asked)
    assert (told(desk, "vp-b"), told(desk, "vp-a")) == (["escalation_pending"], ["escalation_pending"])
    assert desk.claim() == []


def test_a_running_task_is_stopped(desk: Desk) -> None:
    """Its attempt is released, untouched, and its holder's token is good for nothing more."""
    grant = desk.run()
    done = escalate(desk, grant.task, severity="CRITICAL")
    assert done.changed.stopped is not None
    assert done.changed.stopped.token == grant.token
    (attempt,) = desk.attempts(grant.task)
    assert attempt["outcome"] == "released"
    with pytest.raises(TaskError):
        desk.finish(grant)
    assert done.asked.data["severity"] == "CRITICAL"


def test_who_does_not_answer_in_time_is_passed_over(desk: Desk) -> None:
    """Up to a person, who is asked until somebody decides."""
    task = desk.make()
    escalate(desk, task)
    desk.clock.advance(599)
    assert climb(desk) == 0
    desk.clock.advance(1)
    assert climb(desk) == 1
    assert climb(desk) == 0
    assert levels(desk, task) == [("vp-b", "expired"), ("vp-c", "pending")]
    assert desk.get(task).condition == "vp-c is asked: which of the two?"
    expired, pending = desk.events(task)[-2:]
    assert (expired.kind, expired.actor) == ("escalation_expired", "system")
    assert expired.data["reason"] == "vp-b did not answer in 10m; vp-c is asked now"
    assert (pending.kind, pending.data["coordination"]["level"]) == ("escalation_pending", 2)
    assert told(desk, "vp-b") == ["escalation_pending", "escalation_expired"]
    assert told(desk, "vp-c") == ["escalation_pending"]
    desk.clock.advance(600)
    climb(desk)
    desk.clock.advance(3600)
    climb(desk)
    assert levels(desk, task)[2:] == [("vp-d", "expired"), ("human:oncall", "pending")]
    wanted = desk.events(task)[-1]
    assert (wanted.kind, wanted.data["who"], wanted.data["reason"]) == (
        "approval_wanted",
        "human:oncall",
        "which of the two?",
    )
    desk.clock.advance(30 * 86_400)
    assert climb(desk) == 0
    assert len({one.batch for one in desk.store.read_sync(lambda c: coordination.of_task(c, task.id))}) == 1


def test_a_person_is_asked_until_somebody_decides(desk: Desk) -> None:
    """With an event that says that a yes is wanted, and of whom."""
    task = desk.make()
    done = escalate(desk, task, to="human:anna")
    assert done.asked.expires_at_us is None
    assert desk.kinds(task)[-2:] == ["escalation_pending", "approval_wanted"]
    assert desk.events(task)[-1].data["who"] == "human:anna"
    desk.clock.advance(86_400)
    assert climb(desk) == 0
    anybody = desk.make(orchestrator="vp-d")
    assert escalate(desk, anybody, source="vp-d").asked.target is None
    assert desk.get(anybody).condition == "any person is asked: which of the two?"
    assert "who" not in desk.events(anybody)[-1].data


def test_it_may_begin_elsewhere_on_the_ladder(desk: Desk) -> None:
    """The levels before are left out; those behind follow."""
    task = desk.make()
    escalate(desk, task, to="vp-c")
    desk.clock.advance(600)
    climb(desk)
    assert levels(desk, task) == [("vp-c", "expired"), ("vp-d", "pending")]


@pytest.mark.parametrize(
    ("verb", "state", "word"),
    [
        ("approve", "accepted", "approved"),
        ("unblock", "accepted", "unblocked"),
        ("reject", "rejected", "rejected"),
        ("cancel", "expired", "cancelled"),
    ],
)
def test_what_ends_the_wait_ends_the_escalation(desk: Desk, verb: str, state: str, word: str) -> None:
    """In the name of who decided; whoever reads sees it before it is written down."""
    task = desk.make()
    asked = escalate(desk, task).asked
    decide(desk, task, verb, reason="the blue one")
    (seen,) = desk.store.read_sync(lambda c: escalation.look(c, [asked]))
    assert seen.state == state
    assert newest(desk, task).state == "pending"
    assert climb(desk) == 1
    assert climb(desk) == 0
    after = newest(desk, task)
    assert (after.state, after.reason) == (state, f"{word} by k-boss: the blue one") == (seen.state, seen.reason)
    event = desk.events(task)[-1]
    assert (event.kind, event.actor) == (f"escalation_{state}", "k-boss")
    assert told(desk, "vp-a") == ["escalation_pending", f"escalation_{state}"]


@pytest.mark.parametrize(("outcome", "state"), [("done", "done"), ("cancelled", "expired")])
def test_an_accepted_one_is_over_when_its_task_is(desk: Desk, outcome: str, state: str) -> None:
    """Done, or expired with a cancelled task; nothing open is left behind."""
    task = desk.make()
    escalate(desk, task)
    decide(desk, task, "approve")
    climb(desk)
    (grant,) = desk.claim()
    assert climb(desk) == 0
    desk.finish(grant, outcome)
    assert climb(desk) == 1
    assert newest(desk, task).state == state
    assert desk.store.read_sync(lambda c: coordination.open_ones(c, "escalation", limit=9)) == []


def test_it_may_be_asked_again_after_an_answer(desk: Desk) -> None:
    """The first is settled by its own answer, though nobody had written that down before the second."""
    task = desk.make()
    escalate(desk, task)
    decide(desk, task, "approve", reason="yes")
    escalate(desk, task, to="vp-c", reason="and now?")
    found = desk.store.read_sync(lambda c: coordination.of_task(c, task.id))
    by_target = {one.target: (one.state, one.reason) for one in found}
    assert by_target == {"vp-b": ("accepted", "approved by k-boss: yes"), "vp-c": ("pending", "and now?")}
    decide(desk, task, "reject", reason="no")
    assert climb(desk) == 2
    assert {one.target: one.state for one in desk.store.read_sync(lambda c: coordination.of_task(c, task.id))} == {
        "vp-b": "expired",
        "vp-c": "rejected",
    }


def test_an_unblocked_task_that_another_blocked_is_answered(desk: Desk) -> None:
    """Its wait ended, whatever holds it now."""
    task = desk.make()
    escalate(desk, task)
    decide(desk, task, "unblock")
    decide(desk, task, "block", blocked_reason="manual", reason="not today")
    assert climb(desk) == 1
    assert newest(desk, task).state == "accepted"


def test_who_is_asked_now_may_decide_and_nobody_else(desk: Desk) -> None:
    """Not the one before, not the owner, and nobody once it is decided."""

    def may(name: str, task_id: str) -> bool:
        return desk.store.write_sync(lambda c: escalation.may_decide(c, task_id, name))

    task = desk.make()
    assert not may("vp-b", task.id)
    escalate(desk, task)
    assert [may(name, task.id) for name in NAMES] == [False, True, False, False]
    desk.clock.advance(600)
    climb(desk)
    assert [may(name, task.id) for name in NAMES] == [False, False, True, False]
    decide(desk, task, "approve")
    assert not any(may(name, task.id) for name in NAMES)
    assert not may("vp-b", "task-none")
    assert not may("vp-b", "\0")


def test_what_is_wrong_with_the_request_is_told_at_once(desk: Desk) -> None:
    """An unknown task, a target that nobody knows, and oneself."""
    task = desk.make()
    with pytest.raises(Invalid) as both:
        escalate(desk, task, task_id="task-none", to="vp-none")
    assert [field for field, _ in both.value.errors] == ["task", "to"]
    with pytest.raises(Invalid, match="itself"):
        escalate(desk, task, to="vp-a")
    assert desk.kinds(task) == ["task_created"]


def test_only_its_owner_escalates_what_is_open_and_not_blocked(desk: Desk) -> None:
    """409 each, with the legal ones named; and nothing is left of it."""
    task = desk.make()
    with pytest.raises(Conflict, match="it is vp-a's, not vp-b's") as others:
        escalate(desk, task, source="vp-b")
    assert others.value.code == "not_owner"
    escalate(desk, task)
    with pytest.raises(InvalidTransition, match="TODO, CANCELLED"):
        escalate(desk, task)
    decide(desk, task, "cancel")
    with pytest.raises(Conflict) as ended:
        escalate(desk, task)
    assert ended.value.code == "final"
    assert levels(desk, task) == [("vp-b", "pending")]


def test_nobody_is_asked_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that others were asked about too often is refused."""
    monkeypatch.setattr(coordination, "MAX_OF_A_TASK", 2)
    task = desk.make()
    for _ in range(2):
        escalate(desk, task)
        decide(desk, task, "approve")
    with pytest.raises(Conflict) as many:
        escalate(desk, task)
    assert many.value.code == "too_many"


def test_two_who_escalate_at_once_ask_once(desk: Desk) -> None:
    """One wins, the other is told that it is BLOCKED already."""
    task = desk.make()

    def one(_: int) -> bool:
        try:
            escalate(desk, task)
        except InvalidTransition:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(one, range(4))) == [False, False, False, True]
    assert levels(desk, task) == [("vp-b", "pending")]


def test_two_control_planes_climb_each_level_once(desk: Desk, store_url: str) -> None:
    """While others look at the same ladder at the same moment, and somebody approves in between."""
    tasks = [desk.make(str(n)) for n in range(20)]
    for task in tasks:
        escalate(desk, task)
    desk.clock.advance(600)
    other = open_store(store_url)

    def look(n: int) -> int:
        store = other if n % 2 else desk.store
        return store.write_sync(lambda c: escalation.climb(c, declared=DECLARED, now_us=desk.now, limit=7))

    def yes(task: TaskRow) -> None:
        decide(desk, task, "approve")

    with ThreadPoolExecutor(6) as pool:
        looking = [pool.submit(look, n) for n in range(12)]
        saying = [pool.submit(yes, task) for task in tasks[:5]]
        for waiting in [*looking, *saying]:
            waiting.result()
    while climb(desk):
        pass
    other.close()
    for task in tasks[5:]:
        assert levels(desk, task) == [("vp-b", "expired"), ("vp-c", "pending")]
    for task in tasks[:5]:
        assert levels(desk, task) in (
            [("vp-b", "accepted")],
            [("vp-b", "expired"), ("vp-c", "accepted")],
        )
        kinds = desk.kinds(task)
        assert kinds.count("escalation_accepted") == 1
        assert desk.get(task).status == "TODO"


def test_a_climb_takes_a_bounded_batch(desk: Desk) -> None:
    """The rest is for the next one."""
    for n in range(5):
        escalate(desk, desk.make(str(n)))
    desk.clock.advance(600)
    assert desk.store.read_sync(lambda c: escalation.any_due(c, now_us=desk.now))
    assert [climb(desk, limit=2) for _ in range(4)] == [2, 2, 1, 0]
    assert not desk.store.read_sync(lambda c: escalation.any_due(c, now_us=desk.now))


def test_why_names_who_is_asked_and_when_the_next_one_is(desk: Desk) -> None:
    """As a reason for people and as fields for programs; a person has no next one."""
    task = desk.make()
    escalate(desk, task)

    def binding() -> dict[str, Any]:
        found = desk.store.read_sync(lambda c: why.look(c, task.id, rules=ANYTHING_GOES, around={}, now_us=desk.now))
        return next(hold for hold in why.to_json(found)["holds"] if hold["kind"] == "escalation")

    first = binding()
    assert (first["asked"], first["level"], first["until"]) == ("vp-b", 1, None)
    assert first["next_level_at"].endswith("00:10:00.000000Z") or "00:10:00" in first["next_level_at"]
    assert "vp-b is asked: which of the two?; the next one is asked at" in first["reason"]
    assert first["reason"].endswith("approve or reject it")
    decide(desk, task, "unblock")
    escalate(desk, task, to="human:anna")
    person = binding()
    assert (person["asked"], person["next_level_at"]) == ("human:anna", None)
    assert person["reason"] == "human:anna is asked: which of the two?; approve or reject it"
