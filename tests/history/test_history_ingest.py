"""Exactly once, whatever happens to the process, the history's file or the live store."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
import sqlalchemy as sa
from story import Story

from orchestrator_fleet.errors import FleetError, StoreError
from orchestrator_fleet.history import door, ingest
from orchestrator_fleet.history.database import HistoryInUse, HistoryUnusable
from orchestrator_fleet.history.ingest import Ingester
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import events as outbox_table

KILLS = 12
SEEN = "select count(*), count(distinct id), max(id), count(distinct (store, seq)), sum((data->>'n')::int) from events"
INGEST_FOREVER = """
import sys
from pathlib import Path
from orchestrator_fleet.history import ingest
ingest.MAX_BATCH_ROWS = 50
moving = ingest.Ingester(sys.argv[1], Path(sys.argv[2]), wait_s=5)
moving.cursor().close()
print("open", flush=True)
while moving.run_once():
    pass
print("done", flush=True)
sys.stdin.read()
"""


def start_ingesting(url: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", INGEST_FOREVER, url, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def rows(history: Ingester, query: str) -> list[list[Any]]:
    return door.ask(history, query).rows


def test_every_event_arrives_once_and_in_order(
    story: Story, history: Ingester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many batches; and asking again moves nothing."""
    monkeypatch.setattr(ingest, "MAX_BATCH_ROWS", 7)
    story.bulk(40)
    assert history.run_once() == 7
    assert history.flush() == 33
    assert history.flush() == 0
    assert rows(history, "select id, seq, (data->>'n')::int from events order by id") == [
        [n + 1, n + 1, n] for n in range(40)
    ]
    story.bulk(5, first=40)
    assert history.flush() == 5


def test_a_batch_is_full_by_bytes_too(story: Story, history: Ingester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few large results don't fill the memory."""
    monkeypatch.setattr(ingest, "MAX_BATCH_BYTES", 5_000)
    story.tell(*(Event(at_us=n, kind="noted", actor="system", data={"text": "x" * 2_000}) for n in range(10)))
    assert history.run_once() == 3
    assert history.flush() == 7


@pytest.mark.timeout(180)
def test_kill_minus_nine_at_any_moment_loses_and_doubles_nothing(story: Story, tmp_path: Path) -> None:
    """Killed in the middle again and again, with more events coming in between."""
    path, total = tmp_path / "history.duckdb", 0
    chance = random.Random(20)  # noqa: S311 (the same moments each run)
    interrupted = 0
    for _ in range(KILLS):
        story.bulk(2_000, first=total)
        total += 2_000
        child = start_ingesting(story.url, path)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(chance.uniform(0, 0.25))  # the moment of the kill, not a wait for something
        child.kill()
        interrupted += "done" not in child.communicate(timeout=10)[0]
    history = Ingester(story.url, path)
    left = history.flush()
    assert rows(history, SEEN) == [[total, total, total, total, total * (total - 1) // 2]]
    history.close()
    assert interrupted, "no kill came in the middle: the test shows nothing"
    assert left < total, "nothing was moved before the kills: the test shows nothing"


def test_a_failed_batch_leaves_nothing_behind(story: Story, history: Ingester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rows nor cursor; the next run has them all."""
    story.bulk(10)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(ingest, "_move_cursor", broken)
        with pytest.raises(RuntimeError, match="in the middle"):
            history.run_once()
    assert history.flush() == 10
    assert rows(history, "select count(*), max(id) from events") == [[10, 10]]


def test_two_ingesters_in_one_process_move_each_event_once(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes second is refused by DuckDB, says so, and may go on."""
    monkeypatch.setattr(ingest, "MAX_BATCH_ROWS", 20)
    story.bulk(1_000)
    both = [Ingester(story.url, tmp_path / "history.duckdb") for _ in range(2)]
    for one in both:
        one.cursor().close()

    def move(one: Ingester) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if not one.run_once():
                    return
            except FleetError as error:
                assert "whole or not at all" in str(error)  # noqa: PT017 (some refusals are expected here)

    threads = [threading.Thread(target=move, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(70)
    assert rows(both[0], SEEN) == [[1_000, 1_000, 1_000, 1_000, 499_500]]
    for one in both:
        one.close()


def test_another_process_that_has_the_history_is_named(story: Story, tmp_path: Path) -> None:
    """With its pid; and when it is gone, the way is free."""
    story.bulk(3)
    path = tmp_path / "history.duckdb"
    child = start_ingesting(story.url, path)
    assert child.stdout is not None
    assert [child.stdout.readline(), child.stdout.readline()] == ["open\n", "done\n"]
    with pytest.raises(HistoryInUse, match=f"pid {child.pid} .* has the history open"):
        Ingester(story.url, path).run_once()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=10)
    assert door.ask_files(story.url, path, "select count(*) from events").rows == [[3]]


def test_a_question_waits_for_the_one_before_it(story: Story, tmp_path: Path) -> None:
    """Two `fleet sql` at once both get their answer."""
    story.bulk(3)
    path = tmp_path / "history.duckdb"
    child = start_ingesting(story.url, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    threading.Timer(0.3, child.kill).start()
    assert door.ask_files(story.url, path, "select count(*) from events").rows == [[3]]
    child.communicate(timeout=10)


def test_it_is_closed_while_a_question_that_nobody_waits_for_is_answered(history: Ingester) -> None:
    """DuckDB refuses to close it then, and does when the answer is there."""
    history.flush()
    cursor, asked = history.cursor(), threading.Event()

    def answer() -> None:
        asked.set()
        with contextlib.suppress(duckdb.Error):  # it may be closed between the two calls
            cursor.execute("SELECT count(*) FROM range(300_000_000) t(a) WHERE a % 7 = 3").fetchall()

    asking = threading.Thread(target=answer)
    asking.start()
    asked.wait(10)
    history.close()
    asking.join(30)
    assert not asking.is_alive()


def test_a_deleted_history_is_made_anew_from_the_outbox(story: Story, history: Ingester) -> None:
    """Closed or open: the next run finds the file gone and begins again."""
    story.run()
    before = rows(history, "select * from events order by id")
    history.path.unlink()
    assert rows(history, "select * from events order by id") == before
    history.close()
    history.path.unlink()
    assert rows(history, "select * from events order by id") == before


def test_a_new_live_store_begins_a_new_life(story: Story, history: Ingester, tmp_path: Path) -> None:
    """What was, stays; the new store's events come behind it, although their numbers are the same."""
    first = story.run("first")
    history.flush()
    story.close()
    for file in tmp_path.glob("store.sqlite*"):
        file.unlink()
    anew = Story(story.path)
    anew.clock.advance(3_600)
    tasks = [anew.run(f"anew {n}") for n in range(3)]
    titles = rows(history, "select id, title from tasks order by title")
    assert titles == [*([task.id, task.title] for task in tasks), [first.id, "first"]]
    assert rows(history, "select store, since_seq, last_seq from stores order by 1") == [[1, 0, 3], [2, 0, 9]]
    assert rows(history, "select count(*), max(id), count(distinct (store, seq)) from events") == [[12, 12, 12]]
    anew.close()


def test_a_live_store_that_was_put_back_goes_on_where_both_agree(
    story: Story, history: Ingester, tmp_path: Path
) -> None:
    """Common events are there once; what happened since the copy stays, and what happened after it is added."""
    common = story.run("common")
    story.close()
    shutil.copy(story.path, tmp_path / "copy.sqlite")
    lost = Story(story.path)
    lost.clock.advance(60)
    undone = lost.run("lost")
    history.flush()
    lost.close()
    shutil.copy(tmp_path / "copy.sqlite", story.path)
    again = Story(story.path)
    again.clock.advance(120)
    redone = [again.run(f"again {n}") for n in range(2)]
    assert {row[0] for row in rows(history, "select id from tasks")} == {
        common.id,
        undone.id,
        *(task.id for task in redone),
    }
    assert rows(history, "select store, since_seq, last_seq from stores order by 1") == [[1, 0, 6], [2, 3, 9]]
    assert rows(history, "select count(*) from events") == [[12]]
    assert history.flush() == 0
    again.close()


def test_a_trimmed_outbox_goes_on(story: Story, history: Ingester) -> None:
    """Deleting what is in the history already, the event at the cursor too, changes nothing."""
    story.bulk(10)
    history.flush()
    story.store.write_sync(lambda conn: conn.execute(sa.delete(outbox_table)))
    assert history.flush() == 0
    story.bulk(5, first=10)
    assert history.flush() == 5
    assert rows(history, "select max(store), count(*), sum((data->>'n')::int) from events") == [[1, 15, 105]]


def test_the_history_is_its_owners_alone(story: Story, history: Ingester) -> None:
    """It holds what tasks said and did, like the live store."""
    story.run()
    history.flush()
    assert history.path.stat().st_mode & 0o777 == 0o600


def test_without_a_live_store_there_is_an_empty_history(tmp_path: Path) -> None:
    """Asking makes no store."""
    store = tmp_path / "store.sqlite"
    answer = door.ask_files(f"sqlite:///{store}", tmp_path / "history.duckdb", "select count(*) from tasks")
    assert answer.rows == [[0]]
    assert not store.exists()


def test_a_store_that_is_none_is_an_error_with_its_name(tmp_path: Path) -> None:
    """And the history itself is fine afterwards."""
    store = tmp_path / "store.sqlite"
    store.write_text("not a database, whatever its name says" * 100)
    history = Ingester(f"sqlite:///{store}", tmp_path / "history.duckdb")
    with pytest.raises(StoreError, match=r"store\.sqlite: the outbox can't be read: .*not a database"):
        history.flush()
    store.unlink()
    assert history.flush() == 0
    history.close()


def test_a_history_that_is_none_says_what_to_do(story: Story, tmp_path: Path) -> None:
    """One line, no traceback of DuckDB's."""
    path = tmp_path / "history.duckdb"
    path.write_text("not a database either" * 1_000)
    with pytest.raises(FleetError, match=r"can't be opened: .*; move it .* away") as refused:
        Ingester(story.url, path).flush()
    assert "\n" not in str(refused.value)


def test_a_full_disk_at_a_checkpoint_is_gone_when_there_is_room(story: Story, tmp_path: Path) -> None:
    """DuckDB gives itself up then; opened anew it has every event once."""
    history = Ingester(story.url, tmp_path / "history.duckdb")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def happen(times: int) -> None:
        for _ in range(times):
            story.tell(Event(at_us=1, kind="large", actor="system", data={"text": os.urandom(200_000).hex()}))

    def ingest_until_it_is_full() -> None:
        for _ in range(60):
            happen(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (18_000_000, hard))
            try:
                history.run_once()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    happen(30)
    history.flush()
    history.close()  # which writes it all into the one file
    with pytest.raises(HistoryUnusable, match="checkpoint") as refused:
        ingest_until_it_is_full()
    assert "whole or not at all" in str(refused.value)
    history.flush()
    ((count, distinct),) = rows(history, "select count(*), count(distinct seq) from events")
    assert count == distinct == len(story.outbox())
    history.close()


def test_odd_usage_does_not_hide_that_an_attempt_ended(story: Story, history: Ingester) -> None:
    """The attempt has its outcome and time; only the figures that can't be are left out."""
    story.make()
    (grant,) = story.claim()
    end = {"outcome": "done", "run_s": 2.0, "usage": {"input_tokens": 10**30, "usd": 1.0}}
    story.tell(Event(at_us=9, kind="task_done", actor="system", task=grant.task.id, attempt=1, data=end))
    history.flush()
    assert rows(history, "select outcome, run_s, input_tokens from attempts") == [["done", 2.0, None]]


@pytest.mark.parametrize(
    "data",
    [
        {"task": "no object", "run_s": "long", "usage": 7},
        {"exit_code": 1 << 40, "usage": {"input_tokens": "many"}},
        {"task": {"title": 'quote " \\ newline \n nul \0 emoji 🛰 rtl \u202e', "status": "DONE"}},
        {"usage": {"input_tokens": 1 << 63}},
        {"n": 10**30, "f": 1e308, "deep": [[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]},
        {"": {"a.b": 1, "$": 2, "a'b": 3}},
    ],
)
def test_an_odd_event_does_not_stop_the_history(story: Story, history: Ingester, data: dict[str, Any]) -> None:
    """It is kept as it is, and those around it arrive."""
    story.bulk(1)
    story.tell(Event(at_us=5, kind="odd", actor="system", task="task-odd", data=data))
    story.bulk(1, first=1)
    assert history.flush() == 3
    assert [kept.data for kept in story.outbox()][1] == data
    ((kept,),) = rows(history, "select data from events where kind = 'odd'")
    assert kept.keys() == data.keys()
    rows(history, "select * from tasks")
    rows(history, "select * from attempts")
    rows(history, "select * from orchestrators")
