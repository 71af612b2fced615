"""Handoffs: the session ends first, then everything changes hands in one step; and what the target is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from desk import Desk
from passed import Hands

from orchestrator_fleet.errors import Conflict, Invalid, LeaseLost
from orchestrator_fleet.memory.write import MAX_TEXT_BYTES, remember
from orchestrator_fleet.orchestrators import carried
from orchestrator_fleet.orchestrators.handoff import MAX_CONTEXT_BYTES
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import memories
from orchestrator_fleet.tasks.task import TaskRow

ABOUT: dict[str, Any] = {"notes": "mind the tests", "context": {"branch": "fix"}, "completion": 40}


@pytest.fixture
def hands(desk: Desk) -> Hands:
    return Hands(desk.store)


@pytest.fixture
def second(store_url: str) -> Iterator[Hands]:
    """Another process's hands on the same store, as far as the store can tell."""
    store = open_store(store_url)
    yield Hands(store)
    store.close()


def memories_of(hands: Hands, orchestrator: str) -> list[dict[str, Any]]:
    of = sa.select(memories).where(memories.c.orchestrator == orchestrator).order_by(memories.c.at_us)
    return [dict(row) for row in hands.desk.store.read_sync(lambda c: c.execute(of).mappings().all())]


def along(hands: Hands, task: TaskRow) -> dict[str, Any]:
    """What a task's next session is told beside the task."""
    found = hands.desk.store.read_sync(lambda c: carried.along(c, [hands.desk.get(task)]))
    return dict(found.get(task.id, {}))


def test_a_task_that_does_not_run_changes_hands_at_once(hands: Hands) -> None:
    """Ownership, context, a memory, notices: one step."""
    task = hands.desk.make("mend it")
    one = hands.hand_off(task, "vp-a", "vp-b", **ABOUT)
    after = hands.desk.get(task)
    assert (one.state, one.hop, one.note) == ("accepted", 1, "mind the tests")
    assert (after.orchestrator, after.route, after.status) == ("vp-b", "handed_off", "TODO")
    assert one.data == {"context": {"branch": "fix"}, "completion": 40, "transcript": None}
    (memory,) = memories_of(hands, "vp-b")
    assert (memory["tier"], memory["importance"], memory["source"]) == ("semantic", 0.7, f"handoff:{one.id}")
    assert (memory["task"], memory["attempt"], memory["metadata"]["completion"]) == (task.id, None, 40)
    assert memory["text"] == 'vp-a handed over: mend it\nCompletion: 40 %\nmind the tests\nContext: {"branch":"fix"}'
    assert (hands.told("vp-a"), hands.told("vp-b")) == (["handoff_accepted"], ["handoff_accepted"])
    assert along(hands, task) == {"handoff": {"id": one.id, "from": "vp-a", "notes": "mind the tests", **one.data}}


def test_a_session_on_a_machine_ends_first(hands: Hands) -> None:
    """Meanwhile the task is nobody's to claim; afterwards its transcript is named."""
    grant = hands.desk.run()
    task = grant.task
    one = hands.hand_off(task, "vp-a", "vp-b", **ABOUT)
    held = hands.desk.get(task)
    assert (one.state, held.status, held.blocked_reason, held.orchestrator) == ("pending", "BLOCKED", "manual", "vp-a")
    assert held.condition == "is being handed over to vp-b by vp-a; waits for its session to end"
    assert (one.expires_at_us or 0) - one.created_at_us == 15_000_000
    with pytest.raises(LeaseLost):
        hands.desk.finish(grant)
    assert (hands.desk.claim("vp-a"), hands.desk.claim("vp-b"), memories_of(hands, "vp-b")) == ([], [], [])
    assert hands.settle(task) == ["pending"]
    done = hands.complete(one)
    after = hands.desk.get(task)
    assert (done.state, done.reason) == ("accepted", None)
    assert (after.status, after.orchestrator, after.condition, after.failures) == ("TODO", "vp-b", None, 0)
    transcript = {
        "machine": "m1",
        "attempt": 1,
        "session": f"{task.id}.1",
        "log": f"/api/tasks/{task.id}/log?attempt=1",
    }
    assert along(hands, task)["handoff"]["transcript"] == transcript
    (memory,) = memories_of(hands, "vp-b")
    assert (memory["attempt"], memory["metadata"]["transcript"]) == (1, transcript)
    assert [attempt["outcome"] for attempt in hands.desk.attempts(task)] == ["released"]
    (again,) = hands.desk.claim("vp-b")
    assert (again.attempt, again.task.coordinated) == (2, True)


def test_a_client_over_http_is_not_waited_for(hands: Hands) -> None:
    """Nothing could tell it; its token is good for nothing."""
    task = hands.desk.make()
    (grant,) = hands.desk.claim(machine="")
    assert hands.hand_off(task, "vp-a", "vp-b").state == "accepted"
    with pytest.raises(LeaseLost):
        hands.desk.finish(grant)
    assert along(hands, task)["handoff"]["transcript"]["machine"] is None


def test_completing_twice_does_it_once(hands: Hands) -> None:
    """One memory, one event; also when its time was over first."""
    grant = hands.desk.run()
    one = hands.hand_off(grant.task, "vp-a", "vp-b")
    first = hands.complete(one, stopped=False)
    assert first.reason == "its session did not say within 15 s that it has ended"
    assert hands.complete(one) == first
    assert (len(memories_of(hands, "vp-b")), hands.desk.kinds(grant.task).count("handoff_accepted")) == (1, 1)


@pytest.mark.parametrize(
    ("otherwise", "status", "owner", "reason"),
    [
        ("unblock", "TODO", "vp-a", "somebody put the task back in line first"),
        ("cancel", "CANCELLED", "vp-a", "the task was cancelled: because"),
        ("assign", "TODO", "vp-c", "the task moved on to vp-c"),
    ],
)
def test_a_person_who_takes_the_held_task_another_way_wins(
    hands: Hands, otherwise: str, status: str, owner: str, reason: str
) -> None:
    """The handoff comes to nothing, says why, and holds nothing any more."""
    grant = hands.desk.run()
    one = hands.hand_off(grant.task, "vp-a", "vp-b")
    {
        "unblock": lambda: hands.desk.unblock(grant.task),
        "cancel": lambda: hands.desk.cancel(grant.task),
        "assign": lambda: hands.assign(grant.task, "vp-c"),
    }[otherwise]()
    assert (hands.now(one).state, hands.now(one).reason) == ("expired", reason)
    gone = hands.complete(one)
    after = hands.desk.get(grant.task)
    assert (gone.state, gone.reason, after.status, after.orchestrator) == ("expired", reason, status, owner)
    assert memories_of(hands, "vp-b") == []


def test_while_one_is_under_way_there_is_no_other(hands: Hands) -> None:
    """Nor a delegation."""
    grant = hands.desk.run()
    hands.hand_off(grant.task, "vp-a", "vp-b")
    for again in (hands.hand_off, hands.delegate):
        with pytest.raises(Conflict) as refusal:
            again(grant.task, "vp-a", "vp-c")
        assert refusal.value.code == "handing_over"


def test_what_waits_for_others_by_then_waits_on(hands: Hands) -> None:
    """Its dependencies were edited while it was held."""
    grant = hands.desk.run()
    first = hands.desk.make()
    one = hands.hand_off(grant.task, "vp-a", "vp-b")
    hands.desk.update(grant.task, depends_on=[first.id])
    assert hands.complete(one).state == "accepted"
    after = hands.desk.get(grant.task)
    assert (after.status, after.blocked_reason, after.orchestrator) == ("BLOCKED", "dependency", "vp-b")
    hands.desk.finish(hands.desk.claim("vp-a")[0])
    assert hands.desk.get(grant.task).status == "TODO"


def test_a_blocked_task_is_handed_over_blocked(hands: Hands) -> None:
    """What it waits for is its own."""
    grant = hands.desk.run()
    hands.desk.set_status(grant.task, "BLOCKED")
    assert hands.hand_off(grant.task, "vp-a", "vp-b").state == "accepted"
    after = hands.desk.get(grant.task)
    assert (after.status, after.condition, after.orchestrator) == ("BLOCKED", "because", "vp-b")


def test_it_ends_as_a_delegation_does(hands: Hands) -> None:
    """With the task, or when the task moves on; and then nobody is told of it any more."""
    done, moved = hands.desk.make(), hands.desk.make()
    for task in (done, moved):
        hands.hand_off(task, "vp-a", "vp-b")
    grants = {grant.task.id: grant for grant in hands.desk.claim("vp-b", limit=2)}
    hands.desk.finish(grants[done.id])
    assert hands.settle(done) == ["done"]
    hands.assign(moved, "vp-c")
    assert along(hands, moved) == {}
    assert hands.settle(moved) == ["expired"]


def test_a_target_that_passes_it_on_tells_the_next_only_its_own(hands: Hands) -> None:
    """The newest handoff is the one that is told; sent back by who it was delegated to, it is told again."""
    task = hands.desk.make()
    hands.hand_off(task, "vp-a", "vp-b", notes="first")
    second = hands.hand_off(task, "vp-b", "vp-c", notes="second")
    assert along(hands, task)["handoff"]["id"] == second.id
    asked = hands.delegate(task, "vp-c", "vp-d")
    assert along(hands, task) == {}
    hands.answer(asked, "vp-d", "reject")
    assert along(hands, task)["handoff"]["notes"] == "second"


def test_a_task_that_nobody_was_asked_about_is_not_looked_up(hands: Hands) -> None:
    """Not even the table."""
    task = hands.desk.make()
    assert carried.along(None, [task]) == {}  # type: ignore[arg-type] # no connection is needed


def test_a_context_has_a_limit(hands: Hands) -> None:
    """As it travels with every session, and in the notices."""
    fits = {"x": "y" * (MAX_CONTEXT_BYTES - len('{"x":""}'))}
    assert hands.hand_off(hands.desk.make(), "vp-a", "vp-b", context=fits).state == "accepted"
    with pytest.raises(Invalid) as refusal:
        hands.hand_off(hands.desk.make(), "vp-a", "vp-b", context={"x": fits["x"] + "y"})
    assert [field for field, _ in refusal.value.errors] == ["context"]


def test_what_many_tasks_bring_along_has_a_limit(hands: Hands) -> None:
    """What did not fit is named."""
    for _ in range(20):
        hands.hand_off(hands.desk.make(), "vp-a", "vp-b", context={"x": "y" * 60_000})
    granted = [grant.task for grant in hands.desk.claim("vp-b", limit=20)]
    found = hands.desk.store.read_sync(lambda c: carried.along(c, granted))
    shown = [tuple(found[task.id]) for task in granted]
    assert (shown.count(("handoff",)), shown.count(("left_out",))) == (17, 3)
    assert found[granted[-1].id] == {"left_out": ["handoff"]}


def test_a_context_with_any_text_is_kept(hands: Hands) -> None:
    """NUL, quotes, and what is cut in the middle of a character in the memory of it."""
    odd = {"nul": "\0", "quote": '"\\', "long": "ü" * 20_000}
    task = hands.desk.make()
    hands.hand_off(task, "vp-a", "vp-b", context=odd)
    assert along(hands, task)["handoff"]["context"] == odd
    (memory,) = memories_of(hands, "vp-b")
    assert MAX_TEXT_BYTES - 1 <= len(memory["text"].encode()) <= MAX_TEXT_BYTES


def test_a_memory_holds_no_nul(hands: Hands) -> None:
    """One of the databases can't."""
    hands.desk.store.write_sync(
        lambda c: remember(
            c, orchestrator="vp-a", tier="episodic", text="a\0b", source="me", importance=1, actor="k", now_us=1
        )
    )
    assert [memory["text"] for memory in memories_of(hands, "vp-a")] == ["a\ufffdb"]


@pytest.mark.parametrize("turn", range(5))
def test_many_complete_at_once_and_a_person_unblocks(hands: Hands, second: Hands, backend: str, turn: int) -> None:
    """Either it is handed over once, or the person was first and it is not at all."""
    grant = hands.desk.run(f"turn {turn}")
    one = hands.hand_off(grant.task, "vp-a", "vp-b")
    other = second if backend == "postgresql" else hands

    def unblock() -> None:
        try:
            other.desk.unblock(grant.task)
        except Exception:  # noqa: BLE001 (it was handed over first)
            return

    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(unblock), pool.submit(hands.complete, one), pool.submit(other.complete, one)]
        for future in made:
            future.result()
    after = hands.desk.get(grant.task)
    known = len(memories_of(hands, "vp-b")), hands.desk.kinds(grant.task).count("handoff_accepted")
    if hands.written(one).state == "accepted":
        assert (after.status, after.orchestrator, known) == ("TODO", "vp-b", (1, 1))
    else:
        assert (hands.written(one).state, after.status, after.orchestrator, known) == (
            "expired",
            "TODO",
            "vp-a",
            (0, 0),
        )
