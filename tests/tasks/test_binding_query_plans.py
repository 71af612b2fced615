"""What is asked at each claim and end under rules is answered by indexes alone, on SQLite's planner."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asker import Asker, line, spec_of
from desk import Desk

from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import holds, limits
from orchestrator_fleet.wire.link import Usage

UNSAFE = re.compile(r"SCAN (tasks|attempts|limit_uses|holds|spending)\b(?!.*COVERING)|TEMP B-TREE|AUTOMATIC")
SPEC = spec_of(
    {
        "sessions": {"max": 5},
        "budget": {"usd_per_day": 1_000, "tokens_per_hour": 1_000_000},
        "schedule": {"timezone": "UTC", "hours": "00:00-24:00"},
    },
    machines={"m1": {"sessions": 9}},
    limits=[
        {"name": "per-repo", "key": "task.metadata.repo", "max_running": 1},
        {"name": "rate", "key": "task.metadata.api", "max_per_minute": 1},
    ],
)


@pytest.fixture
def asker(tmp_path: Path) -> Iterator[Asker]:
    """Under every kind of rule, with tasks that run, stand in line and are parked at both limits."""
    store = open_store(f"sqlite:///{tmp_path}/store.sqlite")
    desk = Desk(store)
    asker = Asker(desk, SPEC)
    for value in "xyz":
        line(desk, "r0", "r1", "r2", metadata={"repo": value})
        line(desk, "a0", "a1", "a2", metadata={"api": value})
    asker.ask(limit=3)
    yield asker
    store.close()


def finish_one(asker: Asker) -> None:
    """The end of an attempt that counts, and used something."""
    asker.desk.finish(asker.ask().grants[0], usage=Usage(usd=1.0))


HOT: dict[str, Callable[[Asker], Any]] = {
    "claim": lambda asker: asker.ask(limit=5),
    "claim that finds nothing": lambda asker: (asker.ask(limit=5), asker.ask(limit=5)),
    "end": finish_one,
    "look": lambda asker: asker.look(machine="m1"),
    "call up": lambda asker: asker.desk.store.write_sync(
        lambda c: limits.call_up(c, rules=asker.rules, now_us=asker.desk.now + 61_000_000)
    ),
    "forget": lambda asker: asker.desk.store.write_sync(lambda c: limits.forget(c, asker.desk.now + 10**9)),
    "holds end": lambda asker: asker.desk.store.write_sync(lambda c: holds.ended(c, asker.desk.now)),
}


@pytest.mark.parametrize("name", HOT)
def test_what_binds_is_read_by_index_alone(asker: Asker, name: str) -> None:
    """Nothing is walked that is not asked for: not the tasks, not the uses, not what was spent long ago."""
    raw = asker.desk.store._connection.connection.dbapi_connection
    seen: list[str] = []
    raw.set_trace_callback(seen.append)
    HOT[name](asker)
    raw.set_trace_callback(None)
    reads = [sql for sql in dict.fromkeys(seen) if re.match(r"SELECT|UPDATE|DELETE|WITH", sql)]
    assert reads

    def explain(conn: Any) -> dict[str, str]:
        plans = {sql: conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}") for sql in reads}
        return {sql: "\n".join(row[3] for row in plan) for sql, plan in plans.items()}

    plans = asker.desk.store.write_sync(explain)
    # Few rows are held at any time, so the one that ends first is found by looking at all of them.
    held = {sql: plan for sql, plan in plans.items() if "holds" in sql and "until_us <=" in sql}
    assert {sql: plan for sql, plan in plans.items() if UNSAFE.search(plan) and sql not in held} == {}


def test_each_key_is_found_by_one_probe_however_many_are_parked_at_it(asker: Asker) -> None:
    """The index is stepped over by its first column."""
    keys = "".join(str(limits._KEYS._core.compile(compile_kwargs={"literal_binds": True})).splitlines())
    plan = asker.desk.store.read_sync(
        lambda c: [row[3] for row in c.exec_driver_sql(f"EXPLAIN QUERY PLAN {keys}") if "tasks" in row[3]]
    )
    assert plan == [
        "SEARCH tasks USING COVERING INDEX ix_tasks_parked (parked_by>?)",
        "SEARCH tasks USING COVERING INDEX ix_tasks_parked (parked_by>?)",
    ]
