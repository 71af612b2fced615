"""Every metric of analytics is what a slow count by hand says, over random histories, ranges and buckets."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from story import VPS, Story

from orchestrator_fleet.errors import Invalid, TaskError
from orchestrator_fleet.history import analytics, door
from orchestrator_fleet.history.analytics import Window, split, trends
from orchestrator_fleet.history.ingest import Ingester
from orchestrator_fleet.history.sql import Result
from orchestrator_fleet.orchestrators import coordination
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.task import Grant, TaskRow
from orchestrator_fleet.wire.link import Usage
from orchestrator_fleet.wire.vps import Bucket, Range

RANGES: tuple[Range, ...] = ("24h", "7d", "30d", "90d", "all")
BUCKETS: tuple[Bucket, ...] = ("hour", "day", "week", "month")
DAYS = {"24h": 1, "7d": 7, "30d": 30, "90d": 90}
HOUR_S, DAY_S = 3_600.0, 86_400.0
NOTHING: dict[str, Any] = {
    "completed": 0,
    "failed": 0,
    "cancelled": 0,
    "success_rate": None,
    "lead_time_s": {"p50": None, "p90": None, "p99": None},
    "run_time_s": {"p50": None, "p90": None, "p99": None},
    "retries": 0,
    "tokens": None,
    "usd": None,
    "on_time_rate": None,
    "escalations": 0,
}
OUTCOMES = (*["done"] * 6, "failed", "failed_for_good", "timeout", "crashed", "cancelled", "released", "quota")
ENDS = ("task_done", "task_cancelled", "task_rejected")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("make", "claim", "finish", "finish", "expire", "cancel", "unblock", "assign", "say_done")
            + ("run",) * 6
            + ("escalate", "reject", "copy", "put_back", "go_back")
        ),
        st.integers(0, 7),
        st.sampled_from(OUTCOMES),
        st.sampled_from((0.0, 7.5, 700.0, HOUR_S, 7 * HOUR_S, DAY_S, 6 * DAY_S, 40 * DAY_S)),
    ),
    min_size=10,
    max_size=40,
)


class Teller:
    """Does random steps, of which the rules refuse some; the live store may be put back from a copy meanwhile."""

    def __init__(self, story: Story, history: Ingester) -> None:
        self.story, self.history = story, history
        self.tasks: list[TaskRow] = []
        self.grants: list[Grant] = []
        self.copy: tuple[list[TaskRow], list[Grant]] | None = None

    def step(self, what: str, which: int, outcome: str, wait_s: float) -> None:
        """Do one, if the rules allow it, and wait."""
        with contextlib.suppress(TaskError):
            getattr(self, f"_{what}")(which, outcome)
        self.story.clock.advance(wait_s)

    def _make(self, which: int, _outcome: str) -> None:
        now = self.story.clock.now_us()
        due_at_us = None if which % 2 else now + round(which * DAY_S * 1e6)
        self.tasks.append(self.story.make(orchestrator=VPS[which // 4], due_at_us=due_at_us))

    def _claim(self, which: int, _outcome: str) -> None:
        self.grants += self.story.claim(VPS[which // 4], limit=which % 4)

    def _finish(self, which: int, outcome: str) -> None:
        if self.grants:
            used = Usage(input_tokens=which, output_tokens=2, cache_read_tokens=100, usd=which / 7)
            grant = self.grants.pop(which % len(self.grants))
            self.story.finish(grant, outcome, usage=used if which % 3 else None)

    def _run(self, which: int, outcome: str) -> None:
        """A task from its creation to the end of a try, on the tick of its due date if it has one."""
        now_us, run_s = self.story.clock.now_us(), (which + 1) * 100.0
        due_at_us = now_us + (which + which % 3) * 100_000_000 if which else None
        self.tasks.append(self.story.make(orchestrator=VPS[which // 4], due_at_us=due_at_us, priority="CRITICAL"))
        self._claim(which | 1, outcome)
        self.story.clock.advance(run_s)
        self._finish(which, outcome)

    def _go_back(self, which: int, outcome: str) -> None:
        """The same twice, and another way the second time."""
        self._copy(which, outcome)
        self._run(which, "done")
        self._cancel(len(self.tasks) - 2, outcome)
        self._put_back(which, outcome)
        self._run(which, outcome)

    def _expire(self, _which: int, _outcome: str) -> None:
        self.story.clock.advance(31)
        self.story.expire()

    def _change(self, which: int, function: Any, **fields: Any) -> None:
        if self.tasks:
            self.story.change(function, self.tasks[which % len(self.tasks)], reason="because", **fields)

    def _cancel(self, which: int, _outcome: str) -> None:
        self._change(which, life.cancel)

    def _unblock(self, which: int, _outcome: str) -> None:
        self._change(which, life.unblock)

    def _reject(self, which: int, _outcome: str) -> None:
        self._change(which, life.block, blocked_reason="approval")
        self._change(which, life.reject)

    def _assign(self, which: int, _outcome: str) -> None:
        self._change(which, life.assign, orchestrator=VPS[which % 2])

    def _say_done(self, which: int, _outcome: str) -> None:
        self._change(which, life.set_status, status="DONE")

    def _escalate(self, which: int, _outcome: str) -> None:
        self._change(which, life.block, blocked_reason="escalation")
        for hop in range(1, 2 + which % 3):
            self._ask_above(self.tasks[which % len(self.tasks)] if self.tasks else None, hop)

    def _ask_above(self, task: TaskRow | None, hop: int) -> None:
        if task is None:
            return
        now_us = self.story.clock.now_us()
        self.story.store.write_sync(
            lambda conn: coordination.ask(
                conn,
                life.get_task(conn, task.id),
                kind="escalation",
                source=task.orchestrator or "",
                target="human:me",
                hop=hop,
                note=None,
                actor="k-test",
                now_us=now_us,
            )
        )

    def _copy(self, _which: int, _outcome: str) -> None:
        self._with_closed_store(lambda path: shutil.copy(path, f"{path}.copy"))
        self.copy = list(self.tasks), list(self.grants)

    def _put_back(self, _which: int, _outcome: str) -> None:
        if self.copy is not None:
            self.history.flush()
            self._with_closed_store(lambda path: shutil.copy(f"{path}.copy", path))
            self.tasks, self.grants = list(self.copy[0]), list(self.copy[1])

    def _with_closed_store(self, do: Any) -> None:
        self.story.store.close()
        do(self.story.path)
        self.story.store = open_store(self.story.url)


def look(history: Ingester, orchestrator: str, span: Range, bucket: Bucket, now_us: int) -> dict[str, Any]:
    async def ask(text: str, params: Sequence[Any], limit: int) -> Result:
        return door.ask(history, text, params=params, limit=limit)

    return asyncio.run(analytics.look(ask, orchestrator, span=span, bucket=bucket, now_us=now_us))


def told(history: Ingester) -> list[dict[str, Any]]:
    """The events that count: what the live store, put back, told once more counts as it went the last time."""
    answer = door.ask(history, "select * from events order by id")
    kept: list[dict[str, Any]] = []
    for values in answer.rows:
        row = dict(zip(answer.columns, values, strict=True))
        kept = [one for one in kept if not is_told_again(one, row)]
        kept.append(row)
    return kept


def is_told_again(before: dict[str, Any], now: dict[str, Any]) -> bool:
    if before["store"] >= now["store"] or before["task"] != now["task"] or now["task"] is None:
        return False
    is_same_try = before["attempt"] == now["attempt"]
    is_of_a_try = now["kind"] == "task_claimed" or now["run_s"] is not None
    counts = before["run_s"] is not None or before["kind"] in ENDS or before["kind"] == "escalation_pending"
    return counts and ((is_same_try and is_of_a_try) or (before["kind"] in ENDS and now["kind"] in ENDS))


def recount(events: list[dict[str, Any]], orchestrator: str, since: datetime, until: datetime) -> dict[str, Any]:
    """Every metric, the slow way."""
    mine = [one for one in events if one["orchestrator"] == orchestrator and since <= time_of(one) < until]
    done = [one for one in mine if one["kind"] == "task_done"]
    failed = [
        one
        for one in mine
        if one["kind"] in ("task_failed", "lease_expired")
        and one["data"]["task"]["blocked_reason"] == "attempts_exhausted"
    ]
    tries = [one for one in mine if "run_s" in one["data"]]
    used = [one["data"]["usage"] for one in tries if one["data"].get("usage")]
    due = [one for one in done if one["data"]["task"]["due_at"]]
    in_time = [one for one in due if one["data"]["task"]["completed_at"] <= one["data"]["task"]["due_at"]]
    ran = [one["data"]["run_s"] for one in tries if one["data"].get("outcome") == "done"]
    asked = [one for one in mine if one["kind"] == "escalation_pending" and one["data"]["coordination"]["hop"] == 1]
    return {
        "completed": len(done),
        "failed": len(failed),
        "cancelled": len([one for one in mine if one["kind"] in ("task_cancelled", "task_rejected")]),
        "success_rate": len(done) / len(done + failed) if done or failed else None,
        "lead_time_s": percentiles([lead_time_s(one["data"]["task"]) for one in done]),
        "run_time_s": percentiles(ran),
        "retries": len([one for one in tries if one["attempt"] > 1]),
        "tokens": sum(one["input_tokens"] + one["output_tokens"] for one in used) if used else None,
        "usd": sum(one["usd"] for one in used) if used else None,
        "on_time_rate": len(in_time) / len(due) if due else None,
        "escalations": len(asked),
    }


def time_of(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["happened_at"])


def lead_time_s(task: dict[str, Any]) -> float:
    took = datetime.fromisoformat(task["completed_at"]) - datetime.fromisoformat(task["created_at"])
    return took / timedelta(seconds=1)


def percentiles(values: list[float]) -> dict[str, float | None]:
    return {f"p{share}": percentile(sorted(values), share / 100) for share in (50, 90, 99)}


def percentile(values: list[float], share: float) -> float | None:
    if not values:
        return None
    place = (len(values) - 1) * share
    low, high = values[math.floor(place)], values[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def naive_buckets(since: datetime, until: datetime, bucket: Bucket) -> list[tuple[datetime, datetime]]:
    """Hour by hour, a new bucket where the bucket's name changes."""
    name = {"hour": "%Y-%m-%d %H", "day": "%Y-%m-%d", "week": "%G-%V", "month": "%Y-%m"}[bucket]
    starts, at = [since], since.replace(minute=0, second=0, microsecond=0)
    while (at := at + timedelta(hours=1)) < until:
        if at.strftime(name) != starts[-1].strftime(name):
            starts.append(at)
    return list(zip(starts, [*starts[1:], until], strict=True)) if since < until else []


def same(seen: dict[str, Any], counted: dict[str, Any], where: str) -> None:
    flat = {f"{name}.{p}": v for name in ("lead_time_s", "run_time_s") for p, v in counted[name].items()}
    got = {f"{name}.{p}": v for name in ("lead_time_s", "run_time_s") for p, v in seen[name].items()}
    wanted = {**{name: value for name, value in counted.items() if not isinstance(value, dict)}, **flat}
    found = {**{name: value for name, value in seen.items() if name in counted and name not in NESTED}, **got}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=2e-6)), (where, name)


NESTED = ("lead_time_s", "run_time_s")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=STEPS,
    asked=st.lists(st.tuples(st.sampled_from(RANGES), st.sampled_from(BUCKETS)), min_size=2, max_size=4),
    late_s=st.sampled_from((0.0, 0.000001, 1.0, 5 * DAY_S)),
)
def test_every_metric_is_what_a_slow_count_says(
    steps: list[tuple[str, int, str, float]], asked: list[tuple[Range, Bucket]], late_s: float
) -> None:
    """Of every range and bucket, also when the live store was put back from a copy in between."""
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Path(folder) / "store.sqlite")
        history = Ingester(story.url, Path(folder) / "history.duckdb")
        teller = Teller(story, history)
        try:
            for step in steps:
                teller.step(*step)
            story.clock.advance(late_s)
            history.flush()
            events = told(history)
            for orchestrator in VPS:
                for span, bucket in asked:
                    check(history, events, orchestrator, span=span, bucket=bucket, now_us=story.clock.now_us())
        finally:
            history.close()
            story.close()


def check(
    history: Ingester, events: list[dict[str, Any]], orchestrator: str, *, span: Range, bucket: Bucket, now_us: int
) -> None:
    where = f"{orchestrator} {span} {bucket}"
    seen_at = [time_of(one) for one in raw_of(history, orchestrator)]
    until = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_us)
    since = until - timedelta(days=DAYS[span]) if span in DAYS else min(seen_at, default=until)
    buckets = naive_buckets(since, until, bucket)
    if len(buckets) > 2_200:
        with pytest.raises(Invalid, match="take"):
            look(history, orchestrator, span, bucket, now_us)
        return
    answer = look(history, orchestrator, span, bucket, now_us)
    assert (answer["range"], answer["bucket"]) == (span, bucket)
    assert [(one["start"], one["end"]) for one in answer["series"]] == [(text(a), text(b)) for a, b in buckets], where
    same(answer["summary"], recount(events, orchestrator, since, until), where)
    for one, (start, end) in zip(answer["series"], buckets, strict=True):
        same(one, recount(events, orchestrator, start, end), f"{where} {start}")
    if span == "all":
        assert answer["previous"] is None
    else:
        same(answer["previous"], recount(events, orchestrator, since - (until - since), since), f"{where} before")
    is_known_before = span in DAYS and min(seen_at, default=until) < since
    expected = trends(answer["summary"], answer["previous"] if is_known_before else None)
    assert answer["trend"] == expected
    for name in ("completed", "failed", "cancelled", "retries", "escalations"):
        assert sum(one[name] for one in answer["series"]) == answer["summary"][name], where


def raw_of(history: Ingester, orchestrator: str) -> list[dict[str, Any]]:
    answer = door.ask(history, "select happened_at from events where orchestrator = ?", params=[orchestrator])
    return [{"happened_at": row[0]} for row in answer.rows]


def text(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def test_without_events_nothing_is_invented(history: Ingester, story: Story) -> None:
    """Counts are 0, everything else is null, and a range without a beginning has none."""
    story.make()
    now_us = story.clock.now_us()
    answer = look(history, "vp-b", "7d", "day", now_us)
    assert (answer["summary"], answer["previous"]) == (NOTHING, NOTHING)
    assert set(answer["trend"].values()) == {None}
    assert [{k: v for k, v in one.items() if k in NOTHING} for one in answer["series"]] == [NOTHING] * 7
    ever = look(history, "vp-b", "all", "hour", now_us)
    assert (ever["from"], ever["series"], ever["previous"], ever["summary"]) == (None, [], None, NOTHING)


def test_a_window_has_its_beginning_and_not_its_end(history: Ingester, story: Story) -> None:
    """To the microsecond; so two windows that meet count a thing once."""
    story.clock.advance(DAY_S)
    story.run(run_s=1.0)
    at_us = story.clock.now_us()
    (with_it, without) = (look(history, "vp-a", "24h", "day", at_us + round(DAY_S * 1e6) + late) for late in (0, 1))
    assert (with_it["summary"]["completed"], without["summary"]["completed"]) == (1, 0)
    assert without["previous"]["completed"] == 1
    assert look(history, "vp-a", "24h", "day", at_us)["summary"]["completed"] == 0


def test_who_asks_in_sql_counts_by_the_same_definitions(history: Ingester, story: Story) -> None:
    """The macros stand in the history with their definition, unit and source."""
    story.run(run_s=3.0)
    story.run(outcome="failed_for_good")
    until = text(datetime(2027, 1, 1, tzinfo=UTC))
    answer = door.ask(history, "from analytics('vp-a', '2025-01-01', $1)", params=[until])
    row = dict(zip(answer.columns, answer.rows[0], strict=True))
    assert row == {
        **NOTHING,
        "completed": 1,
        "failed": 1,
        "success_rate": 0.5,
        "lead_time_s": dict.fromkeys(("p50", "p90", "p99"), 3.0),
        "run_time_s": dict.fromkeys(("p50", "p90", "p99"), 3.0),
    }
    by_hand = "select orchestrator, metric_success_rate(m) from measurements as m group by all"
    assert door.ask(history, by_hand).rows == [["vp-a", 0.5]]
    found = door.ask(
        history,
        "select replace(function_name, 'metric_', ''), comment from duckdb_functions() "
        "where starts_with(function_name, 'metric_')",
    )
    assert {name for name, _ in found.rows} == NOTHING.keys()
    assert all("Unit: " in comment and "Source: " in comment for _, comment in found.rows)
    bare = "select column_name from duckdb_columns() where table_name = 'measurements' and comment is null"
    assert door.ask(history, bare).rows == [["task"], ["attempt"]]


def test_odd_events_harm_nothing(history: Ingester, story: Story) -> None:
    """Data of another shape is counted as far as it can be read."""
    now_us = story.clock.now_us()
    for data in ({}, {"task": 3}, {"task": {"created_at": 3, "due_at": []}}, {"task": {"created_at": "yesterday"}}):
        for kind in ("task_done", "task_cancelled", "escalation_pending"):
            event = Event(at_us=now_us - 1, kind=kind, actor="system", task="t", orchestrator="vp-a", data=data)
            story.tell(event)
    answer = look(history, "vp-a", "24h", "day", now_us)
    assert (answer["summary"]["completed"], answer["summary"]["cancelled"]) == (4, 4)
    assert answer["summary"]["lead_time_s"]["p50"] is None


@pytest.mark.parametrize(
    ("bucket", "starts"),
    [
        ("hour", ["2026-01-01T21:30", "2026-01-01T22:00", "2026-01-01T23:00"]),
        ("day", ["2026-01-01T21:30", "2026-01-02", "2026-01-03"]),
        ("week", ["2026-01-01T21:30", "2026-01-05", "2026-01-12"]),
        ("month", ["2026-01-01T21:30", "2026-02-01", "2026-03-01"]),
    ],
)
def test_buckets_are_of_utc_and_weeks_begin_on_monday(bucket: Bucket, starts: list[str]) -> None:
    """The first is what is left of one."""
    since = datetime(2026, 1, 1, 21, 30, tzinfo=UTC)
    until = since + (timedelta(hours=5) if bucket == "hour" else timedelta(days=300))
    found = split(Window(round(since.timestamp() * 1e6), round(until.timestamp() * 1e6)), bucket)
    firsts = [datetime.fromtimestamp(one.since_us / 1e6, UTC) for one in found[:3]]
    assert firsts == [datetime.fromisoformat(one).replace(tzinfo=UTC) for one in starts]
    assert all(one.until_us == following.since_us for one, following in pairwise(found))


def test_too_many_buckets_are_refused_with_what_fits() -> None:
    """Hours of 90 days are fine, hours of a year are not."""
    day_us = 86_400_000_000
    assert len(split(Window(5, 90 * day_us + 5), "hour")) == 2_161
    with pytest.raises(Invalid, match="take day"):
        split(Window(0, 365 * day_us), "hour")
    with pytest.raises(Invalid, match="take week"):
        split(Window(0, 7 * 365 * day_us), "day")
    with pytest.raises(Invalid, match="shorter range"):
        split(Window(0, 250 * 365 * day_us), "month")


@pytest.mark.parametrize(
    ("before", "now", "trend"),
    [
        (0, 0, "stable"),
        (0, 1, "up"),
        (10, 11, "stable"),
        (10, 12, "up"),
        (10, 8, "down"),
        (None, 1, None),
        (1, None, None),
        (0.5, 0.5, "stable"),
        (2, 0, "down"),
    ],
)
def test_a_trend_says_which_way_a_number_went(before: float | None, now: float | None, trend: str | None) -> None:
    """A tenth more or less is as it was; of percentiles the median counts."""
    assert trends({"a": now}, {"a": before}) == {"a": trend}
    assert trends({"a": {"p50": now, "p90": 1}}, {"a": {"p50": before, "p90": 9}}) == {"a": trend}
    assert trends({"a": now}, None) == {"a": None}
