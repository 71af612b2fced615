"""A store with a long past, for `scripts/bench queue`: made in SQL, as the door takes minutes for a million."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

from bench_queue_ours import LINES

from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import attempts, events, tasks
from orchestrator_fleet.tasks.line import AGING_US, NO_DUE_US

FINISHED_EVERY_US = 7_000_000  # a million in eighty days
WAITING_EVERY_US = 10_000
RAN_US = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """How much a store holds."""

    finished: int
    waiting: int

    def __str__(self) -> str:
        return f"{self.finished:,} finished, {self.waiting:,} waiting"


def fill(file: Path, past: Past, lines: tuple[str, ...] = LINES) -> None:
    """Make a store with tasks, attempts and events as they would stand there, evenly over the lines."""
    open_store(f"sqlite:///{file}").close()
    connection = sqlite3.connect(file, isolation_level=None)
    now_us = time.time_ns() // 1000
    connection.execute("pragma synchronous = off")
    connection.execute("create temp table line(number integer primary key, name text)")
    connection.executemany("insert into line values (?, ?)", list(enumerate(lines)))
    connection.execute("begin")
    _finished(connection, past.finished, now_us, len(lines))
    _waiting(connection, past.waiting, now_us, len(lines))
    connection.execute("commit")
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.execute("pragma optimize")
    connection.close()


def _finished(connection: sqlite3.Connection, count: int, now_us: int, lines: int) -> None:
    begun = f"({now_us} - {WAITING_EVERY_US * 1_000_000} - ({count} - n) * {FINISHED_EVERY_US})"
    task = _row(
        id="'task-00d' || printf('%023d', n)",
        status="'DONE'",
        attempt="1",
        created_at_us=begun,
        updated_at_us=f"{begun} + {RAN_US}",
        started_at_us=begun,
        completed_at_us=f"{begun} + {RAN_US}",
        result='\'{"headline": "done"}\'',
        version="3",
        generation="'g1'",
        charter_version="'c1'",
        machine="'m01'",
        waiting_since_us=begun,
        ripens_at_us="NULL",
    )
    attempt = {
        "task": "'task-00d' || printf('%023d', n)",
        "attempt": "1",
        "token": "lower(hex(randomblob(16)))",
        "orchestrator": "name",
        "machine": "'m01'",
        "holder": "'boot/epoch'",
        "generation": "'g1'",
        "charter_version": "'c1'",
        "started_at_us": begun,
        "ended_at_us": f"{begun} + {RAN_US}",
        "outcome": "'done'",
        "answer": "'DONE'",
        "exit_code": "0",
    }
    _insert(connection, tasks.name, task, count, lines)
    _insert(connection, attempts.name, attempt, count, lines)
    for kind, status, at in (("created", "TODO", "0"), ("claimed", "IN_PROGRESS", "0"), ("done", "DONE", RAN_US)):
        event = _event("task-00d", kind=f"task_{kind}", status=status, at_us=f"{begun} + {at}")
        _insert(connection, events.name, event, count, lines)


def _waiting(connection: sqlite3.Connection, count: int, now_us: int, lines: int) -> None:
    since = f"({now_us} - ({count} - n) * {WAITING_EVERY_US})"
    task = _row(
        id="'task-00w' || printf('%023d', n)",
        status="'TODO'",
        attempt="0",
        created_at_us=since,
        updated_at_us=since,
        started_at_us="NULL",
        completed_at_us="NULL",
        result="NULL",
        version="1",
        generation="NULL",
        charter_version="NULL",
        machine="NULL",
        waiting_since_us=since,
        ripens_at_us=f"{since} + {AGING_US}",
    )
    _insert(connection, tasks.name, task, count, lines)
    event = _event("task-00w", kind="task_created", status="TODO", at_us=since)
    _insert(connection, events.name, event, count, lines)


def _row(**more: str) -> dict[str, str]:
    return {
        "title": "'task ' || n",
        "description": "'what is to be done in the task of that number'",
        "priority": "'MEDIUM'",
        "orchestrator": "name",
        "discipline": "'bench'",
        "tags": "'[]'",
        "depends_on": "'[]'",
        "metadata": "'{}'",
        "route": "'rest'",
        "failures": "0",
        "max_attempts": "3",
        "created_by": "'k-bench'",
        "rank": "2",
        "due_key_us": str(NO_DUE_US),
        **more,
    }


def _event(prefix: str, *, kind: str, status: str, at_us: str) -> dict[str, str]:
    return {
        "at_us": at_us,
        "kind": f"'{kind}'",
        "task": f"'{prefix}' || printf('%023d', n)",
        "orchestrator": "name",
        "actor": "'k-bench'",
        "data": f'\'{{"task": {{"status": "{status}", "priority": "MEDIUM"}}}}\'',
    }


def _insert(connection: sqlite3.Connection, table: str, values: dict[str, str], count: int, lines: int) -> None:
    connection.execute(
        f"with recursive number(n) as (select 1 union all select n + 1 from number where n < {count})"  # noqa: S608 (made of the constants above)
        f" insert into {table} ({', '.join(values)}) select {', '.join(values.values())}"
        f" from number join line on line.number = n % {lines} where {count} > 0"
    )
