"""What waits for what."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from desk import Desk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator_fleet.errors import Conflict, Invalid
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import dependencies, life
from orchestrator_fleet.tasks.task import MAX_DEPENDENCIES, TaskRow

T = TypeVar("T")


class InOneTransaction:
    """Stands for a store while one of its transactions is open: thousands of steps, one fsync."""

    def __init__(self, conn: Any, url: str) -> None:
        self.url = url
        self.write_sync = self.read_sync = lambda fn: fn(conn)


def at_once(desk: Desk, work: Callable[[], T]) -> T:
    """Do what `work` does with the desk in one transaction."""
    store = desk.store

    def run(conn: Any) -> T:
        desk.store = InOneTransaction(conn, store.url)
        try:
            return work()
        finally:
            desk.store = store

    return store.write_sync(run)


def many(desk: Desk, on_sqlite: int, on_postgresql: int) -> int:
    """How many of something; each statement is a round trip on PostgreSQL."""
    return on_postgresql if desk.store.url.startswith("postgresql") else on_sqlite


def statements(desk: Desk, work: Callable[[], Any]) -> int:
    """How many statements the writer of a SQLite store runs."""
    raw = desk.store._connection.connection.dbapi_connection
    texts: list[str] = []
    raw.set_trace_callback(texts.append)
    work()
    raw.set_trace_callback(None)
    return len([text for text in texts if re.match(r"SELECT|WITH|UPDATE|INSERT|DELETE", text)])


def test_a_task_waits_until_the_last_of_its_dependencies_is_done(desk: Desk) -> None:
    """And is TODO in the transaction that completes it."""
    first, second = desk.make("1"), desk.make("2")
    task = desk.make("3", depends_on=(first.id, second.id))
    assert (task.status, task.blocked_reason) == ("BLOCKED", "dependency")
    assert first.id in (task.condition or "")
    for _ in range(2):
        assert desk.get(task).status == "BLOCKED"
        (grant,) = desk.claim()
        desk.finish(grant)
    after = desk.get(task)
    assert (after.status, after.condition, after.waiting_since_us) == ("TODO", None, desk.now)
    assert desk.kinds(task) == ["task_created", "task_blocked", "task_unblocked"]
    assert desk.claim()[0].task.id == task.id


def test_done_dependencies_do_not_block(desk: Desk) -> None:
    """Nor does one named twice."""
    done = desk.finish(desk.run())
    task = desk.make(depends_on=(done.id, done.id))
    assert (task.status, task.depends_on) == ("TODO", [done.id])


def test_a_cancelled_dependency_blocks_with_its_own_message_until_a_person_decides(desk: Desk) -> None:
    """Unblocking waives it."""
    first, second = desk.make("1"), desk.make("2")
    task = desk.make("3", depends_on=(first.id, second.id))
    desk.cancel(first)
    blocked = desk.get(task)
    assert blocked.condition == f"waits for {first.id}, which was cancelled; unblock it, or cancel it too"
    with pytest.raises(Conflict, match=second.id) as refused:
        desk.unblock(task)
    assert refused.value.code == "dependency_unmet"
    desk.cancel(second)
    free = desk.unblock(task)
    assert (free.status, free.depends_on) == ("TODO", [])
    assert desk.make(depends_on=(first.id,)).condition == blocked.condition


def test_an_edit_of_dependencies_blocks_and_frees(desk: Desk) -> None:
    """As creation and completion do."""
    first, task = desk.make("1"), desk.make("2")
    assert desk.update(task, depends_on=[first.id]).status == "BLOCKED"
    assert desk.update(task, depends_on=[]).status == "TODO"
    desk.update(task, depends_on=[first.id])
    (grant,) = desk.claim()
    with pytest.raises(Conflict) as refused:
        desk.update(first, depends_on=[task.id])
    assert refused.value.code == "in_progress"
    desk.finish(grant)
    assert desk.get(task).status == "TODO"


def test_a_cycle_is_refused_with_its_path_and_nothing_changes(desk: Desk) -> None:
    """However long, and a task can't wait for itself."""
    a = desk.make("a")
    b = desk.make("b", depends_on=(a.id,))
    c = desk.make("c", depends_on=(b.id,))
    with pytest.raises(Conflict) as refused:
        desk.update(a, depends_on=[c.id])
    assert refused.value.code == "dependency_cycle"
    assert f"{a.id} -> {c.id} -> {b.id} -> {a.id}" in str(refused.value)
    with pytest.raises(Conflict, match=f"{a.id} -> {a.id}"):
        desk.update(a, depends_on=[a.id])
    assert desk.get(a) == a


def test_a_purge_of_what_another_needs_is_refused(desk: Desk) -> None:
    """The edge would hang in the air."""
    done = desk.finish(desk.run())
    desk.make(depends_on=(done.id,))
    with pytest.raises(Conflict) as refused:
        desk._write(life.purge, task_id=done.id)
    assert refused.value.code == "needed"


def test_a_chain_of_thousands_is_done_one_after_the_other(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Each end frees the next one, and no other."""
    length = many(desk, 10_000, 200)
    began = time.monotonic()

    def work() -> None:
        before: tuple[str, ...] = ()
        chain = []
        for number in range(length):
            chain.append(desk.make(str(number), depends_on=before).id)
            before = (chain[-1],)
        for task in chain:
            (grant,) = desk.claim(limit=2)
            assert grant.task.id == task
            desk.finish(grant)

    at_once(desk, work)
    with capsys.disabled():
        sys.stdout.write(f"\na chain of {length}: {time.monotonic() - began:.1f} s\n")
    assert desk.page(limit=1).total == length
    assert desk.claim() == []


def test_an_edge_that_closes_a_ring_of_thousands_is_refused_and_one_that_does_not_is_made(desk: Desk) -> None:
    """No legal graph is refused for its size; the path in the error shows its two ends."""
    length = many(desk, 10_000, 1_000)

    def work() -> list[TaskRow]:
        chain = [desk.make("0")]
        for number in range(1, length):
            chain.append(desk.make(str(number), depends_on=(chain[-1].id,)))
        return chain

    chain = at_once(desk, work)
    with pytest.raises(Conflict) as refused:
        desk.update(chain[0], depends_on=[chain[-1].id])
    assert refused.value.code == "dependency_cycle"
    ids = [task.id for task in (chain[0], *reversed(chain))]
    ends = f"{' -> '.join(ids[:10])} -> ({length - 19} more) -> {' -> '.join(ids[-10:])}"
    assert str(refused.value).endswith(ends)
    other = desk.make("other")
    assert desk.update(other, depends_on=[chain[-1].id]).status == "BLOCKED"


def test_a_thousand_that_wait_for_one_are_freed_at_its_end(desk: Desk) -> None:
    """With one event each."""
    first = desk.make("first")
    waiting = at_once(desk, lambda: [desk.make(str(n), depends_on=(first.id,)) for n in range(1_000)])
    (grant,) = desk.claim()
    desk.finish(grant)
    assert {desk.get(task).status for task in waiting} == {"TODO"}
    assert [desk.kinds(task) for task in waiting[::100]] == [["task_created", "task_unblocked"]] * 10
    assert desk.events(waiting[0])[-1].data["reason"] == f"{first.id} is DONE"
    assert desk.events(waiting[0])[-1].actor == "k-test"


def test_one_that_waits_for_a_thousand_is_freed_by_the_last(desk: Desk) -> None:
    """What it waits for is told by a few names, rewritten when those end and not at each end."""
    first = at_once(desk, lambda: [desk.make(str(n)) for n in range(MAX_DEPENDENCIES)])
    task = desk.make("last", depends_on=tuple(one.id for one in first))
    names = ", ".join(sorted(one.id for one in first)[-5:])
    assert task.condition == f"waits for {names} and others"
    with pytest.raises(Invalid, match=f"{MAX_DEPENDENCIES + 1} ids"):
        desk.make(depends_on=(*task.depends_on, task.id))

    def all_but_one() -> None:
        for _ in range(MAX_DEPENDENCIES - 1):
            desk.finish(desk.claim()[0])

    at_once(desk, all_but_one)
    blocked = desk.get(task)
    assert (blocked.status, blocked.condition) == ("BLOCKED", f"waits for {desk.claim()[0].task.id}")
    assert len(desk.kinds(task)) <= 12


def test_the_end_of_one_costs_the_same_statements_for_one_that_waits_and_for_many(tmp_path: Path) -> None:
    """And one statement when nobody waits."""
    desk = Desk(open_store(f"sqlite:///{tmp_path}/store.sqlite"))

    def cost(waiting: int) -> int:
        first = desk.make("first")
        at_once(desk, lambda: [desk.make(str(n), depends_on=(first.id,)) for n in range(waiting)])
        after = desk.cancel(first).task
        done = [(after, "k-test")]
        return statements(desk, lambda: desk.store.write_sync(lambda c: dependencies.follow_all(c, done, now_us=0)))

    assert cost(0) == 1
    assert cost(2) == cost(200)
    desk.store.close()


def test_several_that_end_together_free_what_waited_for_all_of_them(desk: Desk) -> None:
    """A diamond: two sides wait for the top, the foot for both sides; the sides end in one call."""
    top = desk.make("top")
    sides = [desk.make("side", depends_on=(top.id,)) for _ in range(2)]
    foot = desk.make("foot", depends_on=tuple(side.id for side in sides))
    desk.finish(desk.claim()[0])
    grants = desk.claim(limit=5)
    assert {grant.task.id for grant in grants} == {side.id for side in sides}
    at_once(desk, lambda: [desk.finish(grant) for grant in grants])
    assert desk.kinds(foot) == ["task_created", "task_blocked", "task_unblocked"]
    assert [grant.task.id for grant in desk.claim(limit=5)] == [foot.id]


def test_a_done_dependency_says_nothing_new_to_one_that_waits_for_a_cancelled_one(desk: Desk) -> None:
    """The sentence that asks for a person's decision stays."""
    first, second = desk.make("1"), desk.make("2")
    task = desk.make("3", depends_on=(first.id, second.id))
    desk.cancel(second)
    condition = desk.get(task).condition
    assert condition == f"waits for {second.id}, which was cancelled; unblock it, or cancel it too"
    desk.finish(desk.claim()[0])
    assert (desk.get(task).status, desk.get(task).condition) == ("BLOCKED", condition)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=30))
def test_an_edge_is_refused_exactly_when_it_closes_a_ring(desk: Desk, edges: list[tuple[int, int]]) -> None:
    """Against a search over all paths, on random graphs."""
    made = at_once(desk, lambda: [desk.make(str(n)) for n in range(8)])
    behind: dict[int, set[int]] = {n: set() for n in range(8)}

    def reaches(start: int, end: int) -> bool:
        seen, todo = set(), [start]
        while todo:
            todo += behind[one := todo.pop()] - seen
            seen |= behind[one]
        return end == start or end in seen

    for task, before in edges:
        wanted = [made[n].id for n in sorted(behind[task] | {before})]
        if reaches(before, task):
            with pytest.raises(Conflict, match=re.escape(f"{made[task].id} -> ")):
                desk.update(made[task], depends_on=wanted)
        else:
            desk.update(made[task], depends_on=wanted)
            behind[task].add(before)


def test_edits_at_the_same_moment_never_close_a_ring_together(desk: Desk) -> None:
    """Each edge of the ring is fine alone; one of them is refused, whoever is first."""
    for _ in range(many(desk, 3, 10)):
        ring = at_once(desk, lambda: [desk.make(str(n)) for n in range(4)])
        codes: list[str] = []
        ready = threading.Barrier(len(ring))

        def close(task: TaskRow, before: TaskRow, codes: list[str] = codes, ready: Any = ready) -> None:
            ready.wait()
            try:
                desk.update(task, depends_on=[before.id])
            except Conflict as refused:
                codes.append(refused.code)

        threads = [threading.Thread(target=close, args=(ring[n], ring[n - 1])) for n in range(len(ring))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == ["dependency_cycle"]
        assert sorted(desk.get(task).status for task in ring) == ["BLOCKED"] * 3 + ["TODO"]


def test_two_last_dependencies_that_end_at_the_same_moment_free_it_once(desk: Desk) -> None:
    """Neither end misses the other."""
    for _ in range(many(desk, 3, 20)):
        first = [desk.make(str(n)) for n in range(2)]
        task = desk.make("last", depends_on=tuple(one.id for one in first))
        grants = desk.claim(limit=2)
        threads = [threading.Thread(target=desk.finish, args=(grant,)) for grant in grants]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert desk.get(task).status == "TODO"
        assert desk.kinds(task).count("task_unblocked") == 1
        desk.cancel(task)


@pytest.mark.parametrize("statement", ["_WAITING", "_NEWEST_LEFT", "_NEWEST_CANCELLED", "behind"])
def test_the_graph_is_walked_by_its_indexes(desk: Desk, statement: str) -> None:
    """No table is read as a whole, however the planner sees it."""
    on_postgresql = desk.store.url.startswith("postgresql")
    asked = {"ended": ["a"], "ids": ["a"], "starts": ["a"], "sought": "b"}

    def plan(conn: Any) -> str:
        walk = dependencies._BEHIND.get(conn.dialect.name, dependencies._BEHIND[""]).has
        compiled = (walk if statement == "behind" else getattr(dependencies, statement))._for(conn)
        cursor = conn.connection.dbapi_connection.cursor()
        if on_postgresql:
            cursor.execute("SELECT set_config('enable_seqscan', 'off', true)")
        cursor.execute(("EXPLAIN " if on_postgresql else "EXPLAIN QUERY PLAN ") + compiled.text, compiled.bind(asked))
        return "\n".join(str(row[-1]) for row in cursor.fetchall())

    at_once(desk, lambda: [desk.make(str(n)) for n in range(20)])
    assert not re.search(r"(SCAN|Seq Scan on) (tasks|task_dependencies|before)\b", desk.store.write_sync(plan))
