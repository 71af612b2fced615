"""SQLite's own: group commit, the file and its faults. What both kinds promise is in test_store."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import counters
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.schema import counters as table
from orchestrator_fleet.store.schema import events

DEADLINE_S = 30.0

pytestmark = pytest.mark.anyio


@pytest.fixture
def backend() -> str:
    return "sqlite"


class _No(Exception):
    pass


def _held(store: Store) -> threading.Event:
    """Keep the writer busy until the answered event is set, so that what comes meanwhile is one batch."""
    entered, go = threading.Event(), threading.Event()

    def wait(_conn: sa.Connection) -> None:
        entered.set()
        assert go.wait(DEADLINE_S)

    threading.Thread(target=store.write_sync, args=(wait,), daemon=True).start()
    assert entered.wait(DEADLINE_S)
    return go


def _commits(store: Store) -> list[str]:
    """Every COMMIT that the writer's connection makes from now on."""
    seen: list[str] = []
    raw = store._connection.connection.dbapi_connection
    raw.set_trace_callback(lambda sql: seen.append(sql) if sql == "COMMIT" else None)
    return seen


async def test_many_callers_share_one_commit(store: Store) -> None:
    """A hundred writes that wait together are one transaction."""
    go = _held(store)
    commits = _commits(store)
    waiting = [asyncio.create_task(store.write(lambda c, n=n: counters.put(c, f"n{n}", n))) for n in range(100)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*waiting)
    assert len(commits) <= 3  # the holder's own, the batch, and one more if the batch took its time
    assert await store.read(lambda c: c.execute(sa.select(sa.func.count()).select_from(table)).scalar()) == 100


async def test_a_caller_that_raises_undoes_its_own_work_alone(store: Store) -> None:
    """Its neighbours in the batch are kept; it gets its own exception."""
    go = _held(store)

    def fail(conn: sa.Connection) -> None:
        counters.put(conn, "bad", 1)
        raise _No

    def violate(conn: sa.Connection) -> None:
        counters.put(conn, "worse", 1)
        conn.execute(table.insert(), {"name": None, "value": 1})

    calls = [lambda c: counters.put(c, "a", 1), fail, lambda c: counters.put(c, "b", 2), violate]
    waiting = [asyncio.create_task(store.write(call)) for call in calls]
    await asyncio.sleep(0)
    go.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in answers] == [type(None), _No, type(None), sa.exc.IntegrityError]
    assert await store.read(_all) == {"a": 1, "b": 2}


async def test_when_the_database_undoes_a_transaction_nobody_in_it_is_answered_well(store: Store) -> None:
    """SQLite may roll back by itself; then every caller of the batch hears so, and the store goes on."""
    go = _held(store)

    def lose_all(conn: sa.Connection) -> None:
        conn.connection.dbapi_connection.rollback()

    calls = [lambda c: counters.put(c, "before", 1), lose_all, lambda c: counters.put(c, "after", 1)]
    waiting = [asyncio.create_task(store.write(call)) for call in calls]
    await asyncio.sleep(0)
    go.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in answers] == [StoreError, StoreError, type(None)]
    assert await store.read(_all) == {"after": 1}


def test_too_many_waiting_writers_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue has an end."""
    monkeypatch.setattr("orchestrator_fleet.store.sqlite.MAX_WAITING", 0)
    with pytest.raises(StoreError, match="try again in a moment"):
        store.write_sync(_put(1))


def test_two_processes_write_the_same_file(store: Store) -> None:
    """Another process's transaction is waited for."""
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    done = threading.Event()
    thread = threading.Thread(target=lambda: (store.write_sync(_put(1)), done.set()))
    thread.start()
    assert not done.wait(0.1)
    other.execute("COMMIT")
    other.close()
    assert done.wait(DEADLINE_S)
    thread.join(DEADLINE_S)


def test_the_file_is_its_owners_alone_and_its_folder_is_made(tmp_path: Path) -> None:
    """Tasks may hold what is nobody else's business."""
    store = open_store(f"sqlite:///{tmp_path}/a/b/store.sqlite")
    assert (tmp_path / "a/b/store.sqlite").stat().st_mode & 0o777 == 0o600
    store.close()


def test_it_writes_durably_ahead_and_checks_foreign_keys(store: Store) -> None:
    """The pragmas that the promises rest on."""
    pragmas = ("journal_mode", "synchronous", "foreign_keys")
    got = [store.write_sync(lambda c, p=p: c.exec_driver_sql(f"PRAGMA {p}").scalar()) for p in pragmas]
    assert got == ["wal", 2, 1]


def test_what_is_not_a_database_is_refused_with_the_cure(tmp_path: Path) -> None:
    """And left as it is."""
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"hello, I am a text file\n" * 100)
    with pytest.raises(StoreError, match=r"not a database.*move it away"):
        open_store(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"hello")


def test_a_damaged_file_is_refused_with_the_cure(url: str, tmp_path: Path) -> None:
    """Pages overwritten with rubbish are not worked on."""
    open_store(url).close()
    path = tmp_path / "store.sqlite"
    data = bytearray(path.read_bytes())
    data[100:8192] = os.urandom(8092)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"(malformed|corrupt|not a database).*move it away"):
        open_store(url)


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    """The path is in the text."""
    (tmp_path / "store.sqlite").mkdir()
    with pytest.raises(StoreError, match=r"store\.sqlite.*directory"):
        open_store(f"sqlite:///{tmp_path}/store.sqlite")


def test_a_full_disk_fails_the_writer_and_keeps_what_stands(store: Store) -> None:
    """The file may grow no more; what was there is there, and writing works again when there is room."""
    store.write_sync(_put(1))
    store.write_sync(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 60"))
    big = {"at_us": 1, "kind": "k", "actor": "a", "data": {"text": "x" * 1_000_000}}
    with pytest.raises(StoreError, match=r"full.*make room"):
        store.write_sync(lambda c: c.execute(events.insert(), big))
    store.write_sync(lambda c: c.exec_driver_sql("PRAGMA max_page_count = 1000000"))
    store.write_sync(lambda c: c.execute(events.insert(), big))
    assert store.read_sync(_all) == {"n1": 1}


def _put(n: int):
    return lambda conn: counters.put(conn, f"n{n}", n)


def _all(conn: sa.Connection) -> dict[str, int]:
    return {row.name: row.value for row in conn.execute(sa.select(table))}


def test_a_store_that_was_taken_away_is_told_and_comes_back(store: Store, tmp_path: Path) -> None:
    """Nothing is written where nobody would find it again; no empty one is made in its place."""
    store.write_sync(_put(1))
    there, away = tmp_path / "store.sqlite", tmp_path / "away"
    there.rename(away)
    for use in (store.write_sync, store.read_sync):
        with pytest.raises(StoreError, match="deleted or replaced while in use; put it back"):
            use(_all)
    assert not there.exists()
    there.write_bytes(b"somebody else's")
    with pytest.raises(StoreError, match="deleted or replaced"):
        store.write_sync(_put(2))
    away.replace(there)
    store.write_sync(_put(3))
    assert store.read_sync(_all) == {"n1": 1, "n3": 3}
