"""Each kind of conflict, from the situation that makes it: found while it stands, and gone with it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from desk import Desk
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import NotFound, TaskError
from orchestrator_fleet.orchestrators import attendance, conflict_board, conflicts, coordination
from orchestrator_fleet.orchestrators.conflict_board import Around, Board, Said
from orchestrator_fleet.orchestrators.conflicts import TYPES, Conflict, rings
from orchestrator_fleet.store.outbox import Event, read_after
from orchestrator_fleet.store.schema import task_dependencies
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.rules import Rules
from orchestrator_fleet.tasks.task import Grant, TaskRow
from orchestrator_fleet.wire.link import Hello

HOUR_US = 3_600 * SECOND_US
TABLES = "tasks|attempts|coordinations|task_dependencies|before|lost"
UNSAFE = re.compile(rf"SCAN ({TABLES})\b(?!.* ix_tasks_running)|AUTOMATIC")


def around(
    *, sessions: int = 2, machines: Mapping[str, int] | None = None, more: Mapping[str, Any] | None = None, **known: Any
) -> Around:
    """Two orchestrators with room for so many sessions."""
    specs = {name: {"sessions": {"max": sessions}, **((more or {}).get(name) or {})} for name in ("vp-a", "vp-b")}
    there = {name: {"sessions": most} for name, most in (machines or {}).items()}
    rules = Rules.of_spec({"orchestrators": specs, "machines": there})
    return Around(orchestrators=specs, rules=rules, **known)


AROUND = around()


def board(desk: Desk, known: Around = AROUND, **asked: Any) -> Board:
    return desk.store.read_sync(lambda conn: conflict_board.look(conn, known, now_us=desk.now, **asked))


def look(desk: Desk, known: Around = AROUND, **asked: Any) -> list[Conflict]:
    found = board(desk, known, **asked)
    assert not found.truncated
    return list(found.conflicts)


def only(desk: Desk, kind: str, known: Around = AROUND) -> Conflict:
    """The only conflict there is, which is of this type; reads it twice, as its id must be the same."""
    (found,) = look(desk, known)
    assert found.type == kind
    assert found.suggestion.text
    assert [one.id for one in look(desk, known)] == [found.id]
    return found


def here(desk: Desk, orchestrator: str = "vp-a", machine: str = "m1", epoch: str = "e1") -> None:
    """Its daemon says hello."""
    hello = Hello(
        orchestrator=orchestrator,
        machine=machine,
        boot="b",
        epoch=epoch,
        pid=1,
        generation="g1",
        charter_version="c1",
        sessions_max=2,
    )
    desk.store.write_sync(lambda conn: attendance.arrive(conn, hello, actor="k-test", now_us=desk.now))


def test_nothing_stands_against_anything_in_a_sound_fleet(desk: Desk) -> None:
    """With tasks that run, wait, are due, depend on each other and were delegated."""
    here(desk)
    first = desk.run(metadata={"repo": "r", "branch": "b"})
    desk.run(orchestrator="vp-b", metadata={"repo": "r", "branch": "other"})
    desk.finish(desk.run(), "done")
    desk.make(depends_on=(first.task.id,))
    desk.make(due_at_us=desk.now + HOUR_US)
    ask(desk, desk.make(), "vp-a", "vp-b")
    assert look(desk) == []


# -- over capacity


def test_more_run_than_a_lowered_limit_allows(desk: Desk) -> None:
    """Named with what runs; gone when so many have ended. What began newest marks it, so it stays the same."""
    grants = []
    for _ in range(3):
        desk.clock.advance(1)
        grants.append(desk.run())
    desk.run(orchestrator="vp-b")
    found = only(desk, "over_capacity")
    assert (found.orchestrators, found.tasks) == (("vp-a",), tuple(grant.task.id for grant in reversed(grants)))
    assert found.evidence == {"orchestrator": "vp-a", "running": 3, "max": 2, "setting": "sessions.max"}
    assert look(desk, around(sessions=3)) == []
    lower = around(sessions=1)
    before = only(desk, "over_capacity", lower)
    desk.finish(grants[0], "done")
    assert only(desk, "over_capacity", lower).id == before.id
    assert look(desk) == []


def test_more_run_on_a_machine_than_it_may_have(desk: Desk) -> None:
    """All orchestrators together."""
    desk.run()
    desk.run(orchestrator="vp-b")
    found = only(desk, "over_capacity", around(machines={"m1": 1, "m2": 1}))
    assert (found.orchestrators, found.evidence["machine"], found.evidence["running"]) == (("vp-a", "vp-b"), "m1", 2)
    assert look(desk, around(machines={"m1": 2})) == []


def test_the_same_crowd_again_of_other_tasks_is_another_conflict(desk: Desk) -> None:
    """So that nobody's word on the first hides the second."""
    ids = set()
    for _ in range(2):
        grants = [desk.run() for _ in range(3)]
        ids.add(only(desk, "over_capacity").id)
        for grant in grants:
            desk.finish(grant, "done")
    assert len(ids) == 2


# -- double ownership


def lost(desk: Desk, *, by: str = "vp-b") -> tuple[Grant, Grant]:
    """vp-a's daemon is cut off with a task, which runs again elsewhere."""
    first = desk.run()
    desk.clock.advance(31)
    desk.expire()
    if by != "vp-a":
        desk.assign(first.task, by)
    (second,) = desk.claim(by, machine="m2")
    return first, second


def test_who_was_cut_off_may_still_run_what_runs_again(desk: Desk) -> None:
    """Until its daemon is heard of again, which is told to stop then."""
    here(desk)
    first, second = lost(desk)
    found = only(desk, "double_ownership")
    assert (found.orchestrators, found.tasks) == (("vp-b", "vp-a"), (first.task.id,))
    (holder,) = found.evidence["also_held_by"]
    assert (holder["orchestrator"], holder["machine"], holder["attempt"]) == ("vp-a", "m1", 1)
    assert found.evidence["runs"]["id"] == f"{second.task.id}.2"
    here(desk, epoch="e2")
    assert look(desk) == []


def test_a_daemon_that_came_back_elsewhere_told_nobody_there_to_stop(desk: Desk) -> None:
    """Its old machine may still run the session; the end of the task ends the conflict."""
    here(desk)
    _, second = lost(desk, by="vp-a")
    here(desk, machine="m2", epoch="e2")
    only(desk, "double_ownership")
    desk.finish(second, "done")
    assert look(desk) == []


def test_what_a_connected_daemon_lost_is_nobody_elses(desk: Desk) -> None:
    """It has been heard of, so it knows; and a client over HTTP has no session of ours."""
    here(desk)
    lost(desk)
    here(desk, epoch="e2")
    (grant,) = [desk.make(), *desk.claim(machine="")][1:]
    desk.clock.advance(31)
    here(desk, epoch="e3")
    desk.expire()
    desk.claim("vp-a", machine="m1")
    assert grant.task.id
    assert look(desk, types=["double_ownership"]) == []


def test_a_daemon_says_that_it_runs_what_is_anothers(desk: Desk) -> None:
    """When it had its time to stop, and says so still. What it says of its own is no conflict."""
    here(desk)
    first, second = lost(desk)
    here(desk, epoch="e2")

    def said(grant: Grant, after_s: float, orchestrator: str = "vp-a") -> Around:
        held = {grant.task.id: grant.token, "task-unknown": "x"}
        at_us = desk.now + round(after_s * SECOND_US)
        return replace(AROUND, said=[Said(orchestrator=orchestrator, machine="m1", at_us=at_us, held=held)])

    assert look(desk, said(first, 14.0)) == []
    found = only(desk, "double_ownership", said(first, 16.0))
    assert found.evidence["also_held_by"][0]["attempt"] == 1
    assert found.evidence["owner"] == "vp-b"
    assert look(desk, said(second, 16.0, "vp-b")) == []
    desk.finish(second, "released")
    assert only(desk, "double_ownership", said(first, 16.0)).evidence["runs"] is None
    desk.cancel(second.task)
    assert look(desk, said(first, 16.0)) == []


def test_several_who_hold_one_task_are_one_conflict(desk: Desk) -> None:
    """With each of them."""
    here(desk)
    first, _ = lost(desk)
    desk.clock.advance(31)
    desk.expire()
    desk.claim("vp-b", machine="m3")
    said = [Said(orchestrator="vp-a", machine="m1", at_us=desk.now + HOUR_US, held={first.task.id: first.token})]
    found = only(desk, "double_ownership", replace(AROUND, said=said))
    assert [(one["attempt"], one["machine"]) for one in found.evidence["also_held_by"]] == [(1, "m1"), (2, "m2")]


# -- dependency deadlock


def cancel(desk: Desk, task: TaskRow) -> None:
    desk.cancel(task)


def exhaust(desk: Desk, task: TaskRow) -> None:
    (grant,) = desk.claim(task.orchestrator or "")
    assert grant.task.id == task.id
    desk.finish(grant, "failed_for_good")


def block(desk: Desk, task: TaskRow, reason: Any = "manual") -> None:
    now_us = desk.now
    desk.store.write_sync(
        lambda c: life.block(c, task_id=task.id, blocked_reason=reason, reason="hm", actor="k-test", now_us=now_us)
    )


@pytest.mark.parametrize(
    ("stick", "action"), [(cancel, "unblock"), (exhaust, "retry"), (block, "unblock")], ids=lambda one: str(one)[:20]
)
def test_tasks_wait_for_one_that_cannot_end_by_itself(desk: Desk, stick: Any, action: str) -> None:
    """One conflict for all that wait for it, near or far; it ends when somebody sees to it."""
    root = desk.make("root")
    near = desk.make("near", depends_on=(root.id,), orchestrator="vp-b")
    desk.make("far", depends_on=(near.id,))
    assert look(desk) == []
    stick(desk, root)
    found = only(desk, "dependency_deadlock")
    assert (found.tasks, found.evidence["waiting"]) == ((root.id, near.id), 1)
    assert (found.orchestrators, found.suggestion.action) == (("vp-a", "vp-b"), action)
    if action == "retry":
        desk.unblock(root)
        assert look(desk) == []
        exhaust(desk, root)
        assert only(desk, "dependency_deadlock").id != found.id
    else:
        desk.unblock(near if stick is cancel else root)
        assert look(desk) == []


@pytest.mark.parametrize("reason", ["approval", "escalation", "quota", "budget"])
def test_what_somebody_was_asked_about_is_no_deadlock(desk: Desk, reason: str) -> None:
    """Nor what time ends."""
    root = desk.make("root")
    desk.make("near", depends_on=(root.id,))
    block(desk, root, reason)
    assert look(desk) == []


def test_a_task_that_nobody_takes_holds_those_behind_it(desk: Desk) -> None:
    """Without a route, or with an owner that is gone."""
    nobodys = desk.make("nobody's", orchestrator=None)
    desk.make(depends_on=(nobodys.id,))
    found = only(desk, "dependency_deadlock")
    assert (found.suggestion.action, "no routing rule" in found.suggestion.text) == ("assign", True)
    desk.assign(nobodys, "vp-b")
    assert look(desk) == []
    gone = replace(AROUND, orchestrators={"vp-a": AROUND.orchestrators["vp-a"]})
    assert "vp-b is gone" in only(desk, "dependency_deadlock", gone).suggestion.text


def test_tasks_that_wait_for_each_other_are_found(desk: Desk) -> None:
    """A parent for its child and the child for its parent: no door lets that in, so it is written past them."""
    child = desk.make("child", orchestrator="vp-b")
    parent = desk.make("parent", depends_on=(child.id,))
    block(desk, child, "dependency")
    edge = {"task": child.id, "depends_on": parent.id}
    desk.store.write_sync(lambda conn: conn.execute(task_dependencies.insert(), edge))
    found = only(desk, "dependency_deadlock")
    assert (set(found.tasks), found.orchestrators) == ({child.id, parent.id}, ("vp-a", "vp-b"))
    assert found.evidence["waiting"] == 2


# -- deadline collision


def with_pace(desk: Desk, run_s: float = 600.0) -> None:
    """vp-a's tasks take so long."""
    for _ in range(3):
        grant = desk.run(priority="CRITICAL")
        desk.clock.advance(20)
        desk.store.write_sync(
            lambda c, token=grant: life.heartbeat(
                c, task_id=token.task.id, token=token.token, lease_s=3_600, now_us=desk.now
            )
        )
        desk.clock.advance(run_s - 20)
        desk.finish(grant, "done")


def test_a_task_is_due_sooner_than_the_line_allows(desk: Desk) -> None:
    """By the line before it, the sessions there are and how long tasks take; the estimate of `why` is the same."""
    with_pace(desk)
    for _ in range(6):
        desk.make("before it", priority="HIGH")
    late = desk.make("late", due_at_us=desk.now + HOUR_US // 2)
    desk.make("in time", due_at_us=desk.now + 2 * HOUR_US)
    found = only(desk, "deadline_collision")
    assert (found.tasks, found.orchestrators) == ((late.id,), ("vp-a",))
    based_on = found.evidence["based_on"]
    assert (based_on["ahead"], based_on["slots"], based_on["mean_run_s"]) == (6, 2, 600.0)
    assert found.evidence["starts_at"] == "2026-01-01T00:55:00.000000Z"  # (6 - 2 + 1) x 600 s / 2 after 00:30
    desk.update(late, due_at_us=desk.now + HOUR_US)
    assert look(desk) == []
    desk.update(late, due_at_us=desk.now + HOUR_US // 2)
    assert only(desk, "deadline_collision").id == found.id
    desk.update(late, priority="CRITICAL")
    assert look(desk) == []


def test_what_nobody_can_know_is_not_told(desk: Desk) -> None:
    """Without a task done there is no pace; what is overdue already collides with nothing; nor what need not wait."""
    for _ in range(5):
        desk.make("before it", priority="HIGH")
    desk.make("soon", due_at_us=desk.now + SECOND_US)
    assert look(desk) == []
    with_pace(desk)
    assert look(desk) == []
    lonely = desk.make("long, but next", orchestrator="vp-b", due_at_us=desk.now + SECOND_US)
    assert lonely.id
    assert look(desk) == []


def test_a_daemon_with_less_room_makes_a_line_slower(desk: Desk) -> None:
    """What is declared and what it has room for: the lower counts."""
    with_pace(desk)
    desk.make("before it")
    desk.make("late", due_at_us=desk.now + 900 * SECOND_US, priority="LOW")
    assert look(desk) == []
    (found,) = look(desk, replace(AROUND, slots={"vp-a": 1}))
    assert found.evidence["based_on"]["slots"] == 1


# -- same branch


def test_two_sessions_of_the_same_branch_collide(desk: Desk) -> None:
    """As their metadata say; of whoever they are."""
    first = desk.run(metadata={"repo": "git@x:r", "branch": "main"})
    desk.run(metadata={"repo": "git@x:r", "branch": "other"})
    desk.clock.advance(5)
    second = desk.run(orchestrator="vp-b", metadata={"repo": "git@x:r", "branch": "main"})
    found = only(desk, "same_branch")
    assert (found.tasks, found.orchestrators) == ((first.task.id, second.task.id), ("vp-a", "vp-b"))
    assert (found.evidence["repo"], found.evidence["branch"]) == ("git@x:r", "main")
    assert found.since_us == desk.now
    desk.finish(first, "done")
    assert look(desk) == []


def test_sessions_without_a_tree_of_their_own_share_a_branch(desk: Desk) -> None:
    """A declared workspace with isolate none; a worktree each is fine until their metadata name one branch."""
    desk.run(metadata={"odd": 1, "repo": 7})
    desk.run()
    desk.run()
    none = {"vp-a": {"workspace": {"repo": "../r", "ref": "main", "isolate": "none"}, "sessions": {"max": 5}}}
    trees = {"vp-a": {"workspace": {"repo": "../r", "ref": "main", "isolate": "worktree"}, "sessions": {"max": 5}}}
    found = only(desk, "same_branch", around(more=none))
    assert (found.evidence["running"], found.evidence["branch"]) == (2, "main")
    assert look(desk, around(more=trees)) == []
    for _ in range(2):
        desk.run(metadata={"branch": "fix"})
    assert only(desk, "same_branch", around(more=trees)).evidence["branch"] == "fix"


# -- delegation loop


def ask(desk: Desk, task: TaskRow, source: str, target: str, kind: Any = "delegation") -> coordination.Coordination:
    desk.clock.advance(1)
    now_us = desk.now
    return desk.store.write_sync(
        lambda c: coordination.ask(
            c,
            life.get_task(c, task.id),
            kind=kind,
            source=source,
            target=target,
            hop=1,
            note=None,
            actor="k-test",
            now_us=now_us,
        )
    )


def test_who_was_asked_asked_back(desk: Desk) -> None:
    """Over a task and the children that were made of it; when one of them says no, it is over."""
    parent = desk.make("parent")
    child = desk.make("child", parent=parent.id, orchestrator="vp-b")
    grandchild = desk.make("grandchild", parent=child.id)
    other = desk.make("another family", orchestrator="vp-b")
    first = ask(desk, parent, "vp-a", "vp-b", "collaboration")
    ask(desk, other, "vp-b", "vp-a")
    ask(desk, parent, "vp-b", "human:me", "escalation")
    assert look(desk) == []
    ask(desk, child, "vp-b", "vp-c")
    last = ask(desk, grandchild, "vp-c", "vp-a", "handoff")
    found = only(desk, "delegation_loop")
    assert (found.orchestrators, found.tasks) == (("vp-a", "vp-b", "vp-c"), (parent.id, child.id, grandchild.id))
    assert [(one["from"], one["to"]) for one in found.evidence["coordinations"]] == [
        ("vp-a", "vp-b"),
        ("vp-b", "vp-c"),
        ("vp-c", "vp-a"),
    ]
    assert (found.since_us, found.evidence["family"]) == (last.created_at_us, parent.id)
    now_us = desk.now
    desk.store.write_sync(
        lambda c: coordination.move(
            c, first, "rejected", life.get_task(c, parent.id), reason=None, actor="k-test", now_us=now_us
        )
    )
    assert look(desk) == []


@given(
    st.dictionaries(
        st.sampled_from("abcdefg"), st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4), max_size=7
    )
)
def test_a_ring_is_found_exactly_where_there_is_one(leads_to: dict[str, list[str]]) -> None:
    """Each is a way back to where it began, and without their nodes there is none."""
    found = rings(leads_to)
    seen = list(itertools.chain(*found))
    assert len(seen) == len(set(seen))
    for ring in found:
        assert ring[0] == min(ring)
        assert all(after in leads_to[node] for node, after in itertools.pairwise([*ring, ring[0]]))
    assert not has_ring({node: [one for one in after if one not in seen] for node, after in leads_to.items()}, seen)


def has_ring(leads_to: Mapping[str, Sequence[str]], without: Sequence[str]) -> bool:
    """By walking every way."""

    def walk(node: str, path: tuple[str, ...]) -> bool:
        return node in path or any(walk(after, (*path, node)) for after in leads_to.get(node, ()))

    return any(walk(node, ()) for node in leads_to if node not in without)


def test_a_long_chain_is_no_ring() -> None:
    """And is looked at in no time; closed, it is one."""
    chain = {f"t{n:06d}": [f"t{n + 1:06d}"] for n in range(20_000)}
    assert rings(chain) == []
    (ring,) = rings({**chain, "t020000": ["t000000"]})
    assert len(ring) == 20_001


# -- what somebody decided


def resolve(desk: Desk, conflict_id: str, known: Around = AROUND, note: str = "seen to") -> dict[str, Any]:
    now_us = desk.now
    return desk.store.write_sync(
        lambda c: conflict_board.resolve(c, conflict_id, known, note=note, actor="k-me", now_us=now_us)
    )


def test_that_somebody_decided_it_is_kept(desk: Desk) -> None:
    """With an event; once, and only of what stands now."""
    grants = [desk.run() for _ in range(3)]
    found = only(desk, "over_capacity")
    shown = resolve(desk, found.id)
    decided = {"by": "k-me", "at": "2026-01-01T00:00:00.000000Z", "note": "seen to"}
    assert (shown["id"], shown["resolved"]) == (found.id, decided)
    assert board(desk).resolved[found.id].note == "seen to"
    (event,) = (one for one in events(desk) if one.kind == "conflict_resolved")
    assert (event.actor, event.orchestrator, event.data) == ("k-me", "vp-a", {"conflict": shown})
    with pytest.raises(TaskError, match="k-me decided it") as refused:
        resolve(desk, found.id)
    assert refused.value.code == "already_resolved"
    desk.finish(grants[2], "done")
    for gone in (found.id, "over_capacity-0", "nothing", ""):
        with pytest.raises(NotFound):
            resolve(desk, gone)


def events(desk: Desk) -> Sequence[Event]:
    return desk.store.read_sync(lambda conn: read_after(conn, 0))


# -- limits and plans


def test_more_than_can_be_looked_at_is_said(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was looked at is told."""
    for name in ("MAX_RUNNING", "MAX_BLOCKED", "MAX_ASKED", "MAX_EDGES", "DUE_OF_A_CLASS"):
        monkeypatch.setattr(conflict_board, name, 2)
    root = desk.make("root")
    for _ in range(3):
        desk.make(depends_on=(root.id,))
    assert board(desk).truncated
    cancel(desk, root)
    (found,) = board(desk).conflicts
    assert found.evidence["waiting"] == 2
    with_pace(desk)
    for n in range(4):
        desk.make(due_at_us=desk.now + n * SECOND_US)
    (found,) = board(desk, replace(AROUND, slots={"vp-a": 1}), types=["deadline_collision"]).conflicts
    assert found.evidence["based_on"]["ahead"] == 1


def test_they_come_in_one_order(desk: Desk) -> None:
    """By type, then the oldest first."""
    for metadata in ({"repo": "r", "branch": "b"}, {"repo": "r", "branch": "a"}):
        for _ in range(2):
            desk.clock.advance(1)
            desk.run(metadata=metadata)
    root = desk.make(orchestrator="vp-b")
    desk.make(depends_on=(root.id,))
    cancel(desk, root)
    found = look(desk)
    assert [one.type for one in found] == ["dependency_deadlock", "same_branch", "same_branch", "over_capacity"]
    assert [one.evidence["branch"] for one in found[1:3]] == ["b", "a"]
    assert [one.id for one in look(desk, types=["same_branch"])] == [one.id for one in found[1:3]]
    assert conflicts.TYPES == TYPES


@contextmanager
def _statements(desk: Desk) -> Iterator[list[str]]:
    raw = desk.store._connection.connection.dbapi_connection  # type: ignore[attr-defined]
    seen: list[str] = []
    raw.set_trace_callback(seen.append)
    yield seen
    raw.set_trace_callback(None)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=False)
def test_it_is_read_by_indexes_alone(desk: Desk) -> None:
    """No table is walked, on SQLite's planner without statistics."""
    here(desk)
    lost(desk)
    desk.run(metadata={"repo": "r", "branch": "b"})
    with_pace(desk)
    parent = desk.make(due_at_us=desk.now + SECOND_US)
    desk.make(depends_on=(parent.id,), due_at_us=desk.now + SECOND_US, priority="LOW")
    ask(desk, desk.make(parent=parent.id), "vp-a", "vp-b")
    said = [Said(orchestrator="vp-a", machine="m1", at_us=desk.now + HOUR_US, held={parent.id: "x"})]
    known = replace(around(sessions=1, machines={"m1": 1}), said=said)
    with _statements(desk) as seen:
        desk.store.write_sync(lambda conn: conflict_board.look(conn, known, now_us=desk.now))
    reads = [sql for sql in dict.fromkeys(seen) if sql.startswith("SELECT")]
    assert len(reads) > 10

    def explain(conn: Any) -> dict[str, str]:
        plans = {sql: conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}") for sql in reads}
        return {sql: "\n".join(row[3] for row in plan) for sql, plan in plans.items()}

    bad = {sql: plan for sql, plan in desk.store.write_sync(explain).items() if UNSAFE.search(plan)}
    assert bad == {}
