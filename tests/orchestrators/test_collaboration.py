"""Asking others for a part: the children, what they wait for, and what comes back. Both stores."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from desk import Desk

from orchestrator_fleet.errors import Conflict, Invalid, TaskError
from orchestrator_fleet.orchestrators import collaboration, coordination, notices
from orchestrator_fleet.orchestrators.collaboration import Collaboration, Wanted
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.task import TaskRow

NAMES = tuple(f"vp-{letter}" for letter in "abcdefgh")


@pytest.fixture
def desk(store_url: str) -> Iterator[Desk]:
    """Eight orchestrators."""
    store = open_store(store_url)
    yield Desk(store, {"orchestrators": {name: {} for name in NAMES}, "routing": []})
    store.close()


def ask(
    desk: Desk, task: TaskRow, *names: str, source: str = "vp-a", task_id: str = "", **fields: Any
) -> Collaboration:
    known = {"roles": {}, "note": "", "mode": "advise", **fields}
    wanted = Wanted(collaborators=names, **known)
    by = {"dispatch": desk.dispatch, "actor": "k-a", "now_us": desk.now}
    return desk.store.write_sync(
        lambda c: collaboration.collaborate(c, source=source, task_id=task_id or task.id, wanted=wanted, **by)
    )


def gather(desk: Desk, **fields: Any) -> int:
    return desk.store.write_sync(lambda c: collaboration.gather(c, now_us=desk.now, **fields))


def children(desk: Desk, done: Collaboration) -> list[TaskRow]:
    return [desk.store.read_sync(lambda c, one=one: life.get_task(c, one.child or "")) for one in done.asked]


def states(desk: Desk, done: Collaboration) -> list[str]:
    return [desk.store.read_sync(lambda c, one=one: coordination.find(c, one.id)).state for one in done.asked]


def results(desk: Desk, task: TaskRow) -> list[dict[str, Any]]:
    return desk.store.read_sync(lambda c: collaboration.results(c, task.id))


def complete(desk: Desk, name: str, result: Any = None) -> TaskRow:
    (grant,) = desk.claim(name)
    return desk.finish(grant, result=result)


def told(desk: Desk, name: str) -> list[str]:
    return [one.kind for one in desk.store.read_sync(lambda c: notices.waiting(c, name, limit=50, now_us=desk.now))]


def test_each_gets_a_child_task_that_says_what_is_wanted(desk: Desk) -> None:
    """In the asked order, with the parent's priority, the role and the note; nobody's but the collaborator's."""
    task = desk.make("ship it", description="all of it", priority="HIGH", discipline="eng")
    done = ask(desk, task, "vp-c", "vp-b", roles={"vp-c": "security"}, note="by noon")
    assert done.changed.task == task
    first, second = children(desk, done)
    assert [one.orchestrator for one in (first, second)] == ["vp-c", "vp-b"]
    for child, role in ((first, "security"), (second, None)):
        assert (child.title, child.priority, child.parent) == ("Advise on: ship it", "HIGH", task.id)
        assert (child.status, child.discipline, child.created_by) == ("TODO", None, "k-a")
        assert child.metadata == {"collaboration": {"of": task.id, "role": role, "mode": "advise"}}
        assert "by noon" in child.description
        assert "all of it" in child.description
        assert ("Your role: security" in child.description) == (role is not None)
    pending = [event for event in desk.events(task) if event.kind == "collaboration_pending"]
    assert [event.data["coordination"]["child"] for event in pending] == [first.id, second.id]
    assert {event.data["coordination"]["batch"] for event in pending} == {done.id}
    assert (told(desk, "vp-c"), told(desk, "vp-b")) == (["collaboration_pending"], ["collaboration_pending"])
    assert desk.get(task).status == "TODO"


def test_a_long_title_and_description_fit(desk: Desk) -> None:
    """What is put before them costs them their end."""
    task = desk.make("t" * 500, description="d" * 100_000)
    (child,) = children(desk, ask(desk, task, "vp-b", note="n" * 10_000))
    assert (len(child.title), len(child.description)) == (500, 100_000)


def test_advice_comes_back_while_the_task_goes_on(desk: Desk) -> None:
    """Accepted when its session begins, done with its result; the last one tells all of them."""
    grant = desk.run("ship it")
    done = ask(desk, grant.task, "vp-b", "vp-c", roles={"vp-b": "security"})
    assert desk.get(grant.task).status == "IN_PROGRESS"
    assert gather(desk) == 0
    (of_b,) = desk.claim("vp-b")
    seen = desk.store.read_sync(lambda c: collaboration.look(c, done.asked))
    assert [one.state for one in seen] == ["accepted", "pending"]
    assert gather(desk) == 1
    assert states(desk, done) == ["accepted", "pending"]
    desk.finish(of_b, result={"say": "no"})
    assert gather(desk) == 1
    assert gather(desk) == 0
    answered = desk.events(grant.task)[-1]
    assert answered.kind == "collaboration_answered"
    told_of_b = {name: answered.data[name] for name in ("from", "child", "role", "result", "state", "batch")}
    assert told_of_b == {
        "from": "vp-b",
        "child": of_b.task.id,
        "role": "security",
        "result": {"say": "no"},
        "state": "done",
        "batch": done.id,
    }
    complete(desk, "vp-c", [1])
    assert gather(desk) == 1
    gathered = desk.events(grant.task)[-1]
    assert gathered.kind == "collaboration_gathered"
    assert [(one["from"], one["result"]) for one in gathered.data["results"]] == [
        ("vp-b", {"say": "no"}),
        ("vp-c", [1]),
    ]
    assert desk.kinds(grant.task).count("collaboration_gathered") == 1
    assert states(desk, done) == ["done", "done"]
    assert told(desk, "vp-a").count("collaboration_done") == 2
    assert {one["from"]: one["result"] for one in results(desk, grant.task)} == {"vp-b": {"say": "no"}, "vp-c": [1]}


def test_a_split_task_waits_for_its_parts(desk: Desk) -> None:
    """The session that runs is ended first; with the last part it stands in line again."""
    grant = desk.run("ship it")
    done = ask(desk, grant.task, "vp-b", "vp-c", mode="split")
    assert done.changed.stopped is not None
    assert done.changed.stopped.token == grant.token
    after = desk.get(grant.task)
    assert (after.status, after.blocked_reason) == ("BLOCKED", "dependency")
    assert after.depends_on == [one.child for one in done.asked]
    assert [child.title for child in children(desk, done)] == ["Part of: ship it"] * 2
    with pytest.raises(TaskError):
        desk.finish(grant)
    complete(desk, "vp-b", "one")
    gather(desk)
    assert desk.get(grant.task).status == "BLOCKED"
    complete(desk, "vp-c", "two")
    assert desk.get(grant.task).status == "TODO"
    gather(desk)
    (again,) = desk.claim()
    assert again.task.id == grant.task.id
    assert {one["result"] for one in results(desk, grant.task)} == {"one", "two"}


def test_a_split_task_that_waits_already_waits_for_its_parts_as_well(desk: Desk) -> None:
    """Its own dependencies stay."""
    before = desk.make("before")
    task = desk.make(depends_on=(before.id,))
    done = ask(desk, task, "vp-b", mode="split")
    assert desk.get(task).depends_on == [before.id, done.asked[0].child]
    complete(desk, "vp-b")
    assert desk.get(task).status == "BLOCKED"
    complete(desk, "vp-a")
    assert desk.get(task).status == "TODO"


def test_a_cancelled_part_is_told_and_holds_the_task_with_its_own_words(desk: Desk) -> None:
    """Nothing waits for ever without a word: the owner has a notice, and unblocks the task or cancels it."""
    task = desk.make("ship it")
    done = ask(desk, task, "vp-b", "vp-c", mode="split")
    (of_b, _) = children(desk, done)
    complete(desk, "vp-c", "two")
    desk.cancel(of_b)
    assert gather(desk) == 2
    after = desk.get(task)
    assert (after.status, after.blocked_reason) == ("BLOCKED", "dependency")
    assert after.condition == f"waits for {of_b.id}, which was cancelled; unblock it, or cancel it too"
    assert states(desk, done) == ["expired", "done"]
    why = f"{of_b.id} was cancelled: because"
    assert desk.store.read_sync(lambda c: coordination.find(c, done.asked[0].id)).reason == why
    assert "collaboration_expired" in told(desk, "vp-a")
    gathered = next(event for event in desk.events(task) if event.kind == "collaboration_gathered")
    assert [one.get("error") for one in gathered.data["results"]] == [why, None]
    assert desk.unblock(task).status == "TODO"
    assert {one["from"]: one.get("error") for one in results(desk, task)} == {"vp-b": why, "vp-c": None}


def test_what_is_wrong_with_the_request_is_told_at_once(desk: Desk) -> None:
    """Oneself, twice, unknown, a role of somebody else, an unknown task."""
    task = desk.make()
    with pytest.raises(Invalid) as wrong:
        ask(desk, task, "vp-a", "vp-b", "vp-b", "vp-none", roles={"vp-x": "x", "vp-b": "y"})
    assert [field for field, _ in wrong.value.errors] == ["with[0]", "with[2]", "with[3]", "roles.vp-x"]
    with pytest.raises(Invalid) as missing:
        ask(desk, task, "vp-none", task_id="task-none", mode="split")
    assert [field for field, _ in missing.value.errors] == ["task", "with[0]"]
    many = {f"role-{n}": "r" for n in range(1_000)}
    with pytest.raises(Invalid) as bounded:
        ask(desk, task, "vp-b", roles=many)
    assert len(bounded.value.errors) == collaboration.MAX_WRONG
    assert desk.kinds(task) == ["task_created"]


def test_only_the_owner_of_an_open_task_asks(desk: Desk) -> None:
    """409 each; nothing is left of it, no child either."""
    task = desk.make()
    with pytest.raises(Conflict) as others:
        ask(desk, task, "vp-c", source="vp-b")
    assert others.value.code == "not_owner"
    desk.cancel(task)
    with pytest.raises(Conflict) as ended:
        ask(desk, task, "vp-c")
    assert ended.value.code == "final"
    assert desk.claim("vp-c") == []


def test_parts_of_parts_end_at_a_depth(desk: Desk) -> None:
    """Five deep; a part that was retried is as deep as the one before."""
    task, parents = desk.make(), []
    for n in range(collaboration.MAX_HOPS):
        done = ask(desk, task, NAMES[n + 1], source=NAMES[n])
        assert done.asked[0].hop == n + 1
        parents.append(task)
        (task,) = children(desk, done)
    with pytest.raises(Conflict, match=f"{parents[0].id} -> {parents[1].id}") as deep:
        ask(desk, task, "vp-h", source="vp-f")
    assert deep.value.code == "hop_limit"
    desk.cancel(task)
    again = desk.retry(task)
    with pytest.raises(Conflict) as still:
        ask(desk, again, "vp-h", source="vp-f")
    assert still.value.code == "hop_limit"


def test_nobody_is_asked_for_a_part_of_what_he_waits_for(desk: Desk) -> None:
    """With mode advise he does not wait, and may be asked."""
    task = desk.make()
    (of_b,) = children(desk, ask(desk, task, "vp-b", mode="split"))
    with pytest.raises(Conflict, match=f"vp-a waits for it with {task.id}") as circle:
        ask(desk, of_b, "vp-c", "vp-a", source="vp-b")
    assert circle.value.code == "collaboration_cycle"
    (of_c,) = children(desk, ask(desk, of_b, "vp-c", source="vp-b"))
    ask(desk, of_c, "vp-b", source="vp-c")
    with pytest.raises(Conflict):
        ask(desk, of_c, "vp-a", source="vp-c")


def test_large_results_stay_with_their_children(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session gets fits into one frame; of what does not fit it gets the size, and the child."""
    monkeypatch.setattr(collaboration, "MAX_ANSWERS_BYTES", 1_000)
    task = desk.make()
    ask(desk, task, "vp-b", "vp-c")
    complete(desk, "vp-b", "x" * 600)
    complete(desk, "vp-c", "y" * 600)
    gather(desk)
    sizes = sorted((len(one.get("result") or ""), one.get("result_bytes")) for one in results(desk, task))
    assert sizes == [(0, 602), (600, None)]
    gathered = desk.events(task)[-1].data["results"]
    assert [len(one.get("result") or "") for one in gathered] == [600, 0]


def test_a_task_that_nobody_was_asked_about_has_no_results(desk: Desk) -> None:
    """An empty list."""
    assert results(desk, desk.make()) == []


def test_a_batch_is_bounded_and_the_rest_is_for_the_next(desk: Desk) -> None:
    """Each moves once."""
    task = desk.make()
    done = ask(desk, task, "vp-b", "vp-c", "vp-d")
    for child in children(desk, done):
        desk.cancel(child)
    assert desk.store.read_sync(collaboration.any_due)
    assert [gather(desk, limit=2) for _ in range(3)] == [2, 1, 0]
    assert not desk.store.read_sync(collaboration.any_due)
    assert desk.kinds(task).count("collaboration_gathered") == 1


def test_a_purged_child_is_forgotten(desk: Desk) -> None:
    """With what was asked of it; the others are gathered all the same."""
    task = desk.make()
    done = ask(desk, task, "vp-b", "vp-c")
    (of_b, of_c) = children(desk, done)
    desk.cancel(of_b)
    desk.store.write_sync(lambda c: life.purge(c, task_id=of_b.id, actor="k-a", now_us=desk.now))
    desk.cancel(of_c)
    assert gather(desk) == 1
    assert [one["from"] for one in desk.events(task)[-1].data["results"]] == ["vp-c"]


def test_children_end_while_two_control_planes_gather(desk: Desk, store_url: str) -> None:
    """Each answer and each end of a batch is told once."""
    tasks = [desk.make(str(n)) for n in range(6)]
    batches = [ask(desk, task, "vp-b", "vp-c", mode="split") for task in tasks]
    grants = [*desk.claim("vp-b", limit=10), *desk.claim("vp-c", limit=10)]
    other = open_store(store_url)

    def look(n: int) -> int:
        store = other if n % 2 else desk.store
        return store.write_sync(lambda c: collaboration.gather(c, now_us=desk.now, limit=5))

    with ThreadPoolExecutor(8) as pool:
        ending = [pool.submit(desk.finish, grant, result=n) for n, grant in enumerate(grants)]
        looking = [pool.submit(look, n) for n in range(20)]
        for waiting in [*ending, *looking]:
            waiting.result()
    while gather(desk):
        pass
    other.close()
    for task, done in zip(tasks, batches, strict=True):
        kinds = desk.kinds(task)
        assert (kinds.count("collaboration_answered"), kinds.count("collaboration_gathered")) == (2, 1)
        assert states(desk, done) == ["done", "done"]
        assert desk.get(task).status == "TODO"


def test_a_claim_and_a_split_at_once_leave_no_session_of_a_task_that_waits(desk: Desk) -> None:
    """Whoever is first, the task ends up waiting for its parts, and its attempt, if there was one, is over."""
    for _ in range(10):
        task = desk.make()
        with ThreadPoolExecutor(2) as pool:
            claiming = pool.submit(desk.claim)
            asking = pool.submit(ask, desk, task, "vp-b", mode="split")
            grants, done = claiming.result(), asking.result()
        after = desk.get(task)
        assert (after.status, after.blocked_reason) == ("BLOCKED", "dependency")
        assert (done.changed.stopped is not None) == bool(grants)
        assert all(one["outcome"] == "released" for one in desk.attempts(task))


def test_one_that_ends_while_more_are_asked_frees_nothing_too_soon(desk: Desk) -> None:
    """The end of the first part and a second split at once: the task waits for the second."""
    for _ in range(10):
        task = desk.make()
        ask(desk, task, "vp-b", mode="split")
        (of_b,) = desk.claim("vp-b")
        with ThreadPoolExecutor(2) as pool:
            ending = pool.submit(desk.finish, of_b)
            asking = pool.submit(ask, desk, task, "vp-c", mode="split")
            ending.result()
            done: Collaboration = asking.result()
        assert desk.get(task).status == "BLOCKED"
        complete(desk, "vp-c")
        assert desk.get(task).status == "TODO"
        gather(desk)
        assert states(desk, done) == ["done"]
        desk.cancel(task)


def test_look_leaves_other_kinds_as_they_are(desk: Desk) -> None:
    """It is asked about all that an orchestrator has to do with."""
    task = desk.make()
    (one,) = ask(desk, task, "vp-b").asked
    other: Coordination = desk.store.write_sync(
        lambda c: coordination.ask(
            c,
            task,
            kind="delegation",
            source="vp-a",
            target="vp-b",
            hop=1,
            note=None,
            actor="k-a",
            now_us=desk.now,
        )
    )
    complete(desk, "vp-b")
    seen = desk.store.read_sync(lambda c: collaboration.look(c, [other, one]))
    assert [each.state for each in seen] == ["pending", "done"]
