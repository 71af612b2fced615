"""Where waiting tasks go when the rules change, or when somebody is no longer there."""

from __future__ import annotations

from typing import Any

import pytest
from desk import SPEC, Desk

from orchestrator_fleet.tasks import reroute
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.task import TaskRow

TO_A = {"name": "to-a", "to": {"orchestrator": "vp-a"}}
TO_B = {"name": "to-b", "to": {"orchestrator": "vp-b"}}
ANYBODY = {"name": "anybody", "to": {"labels": {"team": "x"}}}


def ruled(desk: Desk, *rules: dict[str, Any], orchestrators: dict[str, Any] | None = None) -> None:
    """Let other rules come into force, for new tasks."""
    desk.dispatch = Dispatch.of_spec(
        {"orchestrators": SPEC["orchestrators"] if orchestrators is None else orchestrators, "routing": list(rules)}
    )


def route_again(desk: Desk) -> list[TaskRow]:
    """What the control plane does after other rules came into force; answers what moved."""

    def work(conn: Any) -> list[TaskRow]:
        settled = reroute.are_settled(conn, desk.dispatch)
        ids = reroute.astray(conn, desk.dispatch, rules_changed=not settled)
        moved = reroute.again(conn, ids, dispatch=desk.dispatch, now_us=desk.now)
        reroute.settle(conn, desk.dispatch)
        return moved

    return desk.store.write_sync(work)


def free(desk: Desk, title: str = "t", **fields: Any) -> TaskRow:
    """A task that names nobody."""
    return desk.make(title, orchestrator=None, **fields)


def test_what_has_not_started_goes_where_the_new_rules_say(desk: Desk) -> None:
    """With an event that says from where, to where and why."""
    ruled(desk, TO_A)
    waits = free(desk, "waits")
    blocked = free(desk, "blocked", depends_on=(waits.id,))
    ruled(desk, TO_B)
    assert {task.id for task in route_again(desk)} == {waits.id, blocked.id}
    moved = desk.get(waits)
    assert (moved.orchestrator, moved.route, moved.status) == ("vp-b", "to-b", "TODO")
    assert (desk.get(blocked).orchestrator, desk.get(blocked).condition) == ("vp-b", blocked.condition)
    event = desk.events(waits)[-1]
    told = {name: event.data[name] for name in ("from", "to", "route", "reason")}
    assert (event.kind, event.actor) == ("task_routed", "system")
    assert told == {"from": "vp-a", "to": "vp-b", "route": "to-b", "reason": "the only one it means"}
    assert [grant.task.id for grant in desk.claim("vp-b", limit=5)] == [waits.id]


def test_what_has_started_was_named_or_was_assigned_stays(desk: Desk) -> None:
    """A rule moves only what a rule has put there."""
    ruled(desk, TO_A)
    runs, tried = free(desk, "runs"), free(desk, "tried")
    grants = {grant.task.id: grant for grant in desk.claim(limit=2)}
    desk.finish(grants[tried.id], "failed")
    named, assigned, blocked, done = desk.make("named"), free(desk), free(desk), free(desk)
    desk.assign(assigned, "vp-b")
    desk.assign(assigned, "vp-a")
    desk.set_status(blocked, "BLOCKED")
    desk.cancel(done)
    ruled(desk, TO_B)
    before = [desk.get(task) for task in (runs, tried, named, assigned, blocked, done)]
    assert route_again(desk) == []
    assert [desk.get(task) for task in before] == before


def test_a_rule_that_leaves_a_choice_leaves_tasks_where_they_are(desk: Desk) -> None:
    """Nothing moves for nothing; the task says which rule has it now."""
    ruled(desk, TO_B)
    tasks = [free(desk) for _ in range(4)]
    ruled(desk, ANYBODY)
    assert {task.orchestrator for task in route_again(desk)} == {"vp-b"}
    assert {desk.get(task).route for task in tasks} == {"anybody"}
    ruled(desk, {**ANYBODY, "strategy": "round-robin"})
    assert route_again(desk) == []
    ruled(desk, {**ANYBODY, "strategy": "weighted", "weights": {"vp-b": 0}})
    assert {task.orchestrator for task in route_again(desk)} == {"vp-a"}


def test_a_task_that_no_rule_takes_any_more_stays_with_who_has_it(desk: Desk) -> None:
    """Somebody is better than nobody."""
    ruled(desk, TO_A)
    task = free(desk)
    ruled(desk)
    assert route_again(desk) == []
    assert desk.get(task) == task


def test_an_unroutable_task_is_kept_and_goes_to_the_first_rule_that_takes_it(desk: Desk) -> None:
    """Its condition says what is missing, until then."""
    ruled(desk)
    task = free(desk)
    assert task.condition == "nobody gets it: there are no routing rules; assign it, or add a routing rule"
    ruled(desk, TO_B)
    (routed,) = route_again(desk)
    assert (routed.id, routed.orchestrator, routed.route, routed.condition) == (task.id, "vp-b", "to-b", None)
    assert "from" not in desk.events(task)[-1].data


def test_tasks_of_somebody_who_is_gone_are_routed_whoever_named_him(desk: Desk) -> None:
    """Tried ones too; and when no rule takes them, nobody has them and they say so."""
    tried = desk.run("tried")
    desk.finish(tried, "failed")
    named = desk.make("named")
    only_b = {"vp-b": SPEC["orchestrators"]["vp-b"]}
    ruled(desk, orchestrators=only_b)
    assert len(route_again(desk)) == 2
    left = desk.get(named)
    assert (left.orchestrator, left.route, left.status) == (None, None, "TODO")
    assert (left.condition or "").startswith("nobody gets it: there are no routing rules")
    assert desk.events(named)[-1].data["reason"] == "vp-a is no longer declared; there are no routing rules"
    ruled(desk, TO_B, orchestrators=only_b)
    assert {task.id for task in route_again(desk)} == {named.id, tried.task.id}


def test_tasks_are_looked_at_once_for_each_change_of_the_rules(desk: Desk) -> None:
    """The store remembers by which rules; a change of anything else is none."""
    ruled(desk, TO_A)
    task = free(desk)
    route_again(desk)

    def astray() -> list[str]:
        return desk.store.read_sync(
            lambda c: reroute.astray(c, desk.dispatch, rules_changed=not reroute.are_settled(c, desk.dispatch))
        )

    assert astray() == []
    ruled(desk, {**TO_A, "tests": [{"task": {}, "expect": "vp-a"}]})
    assert astray() == []
    ruled(desk, {**TO_A, "when": "true"})
    assert astray() == [task.id]


def test_no_task_is_left_out_however_many_no_rule_takes(desk: Desk) -> None:
    """Those that stay nobody's never stand before those that a rule would take."""
    ruled(desk)
    for _ in range(3):
        free(desk)
    wanted = free(desk, discipline="sec")
    ruled(desk, *SPEC["routing"])
    ids = desk.store.read_sync(lambda c: reroute.astray(c, desk.dispatch, rules_changed=True))
    moved: list[TaskRow] = []
    for task_id in ids:
        moved += desk.store.write_sync(
            lambda c, one=task_id: reroute.again(c, [one], dispatch=desk.dispatch, now_us=desk.now)
        )
    assert [task.id for task in moved] == [wanted.id]


@pytest.mark.parametrize("strategy", ["round-robin", "weighted"])
def test_turns_go_on_after_a_restart(desk: Desk, strategy: str) -> None:
    """They are kept in the store, in the transaction that makes the task."""
    rule = {**ANYBODY, "strategy": strategy}
    got = []
    for _ in range(4):
        ruled(desk, rule)
        got.append(free(desk).orchestrator)
    assert got in (["vp-a", "vp-b"] * 2, ["vp-b", "vp-a"] * 2)


def test_the_least_loaded_is_found_without_counting_at_each_creation(desk: Desk) -> None:
    """What was routed since the last count is counted on; what ended shows at the next count."""
    ruled(desk, ANYBODY)
    for _ in range(3):
        desk.make(orchestrator="vp-a")
    got = [free(desk).orchestrator for _ in range(5)]
    assert got == ["vp-b", "vp-b", "vp-b", "vp-a", "vp-b"]
    for task in desk.page(limit=100).rows:
        if task.orchestrator == "vp-b":
            desk.cancel(task)
    desk.clock.advance(100)
    assert [free(desk).orchestrator for _ in range(4)] == ["vp-b"] * 4


def test_the_load_is_read_again_the_later_the_longer_it_takes(desk: Desk) -> None:
    """Counting a long line takes no more than one part in a hundred of the time."""
    ruled(desk, ANYBODY)
    free(desk)
    fresh_us = desk.dispatch._load_until_us - desk.now
    assert 1_000_000 <= fresh_us <= 60_000_000
    kept = desk.dispatch._load
    desk.clock.advance(fresh_us / 2_000_000)
    free(desk)
    assert desk.dispatch._load is kept
    desk.clock.advance(fresh_us / 1_000_000)
    free(desk)
    assert desk.dispatch._load is not kept
    kept = desk.dispatch._load
    desk.clock.advance(-3600)
    free(desk)
    assert desk.dispatch._load is not kept
