"""The order in which tasks are claimed and listed, against a model; and who gets them when many ask at once."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter

import pytest
from desk import Desk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.line import AGING_US
from orchestrator_fleet.tasks.queries import SORTS, Filters
from orchestrator_fleet.tasks.task import PRIORITIES, TaskRow

HOURS = st.integers(min_value=0, max_value=100)
TASKS = st.lists(
    st.fixed_dictionaries(
        {
            "priority": st.sampled_from(PRIORITIES),
            "due_h": st.none() | HOURS,
            "available_h": st.none() | HOURS,
            "after_h": st.integers(min_value=0, max_value=30),
        }
    ),
    min_size=1,
    max_size=12,
)


def _model_key(task: TaskRow, now_us: int) -> tuple[int, float, int, str]:
    """The order as the contract says it, from nothing but the task's public fields."""
    since = max(task.created_at_us, task.available_at_us or 0)
    waited = max(0, now_us - since) // AGING_US
    rank = max(0, PRIORITIES.index(task.priority) - waited)
    return rank, task.due_at_us if task.due_at_us is not None else float("inf"), task.created_at_us, task.id


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(made=TASKS, later_h=st.lists(HOURS, min_size=1, max_size=4))
def test_claims_come_in_the_order_of_the_model(made: list[dict], later_h: list[int]) -> None:
    """Priority risen by waiting, due date, creation, id; never one whose time has not come."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"sqlite:///{folder}/store.sqlite")
        desk = Desk(store)
        waiting = []
        for one in made:
            desk.clock.advance(one["after_h"] * 3600)
            due, available = (
                None if one[name] is None else desk.now + one[name] * 3_600_000_000 for name in ("due_h", "available_h")
            )
            waiting.append(desk.make(priority=one["priority"], due_at_us=due, available_at_us=available))
        for hours in later_h:
            desk.clock.advance(hours * 3600)
            now = desk.now
            listed = [task.id for task in desk.page(limit=100, filters=Filters(status=("TODO",))).rows]
            ready = [task for task in waiting if (task.available_at_us or 0) <= now]
            expected = [task.id for task in sorted(ready, key=lambda task: _model_key(task, now))]
            asleep = {task.id for task in waiting} - set(expected)
            assert [task for task in listed if task not in asleep] == expected
            got = [grant.task.id for grant in desk.claim(limit=3)]
            assert got == expected[:3]
            waiting = [task for task in waiting if task.id not in got]
        store.close()


def test_low_is_not_starved_by_what_keeps_coming(desk: Desk) -> None:
    """After three days it is first of the first class that came later."""
    low = desk.make("low", priority="LOW")
    desk.clock.advance(3 * 86_400)
    desk.make("new", priority="CRITICAL")
    assert desk.claim()[0].task.id == low.id


def test_eight_threads_never_own_the_same_task(desk: Desk) -> None:
    """Each task once, none left."""
    total, owners, failures = 200, Counter(), []
    for n in range(total):
        desk.make(f"t{n}")
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait(30)
        try:
            while grants := desk.claim(limit=3):
                for grant in grants:
                    owners[grant.task.id] += 1
                    desk.finish(grant)
        except Exception as error:  # noqa: BLE001 (a thread's error must fail the test)
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(owners) == total
    assert set(owners.values()) == {1}
    assert desk.page(filters=Filters(status=("DONE",))).total == total


def test_the_session_limit_holds_when_many_ask_at_once(desk: Desk) -> None:
    """Never more than two run."""
    for _ in range(20):
        desk.make()
    grants: list[str] = []
    threads = [
        threading.Thread(target=lambda: grants.extend(g.token for g in desk.claim(limit=2, sessions_max=2)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(grants) == 2


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", SORTS)
def test_pages_show_every_row_once_while_others_write(desk: Desk, sort: str, *, descending: bool) -> None:
    """What was there at the first page and is not moved by its own change appears exactly once, in order."""
    for n in range(23):
        desk.clock.advance(n % 3)
        desk.make(f"t{n}", priority=PRIORITIES[n % 4], due_at_us=desk.now + n % 5 if n % 2 else None)
    there = {task.id for task in desk.page(limit=100).rows}
    seen, cursor, pages = [], None, 0
    while True:
        page = desk.page(sort=sort, descending=descending, cursor=cursor, limit=4)
        seen += page.rows
        pages += 1
        cursor = page.next_cursor
        if cursor is None:
            break
        desk.make(f"new{pages}", priority=PRIORITIES[pages % 4])
        desk.clock.advance(1)
    old = [task.id for task in seen if task.id in there]
    assert sorted(old) == sorted(there)
    assert len({task.id for task in seen}) == len(seen)


def test_pages_in_the_order_of_the_line_stay_whole_while_tasks_rise(desk: Desk) -> None:
    """The cursor carries the first page's time: a claim that lets ripe tasks rise in between moves nothing."""
    made = [desk.make(f"t{n}", priority=PRIORITIES[n % 4]) for n in range(12)]
    other = desk.make("other", orchestrator="vp-b")
    first = desk.page(limit=5)
    desk.clock.advance(2 * 86_400)
    assert desk.claim("vp-b")[0].task.id == other.id
    second = desk.page(limit=100, cursor=first.next_cursor)
    seen = [task.id for task in (*first.rows, *second.rows) if task.id != other.id]
    assert sorted(seen) == sorted(task.id for task in made)
    order = {PRIORITIES.index(task.priority) for task in first.rows}
    assert max(order) <= min(PRIORITIES.index(task.priority) for task in second.rows if task.id != other.id)


@pytest.mark.parametrize(
    ("filters", "titles"),
    [
        (Filters(status=("TODO",)), {"alpha", "beta 100%", "gamma"}),
        (Filters(status=("DONE", "CANCELLED")), {"ended"}),
        (Filters(priority=("HIGH", "LOW")), {"beta 100%"}),
        (Filters(orchestrator=("vp-b",)), {"gamma"}),
        (Filters(discipline=("sec",)), {"gamma"}),
        (Filters(tag=("x", "y")), {"alpha", "beta 100%"}),
        (Filters(tag=('"x"',)), set()),
        (Filters(q="ALPH"), {"alpha"}),
        (Filters(q="100%"), {"beta 100%"}),
        (Filters(q="_"), set()),
        (Filters(q="in the text"), {"gamma"}),
        (Filters(due_before_us=200), {"alpha"}),
        (Filters(due_after_us=150), {"beta 100%"}),
        (Filters(created_after_us=1 << 60), set()),
        (Filters(status=("TODO",), tag=("x",), q="alpha"), {"alpha"}),
    ],
    ids=range(15),
)
def test_filters_select_and_are_counted(desk: Desk, filters: Filters, titles: set[str]) -> None:
    """Several words in a field mean any; several fields mean all."""
    desk.finish(desk.run("ended"))
    desk.make("alpha", tags=("x",), due_at_us=100)
    desk.make("beta 100%", tags=("y",), due_at_us=200, priority="HIGH")
    desk.make("gamma", orchestrator=None, discipline="sec", description="Words IN THE TEXT")
    page = desk.page(filters=filters)
    assert {task.title for task in page.rows} == titles
    assert page.total == len(titles)


@pytest.mark.parametrize("cursor", ["", "x", "bm8", "W10", "é", "a" * 2000, "WyJjbGFpbSIsZmFsc2UsMSxbMSwyXV0"])
def test_a_cursor_that_is_none_of_ours_is_refused(desk: Desk, cursor: str) -> None:
    """An empty one is none; one of another sort is not of this list."""
    if not cursor:
        assert desk.page(cursor=cursor).total == 0
        return
    with pytest.raises(Invalid, match="next_cursor"):
        desk.page(cursor=cursor)


def test_a_cursor_of_another_sort_is_refused(desk: Desk) -> None:
    """Its key means something else there."""
    for _ in range(3):
        desk.make()
    cursor = desk.page(limit=1).next_cursor
    with pytest.raises(Invalid, match="same sort"):
        desk.page(limit=1, sort="priority", cursor=cursor)
    with pytest.raises(Invalid, match="same sort"):
        desk.page(limit=1, descending=True, cursor=cursor)


def test_a_place_in_line_is_how_many_come_first(desk: Desk) -> None:
    """None for what does not stand in it."""
    tasks = [desk.make(priority=priority) for priority in ("LOW", "HIGH", "MEDIUM")]
    ahead = [desk.store.read_sync(lambda c, t=task: life.ahead_in_line(c, t)) for task in tasks]
    assert ahead == [2, 0, 1]
    (grant,) = desk.claim()
    assert desk.store.read_sync(lambda c: life.ahead_in_line(c, grant.task)) is None


def test_counts_by_status(desk: Desk) -> None:
    """Of all, and of one."""
    desk.finish(desk.run())
    desk.make()
    desk.make(orchestrator="vp-b")
    assert desk.store.read_sync(life.count_by_status) == {"DONE": 1, "TODO": 2}
    assert desk.store.read_sync(lambda c: life.count_by_status(c, "vp-b")) == {"TODO": 1}


def test_tasks_of_the_same_microsecond_still_stand_in_one_order(desk: Desk) -> None:
    """By id."""
    made = [desk.make() for _ in range(5)]
    assert [g.task.id for g in desk.claim(limit=5)] == sorted(task.id for task in made)
