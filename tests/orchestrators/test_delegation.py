"""Delegations: who may, what becomes of the task, and what becomes of the delegation as the task goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from desk import Desk
from hypothesis import given, settings
from hypothesis import strategies as st
from passed import Hands

from orchestrator_fleet.errors import Conflict, Invalid, LeaseLost, NotFound
from orchestrator_fleet.orchestrators import asked, passing
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import holds, life, reroute
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.task import NewTask


@pytest.fixture
def hands(desk: Desk) -> Hands:
    return Hands(desk.store)


def refused(code: str, do: Any, *given: Any, **named: Any) -> str:
    """That it is refused with this code; the text."""
    with pytest.raises(Conflict) as refusal:
        do(*given, **named)
    assert refusal.value.code == code
    return str(refusal.value)


def test_a_waiting_task_goes_to_the_target_and_both_are_told(hands: Hands) -> None:
    """In one step with the fields that are edited, and the events of it."""
    task = hands.desk.make(priority="LOW")
    one = hands.delegate(task, "vp-a", "vp-b", note="yours", fields={"priority": "HIGH", "due_at_us": 5})
    after = hands.desk.get(task)
    assert (one.state, one.kind, one.hop, one.note, one.since_attempt) == ("pending", "delegation", 1, "yours", 0)
    assert (after.orchestrator, after.route, after.status) == ("vp-b", "delegated", "TODO")
    assert (after.priority, after.due_at_us, after.rank, after.coordinated) == ("HIGH", 5, 1, True)
    assert (hands.told("vp-a"), hands.told("vp-b")) == (["delegation_pending"], ["delegation_pending"])
    assert hands.desk.kinds(task)[-3:] == ["task_updated", "task_routed", "delegation_pending"]
    event = hands.desk.events(task)[-1]
    assert (event.actor, event.data["coordination"]["to"], event.data["task"]["orchestrator"]) == (
        "k-test",
        "vp-b",
        "vp-b",
    )
    assert [grant.task.id for grant in hands.desk.claim("vp-b")] == [task.id]


def test_what_runs_is_released_first(hands: Hands) -> None:
    """The session's token is good for nothing, and no try was spent."""
    grant = hands.desk.run()
    hands.delegate(grant.task, "vp-a", "vp-b")
    after = hands.desk.get(grant.task)
    assert (after.status, after.orchestrator, after.failures, after.token) == ("TODO", "vp-b", 0, None)
    with pytest.raises(LeaseLost):
        hands.desk.finish(grant)
    assert [attempt["outcome"] for attempt in hands.desk.attempts(grant.task)] == ["released"]


def test_a_claim_of_the_target_accepts_it_and_its_end_ends_it(hands: Hands) -> None:
    """A look says so at once; what is written down follows."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    assert (hands.late(task), hands.settle(task)) == (False, ["pending"])
    (grant,) = hands.desk.claim("vp-b")
    assert (hands.now(one).state, hands.written(one).state, hands.late(task)) == ("accepted", "pending", True)
    assert (hands.settle(task), hands.late(task)) == (["accepted"], False)
    hands.desk.finish(grant)
    assert (hands.now(one).state, hands.settle(task), hands.settle(task)) == ("done", ["done"], ["done"])
    assert hands.told("vp-a") == ["delegation_pending", "delegation_accepted", "delegation_done"]
    assert [kind for kind in hands.desk.kinds(task) if kind.startswith("delegation")] == [
        "delegation_pending",
        "delegation_accepted",
        "delegation_done",
    ]


def test_a_task_that_was_done_before_anybody_looked_is_done(hands: Hands) -> None:
    """From pending at once."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    hands.desk.finish(hands.desk.claim("vp-b")[0])
    assert hands.settle(task) == ["done"]
    assert hands.written(one).state == "done"


def test_the_claim_before_the_delegation_is_not_the_targets(hands: Hands) -> None:
    """Only a later one accepts."""
    grant = hands.desk.run()
    one = hands.delegate(grant.task, "vp-a", "vp-b")
    assert hands.now(one).state == "pending"


def test_a_cancelled_task_expires_it_with_the_reason(hands: Hands) -> None:
    """As the event of the cancelling says it."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    hands.desk.cancel(task)
    assert (hands.now(one).state, hands.now(one).reason) == ("expired", "the task was cancelled: because")
    assert hands.settle(task) == ["expired"]
    assert hands.written(one).reason == "the task was cancelled: because"


def test_a_task_that_moved_on_expires_it(hands: Hands) -> None:
    """By a person who assigned it; whoever has it then may delegate it anew."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    hands.assign(task, "vp-c")
    assert (hands.now(one).state, hands.now(one).reason) == ("expired", "the task moved on to vp-c")
    again = hands.delegate(task, "vp-c", "vp-a")
    assert (hands.written(one).state, again.hop) == ("expired", 1)


def test_a_chain_stands_while_the_last_has_the_task(hands: Hands) -> None:
    """Passing on accepts; the end of the task ends every link."""
    task = hands.desk.make()
    first = hands.delegate(task, "vp-a", "vp-b")
    second = hands.delegate(task, "vp-b", "vp-c")
    assert (hands.written(first).state, hands.written(first).reason) == ("accepted", "passed on to vp-c")
    assert (second.hop, hands.settle(task)) == (2, ["accepted", "pending"])
    hands.desk.finish(hands.desk.claim("vp-c")[0])
    assert hands.settle(task) == ["done", "done"]


def test_what_is_taken_from_the_end_of_a_chain_stands_before_it(hands: Hands) -> None:
    """Given back to the middle by a person, the first link goes on; given to a stranger, nothing does."""
    task = hands.desk.make()
    hands.delegate(task, "vp-a", "vp-b")
    hands.delegate(task, "vp-b", "vp-c")
    hands.assign(task, "vp-b")
    assert hands.settle(task) == ["accepted", "expired"]
    hands.assign(task, "vp-x")
    assert hands.settle(task) == ["expired", "expired"]


def test_the_target_sends_it_back(hands: Hands) -> None:
    """To who delegated it, from a session that runs too; who was asked before stays asked."""
    task = hands.desk.make()
    first = hands.delegate(task, "vp-a", "vp-b")
    second = hands.delegate(task, "vp-b", "vp-c")
    (grant,) = hands.desk.claim("vp-c")
    refused("passed_on", hands.answer, first, "vp-b", "reject")
    gone = hands.answer(second, "vp-c", "reject", "too much")
    after = hands.desk.get(task)
    assert (gone.state, gone.reason) == ("rejected", "too much")
    assert (after.orchestrator, after.status, after.route) == ("vp-b", "TODO", "returned")
    with pytest.raises(LeaseLost):
        hands.desk.finish(grant)
    assert hands.settle(task) == ["accepted", "rejected"]
    assert hands.answer(first, "vp-b", "reject").state == "rejected"
    assert hands.desk.get(task).orchestrator == "vp-a"
    assert hands.delegate(task, "vp-a", "vp-b").hop == 1
    assert "delegation_rejected" in hands.told("vp-a")


def test_the_target_says_yes_before_it_claims(hands: Hands) -> None:
    """Twice is once; the task waits in its line all the same."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    assert (hands.answer(one, "vp-b", "accept", "soon").state, hands.answer(one, "vp-b", "accept").reason) == (
        "accepted",
        "soon",
    )
    assert hands.settle(task) == ["accepted"]
    assert hands.desk.get(task).status == "TODO"


def test_only_the_target_answers_and_only_while_it_is_open(hands: Hands) -> None:
    """After the end, there is nothing to reject."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    refused("not_target", hands.answer, one, "vp-a", "reject")
    with pytest.raises(NotFound):
        hands.answer(one, "vp-c", "reject")
    hands.desk.finish(hands.desk.claim("vp-b")[0])
    assert "it is done" in refused("not_open", hands.answer, one, "vp-b", "reject")
    assert hands.desk.get(task).status == "DONE"


def test_what_is_wrong_with_a_request_is_told_at_once(hands: Hands) -> None:
    """The caller's findings, itself as the target, and a task that is not there."""
    with pytest.raises(Invalid) as refusal:
        hands.delegate(hands.desk.make(), "vp-a", "vp-a", wrong=[("due_at", "is wrong")], task_id="task-none")
    assert [field for field, _ in refusal.value.errors] == ["due_at", "to", "task"]
    with pytest.raises(Invalid) as refusal:
        hands.delegate(hands.desk.make(), "vp-a", "vp-a")
    assert [field for field, _ in refusal.value.errors] == ["to"]


def test_who_has_it_may_delegate_it_while_it_is_open(hands: Hands) -> None:
    """Nobody else's, nobody's, and nothing that has ended."""
    refused("not_owner", hands.delegate, hands.desk.make(orchestrator="vp-b"), "vp-a", "vp-c")
    refused("not_owner", hands.delegate, hands.desk.make(orchestrator=None), "vp-a", "vp-c")
    task = hands.desk.make()
    hands.desk.cancel(task)
    refused("final", hands.delegate, task, "vp-a", "vp-b")


def test_nobody_gets_back_what_he_passed_on(hands: Hands) -> None:
    """The refusal names the way it took; a rejection is the way back."""
    task = hands.desk.make()
    hands.delegate(task, "vp-a", "vp-b")
    hands.hand_off(task, "vp-b", "vp-c")
    for target, path in (("vp-a", "vp-a -> vp-b -> vp-c -> vp-a"), ("vp-b", "vp-b -> vp-c -> vp-b")):
        assert path in refused("delegation_cycle", hands.delegate, task, "vp-c", target)


def test_who_waits_for_a_part_does_not_get_it(hands: Hands) -> None:
    """A child of a task whose owner passed it on, or asked for it; once the parent has ended it is free."""
    parent = hands.desk.make()
    hands.delegate(parent, "vp-a", "vp-b")
    child = hands.desk.store.write_sync(
        lambda c: life.create_task(
            c,
            new=NewTask(title="part", orchestrator="vp-c", parent=parent.id),
            dispatch=hands.desk.dispatch,
            actor="k-test",
            now_us=hands.desk.now,
        )
    )
    for target in ("vp-a", "vp-b"):
        refused("delegation_cycle", hands.delegate, child, child.orchestrator or "", target)
    hands.desk.cancel(parent)
    assert hands.delegate(child, child.orchestrator or "", "vp-b").state == "pending"


def test_a_chain_has_five_links(hands: Hands) -> None:
    """And says which."""
    task = hands.desk.make()
    for hop in range(passing.MAX_HOPS):
        assert hands.delegate(task, f"vp-{'abcdef'[hop]}", f"vp-{'abcdef'[hop + 1]}").hop == hop + 1
    assert "vp-a -> vp-b" in refused("hop_limit", hands.delegate, task, "vp-f", "vp-g")


def test_a_paused_target_gets_nothing(hands: Hands) -> None:
    """Who paused it, and why, stands in the refusal; when the time is over it gets it."""
    now_us, task = hands.desk.now, hands.desk.make()
    until_us = now_us + 60_000_000
    hands.desk.store.write_sync(
        lambda c: holds.put(
            c, orchestrator="vp-b", kind="pause", by="k-me", reason="a holiday", until_us=until_us, now_us=now_us
        )
    )
    text = refused("target_paused", hands.delegate, task, "vp-a", "vp-b")
    assert "k-me" in text
    assert "a holiday" in text
    hands.desk.clock.advance(60)
    assert hands.delegate(task, "vp-a", "vp-b").state == "pending"


def test_a_task_that_waits_for_another_waits_at_the_target(hands: Hands) -> None:
    """Blocked stays blocked."""
    first = hands.desk.make()
    task = hands.desk.make(depends_on=(first.id,))
    hands.delegate(task, "vp-a", "vp-b")
    after = hands.desk.get(task)
    assert (after.status, after.blocked_reason, after.orchestrator) == ("BLOCKED", "dependency", "vp-b")


def test_other_routing_rules_take_nothing_back(hands: Hands) -> None:
    """What an orchestrator passed on stays where it is, as what a person assigned does."""
    rule = {"name": "sec", "when": "true", "to": {"orchestrator": "vp-a"}}
    task = hands.desk.make(orchestrator=None, discipline="eng")
    assert hands.desk.get(task).orchestrator == "vp-a"
    hands.delegate(task, "vp-a", "vp-b")
    spec = {"orchestrators": {"vp-a": {"discipline": "eng"}, "vp-b": {"discipline": "sec"}}, "routing": [rule]}
    dispatch, now_us = Dispatch.of_spec(spec), hands.desk.now
    found = hands.desk.store.read_sync(lambda c: reroute.astray(c, dispatch, rules_changed=True))
    assert found == []
    assert hands.desk.store.write_sync(lambda c: reroute.again(c, [task.id], dispatch=dispatch, now_us=now_us)) == []


def test_a_purged_task_takes_its_delegations_along(hands: Hands) -> None:
    """Nothing refers to what is not there."""
    task = hands.desk.make()
    one = hands.delegate(task, "vp-a", "vp-b")
    hands.desk.cancel(task)
    hands.desk.store.write_sync(lambda c: life.purge(c, task_id=task.id, actor="k-test", now_us=hands.desk.now))
    with pytest.raises(NotFound):
        hands.written(one)


# What is listed.


def page(hands: Hands, of: str, **asking: Any) -> asked.Page:
    return hands.desk.store.read_sync(lambda c: asked.page(c, of, **{"limit": 100, **asking}))


def test_a_page_shows_what_has_become_of_them_though_nobody_wrote_it_down(hands: Hands) -> None:
    """Also where it is asked for by state, with the right total."""
    tasks = [hands.desk.make(f"t{n}", priority="HIGH" if n == 0 else "LOW") for n in range(4)]
    ones = [hands.delegate(task, "vp-a", "vp-b") for task in tasks]
    hands.delegate(hands.desk.make(orchestrator="vp-c"), "vp-c", "vp-a")
    hands.desk.finish(hands.desk.claim("vp-b")[0])
    hands.desk.cancel(tasks[1])
    wanted = {"done": [0], "expired": [1], "pending": [3, 2], "accepted": [], "rejected": []}
    for state, numbers in wanted.items():
        found = page(hands, "vp-b", states=(state,))
        assert ([one.id for one in found.rows], found.total) == ([ones[n].id for n in numbers], len(numbers))
    several = page(hands, "vp-b", states=("done", "pending"))
    assert ([one.state for one in several.rows], several.total) == (["pending", "pending", "done"], 3)
    assert page(hands, "vp-a").total == 5
    assert [page(hands, "vp-a", role=role).total for role in ("source", "target")] == [4, 1]
    assert page(hands, "vp-a", kinds=("handoff",)).total == 0


def test_pages_neither_skip_nor_repeat(hands: Hands) -> None:
    """The newest first, however long the pages, and while others are written."""
    ones = [hands.delegate(hands.desk.make(f"t{n}"), "vp-a", "vp-b").id for n in range(7)]
    for limit in (1, 2, 3, 7):
        found, cursor = list[str](), None
        while True:
            some = page(hands, "vp-a", limit=limit, cursor=cursor, states=("pending", "accepted"))
            found += [one.id for one in some.rows]
            assert some.total >= len(ones)
            hands.delegate(hands.desk.make(), "vp-a", "vp-b")
            cursor = some.next_cursor
            if cursor is None:
                break
        assert [one for one in found if one in ones] == ones[::-1]


@pytest.mark.parametrize("cursor", ["", "x", "WzEsMl0", "bnVsbA", "WzEsICJcdTAwMDAiXQ", "a" * 500, "é"])
def test_a_cursor_that_is_none_is_refused(hands: Hands, cursor: str) -> None:
    """With the word for it."""
    with pytest.raises(Invalid):
        page(hands, "vp-a", cursor=cursor)


# At once, as several do it.


@pytest.fixture
def second(store_url: str) -> Iterator[Hands]:
    """Another process's hands on the same store, as far as the store can tell."""
    store = open_store(store_url)
    yield Hands(store)
    store.close()


def outcomes(*calls: Any) -> list[Any]:
    """What each call answers or is refused with, all of them begun at once."""

    def outcome(call: Any) -> Any:
        try:
            return call()
        except Exception as refusal:  # noqa: BLE001 (the answer)
            return refusal

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def both_may_write(backend: str) -> bool:
    """SQLite has one writer, in one process; PostgreSQL has as many as come."""
    return backend == "postgresql"


@pytest.mark.parametrize("turn", range(5))
def test_of_two_delegations_at_once_one_wins(hands: Hands, second: Hands, backend: str, turn: int) -> None:
    """The other is refused: the task is no longer the source's."""
    task = hands.desk.make(f"turn {turn}")
    other = second if both_may_write(backend) else hands
    found = outcomes(lambda: hands.delegate(task, "vp-a", "vp-b"), lambda: other.delegate(task, "vp-a", "vp-c"))
    (won,) = [one for one in found if isinstance(one, Coordination)]
    (lost,) = [one for one in found if isinstance(one, Conflict)]
    assert (hands.desk.get(task).orchestrator, lost.code) == (won.target, "not_owner")


@pytest.mark.parametrize("turn", range(5))
def test_a_delegation_and_a_claim_at_once(hands: Hands, second: Hands, backend: str, turn: int) -> None:
    """Either the claim came first and is released, or it found nothing; the task is the target's in both."""
    task = hands.desk.make(f"turn {turn}")
    other = second if both_may_write(backend) else hands
    one, grants = outcomes(lambda: hands.delegate(task, "vp-a", "vp-b"), lambda: other.desk.claim("vp-a"))
    assert isinstance(one, Coordination)
    after = hands.desk.get(task)
    assert (after.orchestrator, after.status) == ("vp-b", "TODO")
    assert hands.now(one).state == "pending"
    for grant in grants:
        with pytest.raises(LeaseLost):
            hands.desk.finish(grant)


@pytest.mark.parametrize("turn", range(5))
def test_a_delegation_and_the_end_at_once(hands: Hands, second: Hands, backend: str, turn: int) -> None:
    """Done, and the delegation refused; or delegated, and the report too late."""
    grant = hands.desk.run(f"turn {turn}")
    other = second if both_may_write(backend) else hands
    one, end = outcomes(lambda: hands.delegate(grant.task, "vp-a", "vp-b"), lambda: other.desk.finish(grant))
    after = hands.desk.get(grant.task)
    if isinstance(one, Conflict):
        assert (one.code, after.status, after.orchestrator) == ("final", "DONE", "vp-a")
    else:
        assert isinstance(end, LeaseLost)
        assert (after.status, after.orchestrator) == ("TODO", "vp-b")


@pytest.mark.parametrize("turn", range(5))
def test_two_settle_at_once_and_it_is_told_once(hands: Hands, second: Hands, backend: str, turn: int) -> None:
    """However many control planes look."""
    task = hands.desk.make(f"turn {turn}")
    hands.delegate(task, "vp-a", "vp-b")
    hands.desk.claim("vp-b")
    other = second if both_may_write(backend) else hands
    found = outcomes(lambda: hands.settle(task), lambda: other.settle(task))
    assert found == [["accepted"], ["accepted"]]
    assert hands.desk.kinds(task).count("delegation_accepted") == 1


# Against a slow word for the same.


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hands]:
    """Hands for all the examples."""
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('many')}/store.sqlite")
    yield Hands(store)
    store.close()


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["delegate", "hand off", "assign", "reject", "claim", "settle"]), st.integers(0, 3)),
        max_size=12,
    )
)
def test_whatever_is_done_links_stand_exactly_on_the_way_the_task_took(
    many: Hands, moves: list[tuple[str, int]]
) -> None:
    """The open links lead, one after the other, to who has the task."""
    hands = many
    names = ("vp-a", "vp-b", "vp-c", "vp-d")
    task, links = hands.desk.make(), list[Coordination]()
    for what, who in moves:
        has = hands.desk.get(task).orchestrator or ""
        try:
            if what == "delegate":
                links.append(hands.delegate(task, has, names[who]))
            elif what == "hand off":
                links.append(hands.hand_off(task, has, names[who]))
            elif what == "assign":
                hands.assign(task, names[who])
            elif what == "reject" and links:
                hands.answer(links[-1], links[-1].target or "", "reject")
            elif what == "claim":
                hands.desk.claim(has, machine="")
            elif what == "settle":
                hands.settle(task)
        except (Conflict, Invalid):
            continue
    has = hands.desk.get(task).orchestrator
    hands.settle(task)
    standing = [one for one in map(hands.written, links) if one.is_open]
    for before, after in itertools.pairwise(standing):
        assert before.target == after.source
    assert not standing or standing[-1].target == has
    assert not hands.late(task)
