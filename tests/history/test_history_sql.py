"""The SQL door: it reads, it is bounded, and its answer is JSON."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from story import Story

from orchestrator_fleet.history import door, sql
from orchestrator_fleet.history.ingest import Ingester
from orchestrator_fleet.history.sql import QueryInvalid, QueryTooLong

secret_of_this_program = [{"secret": 1}]  # what a query must not see


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("copy events to '{there}'", "got COPY, wanted SELECT"),
        ("export database '{there}'", "got EXPORT"),
        ("attach '{there}'", "got ATTACH"),
        ("install httpfs", "got LOAD"),
        ("load httpfs", "got LOAD"),
        ("pragma enable_profiling", "got PRAGMA"),
        ("set threads = 64", "got SET"),
        ("set lock_configuration = false", "got SET"),
        ("insert into events select * from events", "got INSERT"),
        ("delete from events", "got DELETE"),
        ("drop view tasks", "got DROP"),
        ("create table mine as select 1", "got CREATE"),
        ("checkpoint", "got "),
        ("begin", "got TRANSACTION"),
        ("call pragma_version()", "got CALL"),
        ("select 1; select 2", "got 2 statements, wanted one"),
        ("select 1; delete from events", "got 2 statements, wanted one"),
        ("", "got 0 statements, wanted one"),
        ("-- nothing", "got 0 statements, wanted one"),
        ("pivot events on kind using count(*)", "write ON column IN"),
        ("with gone as (delete from events returning *) select * from gone", "data-modifying"),
        ("explain analyze delete from events", "a query can only read"),
        ("select * from read_csv('/etc/passwd')", "no files and no network"),
        ("select content from read_text('/etc/hostname')", "no files and no network"),
        ("select * from '/etc/passwd.csv'", "no files and no network"),
        ("select * from glob('/etc/*')", "no files and no network"),
        ("select * from read_parquet('https://example.org/x.parquet')", "no files and no network"),
        ("select * from secret_of_this_program", "tables and views: events, tasks"),
        ("selec 1", "syntax error"),
        ("select nothing from tasks", "nothing"),
        ("select 1) union all (select 2", "syntax error"),
        ("select ?", "parameter"),
    ],
)
def test_what_is_no_plain_question_is_refused(
    story: Story, history: Ingester, tmp_path: Path, query: str, says: str
) -> None:
    """In words that say what to do; and the history is as it was."""
    story.bulk(3)
    there = tmp_path / "escaped"
    with pytest.raises(QueryInvalid, match="(?is).*" + says):
        door.ask(history, query.format(there=there))
    assert not there.exists()
    assert door.ask(history, "select count(*) from events").rows == [[3]]


def test_an_error_points_into_the_query_as_it_was_asked(history: Ingester) -> None:
    """The caret stands under the name that is wrong."""
    with pytest.raises(QueryInvalid) as refused:
        door.ask(history, "select nope from tasks")
    pointed, caret = str(refused.value).splitlines()[-2:]
    assert pointed == "LINE 1: select nope from tasks"
    assert caret.index("^") == pointed.index("nope")


@pytest.mark.parametrize(
    "query",
    [
        "select 42 as answer",
        "select 42 as answer;",
        "select 42 as answer; -- and; more",
        "/* ; */ with x as (select 42 as answer) from x ; ;",
        "values (42)",
        "select 42 as answer -- the end",
    ],
)
def test_comments_and_semicolons_are_no_second_statement(history: Ingester, query: str) -> None:
    """As people type them."""
    assert door.ask(history, query).rows == [[42]]


@pytest.mark.parametrize(
    "query", ["show tables", "describe tasks", "summarize events", "explain select 1", "from tasks"]
)
def test_looking_around_is_reading(history: Ingester, query: str) -> None:
    """What the DuckDB shell can show, this can."""
    door.ask(history, query)


def test_an_endless_query_is_ended_and_the_next_one_answered(story: Story, history: Ingester) -> None:
    """Soon after its time is over, on the same connection too."""
    story.bulk(3)
    history.flush()
    endless = "select sum(a.range * b.range) from range(100000000) a, range(100000000) b"
    with contextlib.closing(history.cursor()) as connection:
        began = time.monotonic()
        with pytest.raises(QueryTooLong, match=r"longer than 0\.2 s"):
            sql.query(connection, endless, timeout_s=0.2)
        assert time.monotonic() - began < 10
        assert sql.query(connection, "select count(*) from events").rows == [[3]]


def test_an_answer_has_a_largest_size(history: Ingester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows, and it says that there are more; in bytes, and it is refused."""
    answer = door.ask(history, "select * from range(1000000000000)", limit=10)
    assert answer.rows == [[n] for n in range(10)]
    assert answer.truncated
    assert not door.ask(history, "select * from range(10)", limit=10).truncated
    monkeypatch.setattr(sql, "MAX_RESULT_BYTES", 10_000)
    with pytest.raises(QueryTooLong, match="select fewer columns or rows"):
        door.ask(history, "select repeat('x', 100) from range(1000)")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("null", None),
        ("true", True),
        ("7::tinyint", 7),
        ("sum(7)", 7),
        ("170141183460469231731687303715884105727::hugeint", 2**127 - 1),
        ("1.25::decimal(9,2)", 1.25),
        ("0.5::double", 0.5),
        ("'nan'::double", None),
        ("'infinity'::double", None),
        ("'grüße'", "grüße"),
        ("timestamptz '2026-03-01 10:00:00.25+02'", "2026-03-01T08:00:00.250000Z"),
        ("timestamp '2026-03-01 10:00:00'", "2026-03-01T10:00:00.000000"),
        ("date '2026-03-01'", "2026-03-01"),
        ("time '10:00:00'", "10:00:00"),
        ("interval 90 second", "00:01:30"),
        ("'ab'::blob", "YWI="),
        ("'{\"a\": [1, null]}'::json", {"a": [1, None]}),
        ("[1, 2]", [1, 2]),
        ("{'a': 1, 'b': [date '2026-03-01']}", {"a": 1, "b": ["2026-03-01"]}),
        ("map {'a': 1}", {"a": 1}),
        ("[timestamptz '2026-03-01 10:00:00+00']", ["2026-03-01 10:00:00+00"]),
        ("'b'::enum('a', 'b')", "b"),
        ("uuid '00000000-0000-0000-0000-000000000001'", "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_every_type_becomes_json(history: Ingester, expression: str, value: Any) -> None:
    """The same answer whoever gives it, and any client can read it."""
    answer = door.ask(history, f"select {expression} as x, {expression} as x")
    assert (answer.columns, answer.rows) == (["x", "x"], [[value, value]])
    assert json.loads(json.dumps(answer.rows, allow_nan=False)) == answer.rows


def test_parameters_fill_their_places(story: Story, history: Ingester) -> None:
    """By number and by name; never by pasting text."""
    story.run("it's; drop table events")
    query = "select count(*) from tasks where title = "
    assert door.ask(history, query + "?", params=["it's; drop table events"]).rows == [[1]]
    assert door.ask(history, query + "$title", params={"title": "it's; drop table events"}).rows == [[1]]
    with pytest.raises(QueryInvalid):
        door.ask(history, query + "?", params=[])


def test_rows_keep_the_order_they_were_asked_in(story: Story, history: Ingester) -> None:
    """ORDER BY survives what is put around the query."""
    story.bulk(3_000)
    answer = door.ask(history, "select (data->>'n')::int as n from events order by n desc")
    assert answer.rows == [[n] for n in range(2_999, -1, -1)]


def test_questions_are_answered_while_events_come_in(story: Story, history: Ingester) -> None:
    """Each answer is one moment of the history: never a half batch, never less than before."""
    stop, problems, counts = threading.Event(), list[str](), list[int]()

    def ask() -> None:
        before = 0
        try:
            while not stop.is_set():
                ((count, last),) = door.ask(history, "select count(*), coalesce(max(id), 0) from events").rows
                if count != last or count < before:
                    problems.append(f"{before} then {count} events up to {last}")
                before = count
                counts.append(count)
        except Exception as error:  # noqa: BLE001 (a thread's error must fail the test)
            problems.append(repr(error))

    readers = [threading.Thread(target=ask) for _ in range(3)]
    for reader in readers:
        reader.start()
    for part in range(20):
        story.bulk(100, first=part * 100)
        history.flush()
    deadline = time.monotonic() + 30
    while (not counts or counts[-1] < 2_000) and time.monotonic() < deadline and not problems:
        stop.wait(0.01)
    stop.set()
    for reader in readers:
        reader.join(30)
    assert problems == []
    assert counts[-1] == 2_000
