"""What every store promises, whichever database is under it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator_fleet.errors import Conflict, StoreError
from orchestrator_fleet.store import counters, outbox
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import counters as table

DEADLINE_S = 30.0
CALLERS = 100

pytestmark = pytest.mark.anyio


class _No(Exception):
    pass


def _put(n: int) -> Callable[[sa.Connection], None]:
    return lambda conn: counters.put(conn, f"n{n}", n)


def _all(conn: sa.Connection) -> dict[str, int]:
    return {row.name: row.value for row in conn.execute(sa.select(table))}


def _event(kind: str) -> Event:
    return Event(at_us=1, kind=kind, actor="k")


def _put_all(conn: sa.Connection, items: Sequence[tuple[str, int]]) -> list[int | Exception]:
    """A batched function: each number is put, a negative one is refused, 666 breaks everything."""
    answers: list[int | Exception] = []
    for name, value in items:
        if value < 0:
            answers.append(Conflict("negative", f"{name}: got {value}"))
            continue
        counters.put(conn, name, value)
        if value == 666:
            raise _No
        answers.append(len(items))
    return answers


def _held(store: Store) -> threading.Event:
    """Keep every writer of batches busy until the answered event is set, so that what comes meanwhile is one batch."""
    go = threading.Event()
    lanes = 1 if store.url.startswith("sqlite") else 2
    for _ in range(lanes):
        entered = threading.Event()

        def wait(_conn: sa.Connection, items: Sequence[Any], entered: threading.Event = entered) -> list[None]:
            entered.set()
            assert go.wait(DEADLINE_S)
            return [None for _ in items]

        threading.Thread(target=lambda: asyncio.run(store.write_batched(wait, None)), daemon=True).start()
        assert entered.wait(DEADLINE_S)
    return go


async def _together(store: Store, *items: tuple[str, int]) -> list[Any]:
    """What callers of `_put_all` get who wait at the same time."""
    go = _held(store)
    waiting = [asyncio.create_task(store.write_batched(_put_all, item)) for item in items]
    await asyncio.sleep(0)
    go.set()
    return await asyncio.gather(*waiting, return_exceptions=True)


async def test_callers_of_the_same_function_are_one_batch(store: Store) -> None:
    """A hundred that wait together share one call, and each gets its own answer."""
    answers = await _together(store, *((f"n{n}", n) for n in range(CALLERS)))
    assert max(answers) == CALLERS
    assert await store.read(_all) == {f"n{n}": n for n in range(CALLERS)}


async def test_who_is_refused_in_a_batch_is_refused_alone(store: Store) -> None:
    """The others' work stands, and they have done it once."""
    answers = await _together(store, ("a", 1), ("b", -1), ("c", 2))
    assert answers[0] == answers[2] == 3
    assert isinstance(answers[1], Conflict)
    assert await store.read(_all) == {"a": 1, "c": 2}


async def test_who_breaks_a_batch_is_undone_alone(store: Store) -> None:
    """What it raises is its own; the others are tried without it."""
    answers = await _together(store, ("a", 1), ("b", 666), ("c", 2))
    assert [type(one) for one in answers] == [int, _No, int]
    assert await store.read(_all) == {"a": 1, "c": 2}


async def test_a_batch_that_breaks_leaves_other_functions_alone(store: Store) -> None:
    """Two functions that wait at the same time do not hear of each other."""
    go = _held(store)

    def other(conn: sa.Connection, items: Sequence[str]) -> list[str]:
        for name in items:
            counters.put(conn, name, 7)
        return list(items)

    waiting = [
        asyncio.create_task(store.write_batched(_put_all, ("bad", 666))),
        asyncio.create_task(store.write_batched(other, "good")),
    ]
    await asyncio.sleep(0)
    go.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in answers] == [_No, str]
    assert await store.read(_all) == {"good": 7}


async def test_a_batched_write_after_the_end_is_refused(store: Store) -> None:
    """As any other."""
    assert await store.write_batched(_put_all, ("a", 1)) == 1
    store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.write_batched(_put_all, ("b", 1))


def test_an_event_of_what_was_undone_is_not_told(store: Store) -> None:
    """A savepoint that is rolled back to takes the events along that were appended after it."""

    def some(conn: sa.Connection) -> None:
        outbox.append(conn, _event("before"))
        for kind in ("kept", "undone"):
            savepoint = conn.begin_nested()
            outbox.append(conn, _event(kind))
            counters.put(conn, kind, 1)
            savepoint.commit() if kind == "kept" else savepoint.rollback()
        outbox.append(conn, _event("after"))

    store.write_sync(some)
    assert [event.kind for event in store.read_sync(lambda c: outbox.read_after(c, 0))] == ["before", "kept", "after"]
    assert store.read_sync(_all) == {"kept": 1}


def test_events_are_numbered_in_the_order_of_their_commits(store: Store) -> None:
    """A reader that follows the numbers, while many write, never meets one that comes late."""
    writers = [
        threading.Thread(target=lambda: [store.write_sync(lambda c: outbox.append(c, _event("k"))) for _ in range(40)])
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    seen: list[int] = []

    def follow(conn: sa.Connection) -> None:
        seen.extend(event.seq for event in outbox.read_after(conn, seen[-1] if seen else 0))

    while any(writer.is_alive() for writer in writers):
        store.read_sync(follow)
    store.read_sync(follow)
    assert len(seen) == 160
    assert seen == sorted(set(seen))


async def test_a_cancelled_caller_that_was_not_begun_is_not_run(store: Store) -> None:
    """A client that went away leaves no claim behind."""
    go = _held(store)
    waiting = asyncio.create_task(store.write_batched(_put_all, ("gone", 1)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    go.set()
    await store.write(lambda c: counters.put(c, "here", 1))
    assert await store.read(_all) == {"here": 1}


async def test_a_read_sees_one_snapshot(store: Store) -> None:
    """What is committed between two looks of one read is not in the second."""

    def look(conn: sa.Connection) -> tuple[dict[str, int], dict[str, int]]:
        first = _all(conn)
        store.write_sync(lambda c: counters.put(c, "new", 1))
        return first, _all(conn)

    assert await store.read(look) == ({}, {})
    assert await store.read(_all) == {"new": 1}


async def test_a_read_can_not_write(store: Store) -> None:
    """Only the write door writes."""
    with pytest.raises(StoreError, match=r"(?i)read-?only"):
        await store.read(lambda c: counters.put(c, "sly", 1))


def test_what_was_accepted_is_written_before_it_closes(store: Store, url: str) -> None:
    """And what comes after is refused."""
    threads = [threading.Thread(target=store.write_sync, args=(_put(n),)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.write_sync(_put(99))
    with pytest.raises(StoreError, match="closed"):
        store.read_sync(_all)
    again = open_store(url)
    assert len(again.read_sync(_all)) == 50
    again.close()


def test_kill_9_in_mid_writes_loses_nothing_that_was_answered(url: str, tmp_path: Path) -> None:
    """Every number the process printed after its answer is in the file."""
    writer = tmp_path / "writer.py"
    writer.write_text(
        textwrap.dedent("""
        import asyncio, os, sys
        from orchestrator_fleet.store import counters
        from orchestrator_fleet.store.database import open_store

        async def main():
            store = open_store(sys.argv[1])
            async def one(n):
                await store.write(lambda c: counters.put(c, f"n{n}", n))
                os.write(1, f"{n}\\n".encode())
            n = 0
            while True:
                await asyncio.gather(*(one(n + i) for i in range(20)))
                n += 20
        asyncio.run(main())
        """)
    )
    process = subprocess.Popen([sys.executable, str(writer), url], stdout=subprocess.PIPE)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(400)]
    process.send_signal(signal.SIGKILL)
    seen += process.stdout.readlines()
    process.wait(DEADLINE_S)
    acknowledged = {int(line) for line in seen if line.endswith(b"\n")}
    store = open_store(url)
    kept = set(store.read_sync(_all).values())
    store.close()
    assert len(acknowledged) >= 400
    assert acknowledged <= kept


def test_processes_that_open_a_new_file_at_once_all_succeed(url: str) -> None:
    """One makes the schema, the others find it made."""
    code = "import sys; from orchestrator_fleet.store.database import open_store; open_store(sys.argv[1]).close()"
    opening = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(4)]
    told = [process.communicate(timeout=DEADLINE_S)[1].decode() for process in opening]
    assert [process.returncode for process in opening] == [0] * 4, told


async def test_a_lone_caller_that_raises_leaves_nothing(store: Store) -> None:
    """A batch of one has no savepoint: its whole transaction is undone, and the next one works."""

    def fail(conn: sa.Connection) -> None:
        counters.put(conn, "bad", 1)
        raise _No

    with pytest.raises(_No):
        await store.write(fail)
    await store.write(lambda c: counters.put(c, "a", 1))
    assert await store.read(_all) == {"a": 1}


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "no url", ""])
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    """It says what was wanted."""
    with pytest.raises(StoreError, match=r"wanted (sqlite|sqlite:///PATH)"):
        open_store(url)


def test_a_wrong_url_is_shown_without_its_password() -> None:
    """A secret never stands in an error."""
    with pytest.raises(StoreError) as told:
        open_store("postgresql://me:hunter2@[half/db")
    assert "hunter2" not in str(told.value)


def test_opening_a_current_store_does_not_import_alembic(url: str) -> None:
    """Nor does making one: a quarter of a second is nothing to spend at each start."""
    code = (
        "import sys; from orchestrator_fleet.store.database import open_store\n"
        "for _ in range(2): open_store(sys.argv[1]).close()\n"
        "print('alembic' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "False"


def test_a_lone_write_waits_for_nobody(store: Store) -> None:
    """No batching delay: a write alone takes a commit's time."""
    store.write_sync(_put(0))
    took = []
    for n in range(20):
        begin = time.perf_counter()
        store.write_sync(_put(n))
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.02
