"""PostgreSQL's own: lost connections, a server that goes and comes, locks, and what it says when it can't."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from postgres_server import PostgresServer

from orchestrator_fleet.errors import StoreDamaged, StoreError, StoreFull
from orchestrator_fleet.store import counters, locks, outbox, postgres
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import counters as table

DEADLINE_S = 30.0
EVENT = Event(at_us=1, kind="k", actor="k")

pytestmark = pytest.mark.anyio


@pytest.fixture
def backend() -> str:
    return "postgresql"


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop and break."""
    server = PostgresServer()
    yield server
    server.close()


def _put(n: int) -> Callable[[sa.Connection], None]:
    return lambda conn: counters.put(conn, f"n{n}", n)


def _all(conn: sa.Connection) -> dict[str, int]:
    return {row.name: row.value for row in conn.execute(sa.select(table))}


def _put_all(conn: sa.Connection, items: list[int]) -> list[None]:
    return [counters.put(conn, f"n{n}", n) for n in items]


def _kill_connections(url: str) -> int:
    """End every connection to the database but this one; how many there were."""
    with psycopg.connect(url, autocommit=True) as raw:
        ended = raw.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchone()
        assert ended is not None
        return ended[0]


async def test_connections_that_were_ended_are_made_anew(store: Store, url: str) -> None:
    """No caller hears of it, whichever door it came by."""
    await asyncio.gather(store.write(_put(1)), store.write_batched(_put_all, 2), store.read(_all))
    assert _kill_connections(url) >= 3
    await asyncio.gather(store.write(_put(3)), store.write_batched(_put_all, 4))
    assert await store.read(_all) == {"n1": 1, "n2": 2, "n3": 3, "n4": 4}


async def test_a_connection_lost_before_its_commit_is_tried_again(store: Store, url: str) -> None:
    """What was done on it is undone by PostgreSQL; it is done once in the end."""
    runs = []

    def add(conn: sa.Connection) -> None:
        runs.append(1)
        counters.put(conn, "n", counters.get(conn, "n") + 1)
        if len(runs) == 1:
            _kill_connections(url)
        counters.put(conn, "m", 1)

    await store.write(add)
    assert len(runs) == 2
    assert await store.read(_all) == {"n": 1, "m": 1}


async def test_a_connection_lost_in_its_commit_is_not_tried_again(store: Store, monkeypatch: Any) -> None:
    """It may stand: doing it again might do it twice, so the caller is told and decides."""
    commit, runs = sa.Connection.commit, []

    def lose(conn: sa.Connection) -> None:
        commit(conn)
        conn.connection.dbapi_connection.close()
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    def add(conn: sa.Connection) -> None:
        runs.append(1)
        counters.put(conn, "n", counters.get(conn, "n") + 1)

    monkeypatch.setattr(sa.Connection, "commit", lose)
    with pytest.raises(StoreError, match="may stand or not: look before asking again"):
        await store.write(add)
    monkeypatch.undo()
    assert len(runs) == 1
    assert await store.read(_all) == {"n": 1}


async def test_a_restart_of_postgresql_is_waited_for(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers who come meanwhile get their answer when it is back."""
    monkeypatch.setattr(postgres, "RECONNECT_S", DEADLINE_S)
    with closing(open_store(own_server.url("template"))) as store:
        await store.write(_put(1))
        own_server.stop()
        waiting = asyncio.gather(store.write(_put(2)), store.write_batched(_put_all, 3), store.read(lambda _: "read"))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(own_server.start)
        assert await waiting == [None, None, "read"]
        assert await store.read(_all) == {"n1": 1, "n2": 2, "n3": 3}


async def test_callers_are_told_when_postgresql_stays_away_and_it_works_again_when_it_is_back(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and with the cure; after the first who waited, at once."""
    monkeypatch.setattr(postgres, "RECONNECT_S", 0.3)
    with closing(open_store(own_server.url("template"))) as store:
        await store.write(_put(1))
        own_server.stop(signal.SIGQUIT)
        for use in (store.write, store.read):
            with pytest.raises(StoreError, match=r"check that PostgreSQL runs there"):
                await use(_all)
        began = time.monotonic()
        with pytest.raises(StoreError):
            await store.write_batched(_put_all, 2)
        assert time.monotonic() - began < 0.3
        own_server.start()
        await store.write_batched(_put_all, 3)
        assert await store.read(_all) == {"n1": 1, "n3": 3}


def test_what_was_answered_survives_a_crash_of_postgresql(own_server: PostgresServer) -> None:
    """Every number that was printed after its answer is there when it has recovered."""
    code = (
        "import asyncio, os, sys\n"
        "from orchestrator_fleet.store import counters\n"
        "from orchestrator_fleet.store.database import open_store\n"
        "def put(conn, items): return [counters.put(conn, f'n{n}', n) for n in items]\n"
        "async def main():\n"
        "    store = open_store(sys.argv[1])\n"
        "    async def one(n):\n"
        "        await store.write_batched(put, n)\n"
        "        os.write(1, f'{n}\\n'.encode())\n"
        "    for n in range(0, 10**9, 20):\n"
        "        await asyncio.gather(*(one(n + i) for i in range(20)))\n"
        "asyncio.run(main())\n"
    )
    url = own_server.url("template")
    process = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(400)]
    own_server.stop(signal.SIGQUIT)
    process.kill()
    seen += process.stdout.readlines()
    process.wait(DEADLINE_S)
    own_server.start()
    with closing(open_store(url)) as store:
        kept = set(store.read_sync(_all).values())
    acknowledged = {int(line) for line in seen if line.endswith(b"\n")}
    assert len(acknowledged) >= 400
    assert acknowledged <= kept


async def test_another_process_is_heard_in_milliseconds_and_ourselves_not_at_all(store: Store, url: str) -> None:
    """A commit with an event wakes every other store on the database."""
    heard = threading.Event()
    store.listen(heard.set)
    assert await asyncio.to_thread(heard.wait, DEADLINE_S)  # the news that it listens now
    with closing(open_store(url)) as other:
        await other.write(_all)
        took = []
        for _ in range(5):
            heard.clear()
            began = time.perf_counter()
            await other.write(lambda c: outbox.append(c, EVENT))
            assert await asyncio.to_thread(heard.wait, DEADLINE_S)
            took.append(time.perf_counter() - began)
        assert min(took) < 0.1
        heard.clear()
        await store.write(lambda c: outbox.append(c, EVENT))
        await store.write_batched(_append_all, 1)
        assert not heard.wait(0.1)


def _append_all(conn: sa.Connection, items: list[int]) -> list[None]:
    return [outbox.append(conn, EVENT) for _ in items]


async def test_who_listens_listens_again_after_a_lost_connection(store: Store, url: str) -> None:
    """And is told at once, for what may have been missed."""
    heard = threading.Event()
    store.listen(heard.set)
    assert heard.wait(DEADLINE_S)
    heard.clear()
    _kill_connections(url)
    assert await asyncio.to_thread(heard.wait, DEADLINE_S)
    heard.clear()
    with closing(open_store(url)) as other:
        await other.write(lambda c: outbox.append(c, EVENT))
    assert await asyncio.to_thread(heard.wait, DEADLINE_S)


async def test_of_two_that_wait_for_each_other_both_are_done(store: Store) -> None:
    """PostgreSQL ends one of them, and it is run again."""
    await store.write(lambda c: (counters.put(c, "a", 0), counters.put(c, "b", 0)))
    met = threading.Barrier(2)

    def add(first: str, second: str) -> Callable[[sa.Connection], None]:
        def run(conn: sa.Connection) -> None:
            for name in (first, second):
                conn.execute(table.update().where(table.c.name == name).values(value=table.c.value + 1))
                with suppress(threading.BrokenBarrierError):
                    met.wait(2)

        return run

    await asyncio.gather(store.write(add("a", "b")), store.write(add("b", "a")))
    assert await store.read(_all) == {"a": 2, "b": 2}


async def test_a_lock_is_held_until_the_transaction_ends_and_waited_for_within_bounds(store: Store, url: str) -> None:
    """Two names are two locks."""
    with psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s::bigint)", [locks.key("one")])
        await store.write(lambda c: locks.hold(c, "two", "three"))
        waiting = asyncio.create_task(store.write(lambda c: locks.hold(c, "two", "one")))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        other.commit()
        await waiting
        other.execute("SELECT pg_advisory_xact_lock(%s::bigint)", [locks.key("one")])
        with pytest.raises(StoreError, match="has kept it locked"):
            await store.write(lambda c: (c.exec_driver_sql("SET LOCAL lock_timeout = 50"), locks.hold(c, "one")))


@pytest.mark.parametrize(
    ("sqlstate", "kind", "cure"),
    [
        ("53100", StoreFull, "make room"),
        ("53300", StoreError, "raise its max_connections"),
        ("53200", StoreError, "short of resources"),
        ("25006", StoreError, "name the primary"),
        ("28P01", StoreError, "check user and password"),
        ("3D000", StoreError, "createdb"),
        ("42501", StoreError, "make it the owner"),
        ("57014", StoreError, "pg_stat_activity"),
        ("57P03", StoreError, "try again in a moment"),
        ("58030", StoreError, "disk of PostgreSQL gives errors"),
        ("XX001", StoreDamaged, "fleet store restore"),
        ("XX002", StoreDamaged, "REINDEX"),
    ],
)
async def test_each_fault_of_the_database_has_its_cure(
    store: Store, sqlstate: str, kind: type[StoreError], cure: str
) -> None:
    """PostgreSQL itself raises it here; what was done beside it is undone, and the next write works."""

    def fault(conn: sa.Connection) -> None:
        counters.put(conn, "gone", 1)
        conn.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$")

    with pytest.raises(StoreError, match=cure) as told:
        await store.write(fault)
    assert type(told.value) is kind
    await store.write(_put(1))
    assert await store.read(_all) == {"n1": 1}


@pytest.mark.parametrize("sqlstate", ["23505", "22003", "42P01", "P0001"])
async def test_a_fault_of_the_callers_statement_is_the_callers(store: Store, sqlstate: str) -> None:
    """It reaches the caller as it is."""
    with pytest.raises(sa.exc.DBAPIError):
        await store.write(lambda c: c.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$"))


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"port": "1"}, "check that PostgreSQL runs there"),
        ({"host": "/nowhere"}, "check that PostgreSQL runs there"),
        ({"database": "nobodys"}, "createdb"),
        ({"username": "nobody-we-know"}, "createuser"),
    ],
    ids=str,
)
def test_a_server_that_does_not_let_us_in_is_told_with_the_cure(url: str, change: dict[str, str], cure: str) -> None:
    """At once, and without the password."""
    at = sa.make_url(url).set(password="hunter2")
    query = {name: value for name, value in change.items() if name in ("host", "port")}
    at = at.update_query_dict(query).set(**{name: value for name, value in change.items() if name not in query})
    with pytest.raises(StoreError, match=cure) as told:
        open_store(at.render_as_string(hide_password=False))
    assert "hunter2" not in str(told.value)


def test_a_database_of_another_encoding_is_refused(postgres_server: PostgresServer) -> None:
    """Texts would not come back as they were."""
    postgres_server._sql("CREATE DATABASE latin ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match=r"encoding is SQL_ASCII, wanted UTF8"):
        open_store(postgres_server.url("latin"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_fails_the_writer_and_keeps_what_stands(
    store: Store, url: str, postgres_server: PostgresServer
) -> None:
    """It says so in a kind of its own; reading goes on, and writing too when there is room."""
    small = postgres_server.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(small)], check=True)
    try:
        place = small / "tablespace"
        place.mkdir()
        postgres_server.own(place)
        with psycopg.connect(url, autocommit=True) as raw:
            raw.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
            raw.execute("ALTER TABLE events SET TABLESPACE small")
        store.write_sync(_put(1))
        big = Event(at_us=1, kind="k", actor="k", data={"text": os.urandom(400_000).hex()})

        def fill() -> None:
            for _ in range(20):
                store.write_sync(lambda c: (outbox.append(c, big), counters.put(c, "n2", counters.get(c, "n2") + 1)))

        with pytest.raises(StoreFull, match="make room"):
            fill()
        kept = store.read_sync(_all)
        assert len(store.read_sync(lambda c: outbox.read_after(c, 0))) == kept["n2"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        store.write_sync(lambda c: outbox.append(c, big))
    finally:
        store.close()
        with psycopg.connect(url, autocommit=True) as raw:
            raw.execute("ALTER TABLE events SET TABLESPACE pg_default")
            raw.execute("DROP TABLESPACE small")
        subprocess.run(["umount", str(small)], check=True)


async def test_what_one_round_does_comes_in_one_order_whoever_asked_first(store: Store) -> None:
    """Two lanes that lock the same in another order each would wait for each other in a circle."""
    go, entered = threading.Event(), [threading.Event() for _ in range(postgres.LANES)]
    done: list[str] = []

    def wait(_conn: sa.Connection, items: list[int]) -> list[None]:
        for item in items:
            entered[item].set()
        assert go.wait(DEADLINE_S)
        return [None for _ in items]

    def claim(_conn: sa.Connection, items: list[int]) -> list[None]:
        return [done.append("claim") for _ in items]

    def finish(_conn: sa.Connection, items: list[int]) -> list[None]:
        return [done.append("finish") for _ in items]

    waiting = []
    for item, one in enumerate(entered):
        waiting.append(asyncio.create_task(store.write_batched(wait, item)))
        await asyncio.to_thread(one.wait, DEADLINE_S)
    waiting += [asyncio.create_task(store.write_batched(fn, 0)) for fn in (finish, claim)]
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*waiting)
    assert done == ["claim", "finish"]
