"""The hot statements are answered by their indexes: no scan of the table, no sorting."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from desk import Desk, held

from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.queries import Filters

UNSAFE = re.compile(r"SCAN (tasks|attempts|events|task_dependencies|attempt_log)(?! USING)|TEMP B-TREE|AUTOMATIC")


@pytest.fixture
def backend() -> str:
    return "sqlite"  # the plans are SQLite's


@contextmanager
def _statements(desk: Desk) -> Iterator[list[str]]:
    """The statements that the writer runs, with their values in place."""
    raw = desk.store._connection.connection.dbapi_connection
    seen: list[str] = []
    raw.set_trace_callback(seen.append)
    yield seen
    raw.set_trace_callback(None)


def _plans(desk: Desk, statements: list[str]) -> dict[str, str]:
    """Statement -> its plan, for those that read."""

    def explain(conn: Any) -> dict[str, str]:
        return {
            sql: "\n".join(row[3] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}"))
            for sql in statements
            if re.match(r"SELECT|UPDATE|DELETE", sql)
        }

    return desk.store.write_sync(explain)


HOT: dict[str, Callable[[Desk], Any]] = {
    "create": lambda desk: (desk.clock.advance(2), desk.make(orchestrator=None, discipline="sec")),
    "create with dependencies": lambda desk: desk.make(depends_on=tuple(t.id for t in desk.page(limit=3).rows)),
    "claim": lambda desk: desk.claim(sessions_max=5),
    "beat": lambda desk: desk.beat(held(desk.claim()[0])),
    "done": lambda desk: desk.finish(desk.claim()[0]),
    "failed": lambda desk: desk.finish(desk.claim()[0], "failed"),
    "expire": lambda desk: (desk.claim(), desk.clock.advance(31), desk.expire()),
    "hello": lambda desk: (desk.claim(), desk.hello()),
    "log": lambda desk: desk.log(desk.claim()[0], "x"),
    "cancel": lambda desk: desk.cancel(desk.make()),
    "wait": lambda desk: desk.store.write_sync(lambda c: (life.next_lease_expiry(c), life.next_available(c, "vp-a"))),
}


@pytest.mark.parametrize("name", HOT)
def test_a_hot_write_reads_by_index_alone(desk: Desk, name: str) -> None:
    """With rows of every status in the table, as the planner sees it without statistics."""
    for n in range(5):
        desk.make(f"t{n}")
    with _statements(desk) as seen:
        HOT[name](desk)
    plans = _plans(desk, seen)
    assert plans
    bad = {sql: plan for sql, plan in plans.items() if UNSAFE.search(plan)}
    assert bad == {}


def test_a_claim_walks_the_line_itself(desk: Desk) -> None:
    """The partial index is the order: nothing is sorted, nothing is looked at that is not claimable."""
    desk.make()
    with _statements(desk) as seen:
        desk.claim()
    plans = _plans(desk, seen)
    line = next(plan for sql, plan in plans.items() if "ORDER BY tasks.rank" in sql)
    assert line == "SEARCH tasks USING INDEX ix_tasks_claim (orchestrator=?)"
    ripe = next(plan for sql, plan in plans.items() if "tasks.ripens_at_us <=" in sql)
    assert ripe == "SEARCH tasks USING INDEX ix_tasks_ripens (ripens_at_us<?)"


@pytest.mark.parametrize(
    ("asked", "index"), [({}, "ix_tasks_line"), ({"sort": "created_at"}, "ix_tasks_created")], ids=str
)
def test_a_page_of_the_list_is_walked_and_not_sorted(desk: Desk, asked: dict[str, Any], index: str) -> None:
    """The first page, and one in the middle."""
    for n in range(5):
        desk.make(f"t{n}")
    cursor = desk.page(**asked, limit=1).next_cursor
    for where in ({}, {"cursor": cursor}):
        with _statements(desk) as seen:
            desk.store.write_sync(
                lambda c, w=where: life.list_tasks(c, filters=Filters(), now_us=desk.now, limit=2, **asked, **w)
            )
        plans = _plans(desk, seen)
        page = next(plan for sql, plan in plans.items() if "ORDER BY" in sql)
        assert index in page
        assert "TEMP B-TREE" not in page
