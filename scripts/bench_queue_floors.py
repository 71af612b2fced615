"""What SQLite itself does at synchronous=FULL, for `scripts/bench queue`: one small table, no rules, one connection."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

GROUP = 64
_TABLE = "create table task(id integer primary key, status int not null default 0, agent text, at real, done real)"
_INDEX = "create index task_waiting on task(id) where status = 0"
_PUT = "insert into task(agent, at) values (?, ?)"
_CLAIM = (
    "update task set status = 1, at = ? where id = (select id from task where status = 0 order by id limit 1)"
    " returning id"
)
_DONE = "update task set status = 2, done = ? where id = ?"


def put_alone(file: Path, count: int) -> float:
    """Rows a second, a commit each."""
    connection = _opened(file)
    begun = time.perf_counter()
    for number in range(count):
        connection.execute(_PUT, ("a", float(number)))
    return count / (time.perf_counter() - begun)


def put_together(file: Path, count: int) -> float:
    """Rows a second, GROUP to a commit."""
    connection = _opened(file)
    begun = time.perf_counter()
    for _ in range(count // GROUP):
        with _transaction(connection):
            connection.executemany(_PUT, [("a", 0.0)] * GROUP)
    return count // GROUP * GROUP / (time.perf_counter() - begun)


def claim_and_finish(file: Path, count: int) -> float:
    """Tasks a second with two commits each: what any queue that loses nothing does for a single worker."""
    connection = _opened(file)
    with _transaction(connection):
        connection.executemany(_PUT, [("a", 0.0)] * count)
    plan = " ".join(str(row) for row in connection.execute(f"explain query plan {_CLAIM}", (0.0,)))
    if "task_waiting" not in plan:
        raise SystemExit(f"bench: the floor's claim does not use its index: {plan}")
    begun = time.perf_counter()
    for _ in range(count):
        (number,) = connection.execute(_CLAIM, (0.0,)).fetchone()
        connection.execute(_DONE, (0.0, number))
    return count / (time.perf_counter() - begun)


class _transaction:  # noqa: N801 (reads as the statement that it is)
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("begin immediate")

    def __exit__(self, *_: object) -> None:
        self._connection.execute("commit")


def _opened(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None)
    for statement in ("pragma journal_mode = wal", "pragma synchronous = full", _TABLE, _INDEX):
        connection.execute(statement)
    return connection
