"""Recurring tasks: which moments come, and what is made of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from desk import RETRY, SPEC, Desk
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_fleet.clock import SECOND_US, from_datetime, to_rfc3339
from orchestrator_fleet.errors import LeaseLost
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.tasks import life, schedules
from orchestrator_fleet.tasks.schedules import MAX_CAUGHT_UP, MAX_COUNTED, Due, Fired, decide, due, next_us
from orchestrator_fleet.tasks.task import TaskRow

HOUR_US = 3600 * SECOND_US


def us(text: str) -> int:
    return from_datetime(datetime.fromisoformat(text))


def utc(moments: tuple[int, ...]) -> list[str]:
    return [to_rfc3339(at_us)[:16] for at_us in moments]


def all_due(cron: str, zone: str, after: str, until: str) -> list[str]:
    """Moments of 2026, in UTC."""
    found = due(cron, zone, after_us=us(f"2026-{after}Z"), until_us=us(f"2026-{until}Z"), limit=10_000)
    return [moment.removeprefix("2026-") for moment in utc(found.at_us)]


# --- which moments come ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "zone", "after", "until", "moments"),
    [
        ("0 2 * * *", "UTC", "01-01T02:00", "01-03T02:00", ["01-02T02:00", "01-03T02:00"]),
        ("*/30 9 * * MON-FRI", "UTC", "01-02T09:00", "01-05T09:00", ["01-02T09:30", "01-05T09:00"]),
        ("0 0 L * *", "UTC", "01-01T00:00", "03-01T00:00", ["01-31T00:00", "02-28T00:00"]),
        ("0 0 13 * FRI", "UTC", "02-10T00:00", "02-15T00:00", ["02-13T00:00"]),
        ("0 9 * * *", "Asia/Kolkata", "01-01T00:00", "01-02T00:00", ["01-01T03:30"]),
        # Spring: 02:00 to 03:00 is not there. A fixed time in it comes right after it, once.
        ("30 2 * * *", "Europe/Berlin", "03-28T12:00", "03-30T12:00", ["03-29T01:00", "03-30T00:30"]),
        ("30 2 * * *", "America/New_York", "03-08T00:00", "03-09T12:00", ["03-08T07:00", "03-09T06:30"]),
        ("15,45 2 * * *", "Europe/Berlin", "03-28T12:00", "03-29T12:00", ["03-29T01:00"]),
        ("0 3 * * *", "Europe/Berlin", "03-28T12:00", "03-29T12:00", ["03-29T01:00"]),
        ("0 */1 * * *", "Europe/Berlin", "03-29T00:00", "03-29T02:00", ["03-29T01:00", "03-29T02:00"]),
        # Autumn: 02:00 to 03:00 is there twice. A fixed time in it comes the first time; what goes by hours, each time.
        ("30 2 * * *", "Europe/Berlin", "10-24T12:00", "10-26T12:00", ["10-25T00:30", "10-26T01:30"]),
        ("30 1 * * *", "America/New_York", "11-01T00:00", "11-02T12:00", ["11-01T05:30", "11-02T06:30"]),
        ("30 * * * *", "Europe/Berlin", "10-25T00:00", "10-25T02:00", ["10-25T00:30", "10-25T01:30"]),
        ("30 2 * * *", "Europe/Berlin", "10-25T00:45", "10-25T22:00", []),
        ("30 2 * * *", "Europe/Berlin", "10-25T01:15", "10-25T22:00", []),
    ],
)  # fmt: skip
def test_moments_follow_the_clock_on_the_wall(cron: str, zone: str, after: str, until: str, moments: list[str]) -> None:
    """Through both changes of the clock, as Debian's cron does."""
    assert all_due(cron, zone, after, until) == moments


def _by_the_wall(minute: int, hour: int, zone: ZoneInfo, day: datetime) -> datetime:
    """When a fixed time of a day comes: it, the first of it, or the end of the gap that it lies in."""
    wall = day.replace(hour=hour, minute=minute, tzinfo=None)
    while True:
        moment = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
        if moment.astimezone(zone).replace(tzinfo=None) == wall:
            return moment
        wall += timedelta(minutes=1)


@settings(max_examples=150, deadline=None)
@given(
    zone=st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo", "UTC"]),
    minute=st.integers(0, 59),
    hour=st.integers(0, 23),
    day=st.sampled_from([(2026, 3, 7), (2026, 3, 28), (2026, 4, 4), (2026, 4, 23), (2026, 10, 24), (2026, 10, 31)]),
    after_minutes=st.integers(0, 36 * 60),
)
def test_a_daily_time_comes_once_each_day(
    zone: str, minute: int, hour: int, day: tuple[int, int, int], after_minutes: int
) -> None:
    """Whatever the zone does to its clock, and wherever one begins to look."""
    before = datetime(*day, tzinfo=UTC)
    after_us = from_datetime(before + timedelta(minutes=after_minutes))
    until_us = after_us + 4 * 24 * HOUR_US
    expected = [
        at_us
        for step in range(-2, 7)
        if after_us
        < (at_us := from_datetime(_by_the_wall(minute, hour, ZoneInfo(zone), before + timedelta(days=step))))
        <= until_us
    ]
    found = due(f"{minute} {hour} * * *", zone, after_us=after_us, until_us=until_us, limit=100)
    assert found == Due(at_us=tuple(expected))


def test_what_is_due_does_not_depend_on_when_one_looked() -> None:
    """Looking often finds the same moments as looking once, through both changes of the clock."""
    for cron in ("30 2 * * *", "*/20 * * * *", "0 1-3 * * *", "5 */2 * * *"):
        for zone, day in (
            ("Europe/Berlin", "2026-03-29"),
            ("Europe/Berlin", "2026-10-25"),
            ("America/New_York", "2026-11-01"),
        ):
            begin = us(f"{day}T00:00Z") - 12 * HOUR_US
            once = due(cron, zone, after_us=begin, until_us=begin + 48 * HOUR_US, limit=1_000).at_us
            often: list[int] = []
            step = 7 * 60 * SECOND_US
            for after_us in range(begin, begin + 48 * HOUR_US, step):
                until_us = min(after_us + step, begin + 48 * HOUR_US)
                often += due(cron, zone, after_us=after_us, until_us=until_us, limit=1_000).at_us
            assert tuple(often) == once


def test_only_the_newest_moments_are_kept_and_the_others_counted() -> None:
    """A year of minutes costs no year of steps."""
    until_us = us("2026-01-01T00:00Z")
    found = due("* * * * *", "UTC", after_us=until_us - HOUR_US, until_us=until_us, limit=10)
    assert (found.at_us[0], found.at_us[-1], found.dropped) == (until_us - 9 * 60 * SECOND_US, until_us, 50)
    year = due("* * * * *", "Europe/Berlin", after_us=us("2025-01-01T00:00Z"), until_us=until_us, limit=10)
    assert (year.at_us, year.dropped) == (found.at_us, MAX_COUNTED)
    rare = due("0 0 29 2 *", "UTC", after_us=us("2011-01-01T00:00Z"), until_us=until_us, limit=2)
    assert (utc(rare.at_us), rare.dropped) == (["2020-02-29T00:00", "2024-02-29T00:00"], 2)


@pytest.mark.parametrize(
    ("cron", "zone", "wrong"),
    [("61 2 * * *", "UTC", "Bad minute"), ("0 2 * * *", "Mars/Olympus", "Mars"), ("0 2", "UTC", "Wrong number")],
)
def test_a_line_or_zone_that_can_not_be_read_says_so(cron: str, zone: str, wrong: str) -> None:
    """As a ValueError, whatever the library raises."""
    with pytest.raises(ValueError, match=wrong):
        next_us(cron, zone, after_us=0)


# --- what is made of them -------------------------------------------------------------------------------------

NOW = us("2026-01-10T12:00Z")
MISSED = Due(at_us=(NOW - 3 * HOUR_US, NOW - 2 * HOUR_US, NOW - HOUR_US), dropped=0)
ON_TIME = Due(at_us=(NOW - 2 * HOUR_US, NOW - 1), dropped=0)


@pytest.mark.parametrize(
    ("come", "catch_up", "overlap", "make", "passed"),
    [
        (MISSED, "none", "skip", (), 3),
        (MISSED, "last", "skip", MISSED.at_us[-1:], 2),
        (MISSED, "all", "skip", MISSED.at_us, 0),
        (MISSED, "all", "queue", MISSED.at_us, 0),
        (MISSED, "all", "replace", MISSED.at_us[-1:], 2),
        (ON_TIME, "none", "queue", ON_TIME.at_us[-1:], 1),
        (ON_TIME, "last", "queue", ON_TIME.at_us[-1:], 1),
        (Due(at_us=(NOW,), dropped=0), "none", "skip", (NOW,), 0),
        (Due(at_us=(NOW,), dropped=7), "all", "queue", (NOW,), 7),
    ],
)
def test_missed_moments_are_caught_up_with_as_declared(
    come: Due, catch_up: Any, overlap: str, make: tuple[int, ...], passed: int
) -> None:
    """What gets no task is counted, with the reason."""
    plan = decide(come, catch_up=catch_up, overlap=overlap, now_us=NOW)
    assert (plan.make, plan.passed) == (make, passed)
    assert bool(plan.why) == bool(passed)


class Clockwork:
    """A schedule on a desk."""

    def __init__(self, desk: Desk, **fields: Any) -> None:
        self.desk = desk
        self.declare(**fields)

    def declare(self, **fields: Any) -> None:
        """Declare it so."""
        task = {"title": "Triage", "orchestrator": "vp-a", **fields.pop("task", {})}
        spec = {**SPEC, "schedules": {"nightly": {"cron": "0 * * * *", "task": task, **fields}}}
        (self.schedule,) = schedules.schedules_of(spec)

    def turn(self, *, minutes: float = 0, store: Store | None = None) -> list[TaskRow]:
        """Let time pass, then let it fire; answers the tasks made."""
        self.desk.clock.advance(60 * minutes)
        return list(self.fire(store or self.desk.store).made)

    def fire(self, store: Store) -> Fired:
        """Fire at the desk's time."""
        return store.write_sync(
            lambda c: schedules.fire(c, schedule=self.schedule, dispatch=self.desk.dispatch, now_us=self.desk.now)
        )

    def told(self) -> list[tuple[str, str]]:
        """(kind, reason) of what was told about it."""
        found = self.desk.store.read_sync(lambda c: outbox.read_after(c, 0))
        return [
            (event.kind, event.data.get("reason", "")) for event in found if event.data.get("schedule") == "nightly"
        ]


def test_a_schedule_starts_when_it_is_first_seen_and_fires_at_its_moments(desk: Desk) -> None:
    """Its task is as declared, by the schedule's name."""
    task = {"priority": "LOW", "tags": ["t"], "metadata": {"a": [1, None]}, "description": "d", "discipline": "eng"}
    clock = Clockwork(desk, task=task)
    assert clock.turn() == []
    assert clock.turn(minutes=59) == []
    (made,) = clock.turn(minutes=1)
    assert (made.title, made.priority, made.tags, made.metadata) == ("Triage", "LOW", ["t"], {"a": [1, None]})
    assert (made.created_by, made.orchestrator, made.discipline) == ("schedule:nightly", "vp-a", "eng")
    assert clock.turn() == []
    assert clock.told() == [("schedule_fired", "")]
    assert clock.fire(desk.store).next_us == desk.now + HOUR_US


def test_a_clock_that_jumps_back_fires_nothing_twice(desk: Desk) -> None:
    """And one that jumps forward is caught up with."""
    clock = Clockwork(desk, overlap="queue", catch_up="all")
    clock.turn()
    assert len(clock.turn(minutes=150)) == 2
    assert clock.turn(minutes=-100) == []
    assert clock.turn(minutes=100) == []
    assert len(clock.turn(minutes=30)) == 1


@pytest.mark.parametrize(("catch_up", "made"), [("none", 0), ("last", 1), ("all", 5)])
def test_after_a_time_without_a_control_plane(desk: Desk, catch_up: str, made: int) -> None:
    """Missed moments are caught up with as declared, and what is not is told."""
    clock = Clockwork(desk, overlap="queue", catch_up=catch_up)
    clock.turn()
    assert len(clock.turn(minutes=5 * 60 + 30)) == made
    assert [kind for kind, _ in clock.told()].count("schedule_fired") == made
    skipped = [reason for kind, reason in clock.told() if kind == "schedule_skipped"]
    expected = {
        "none": ["nobody was there at 2026-01-01T05:00:00.000000Z; catch_up is none"],
        "last": ["4 older moments have passed; catch_up is last"],
        "all": [],
    }
    assert skipped == expected[catch_up]


def test_catching_up_has_a_limit_and_says_how_many_were_dropped(desk: Desk) -> None:
    """The newest are made."""
    clock = Clockwork(desk, cron="* * * * *", overlap="queue", catch_up="all")
    clock.turn()
    assert len(clock.turn(minutes=250)) == MAX_CAUGHT_UP
    kind, reason = clock.told()[0]
    assert (kind, reason) == ("schedule_skipped", "150 older moments have passed; at most 100 are caught up with")


def test_while_the_last_one_is_open_the_next_is_skipped(desk: Desk) -> None:
    """Also when it waits, blocked; the event names it."""
    clock = Clockwork(desk)
    clock.turn()
    (first,) = clock.turn(minutes=60)
    assert clock.turn(minutes=60) == []
    desk.set_status(first, "BLOCKED")
    assert clock.turn(minutes=60) == []
    assert clock.told()[1:] == [("schedule_skipped", f"{first.id} is still open; overlap is skip")] * 2
    desk.cancel(first)
    assert len(clock.turn(minutes=60)) == 1


def test_or_it_is_queued_behind_it(desk: Desk) -> None:
    """Each moment has its task."""
    clock = Clockwork(desk, overlap="queue")
    clock.turn()
    assert [len(clock.turn(minutes=60)) for _ in range(3)] == [1, 1, 1]
    assert len(desk.claim(limit=5)) == 3


def test_or_it_replaces_it(desk: Desk) -> None:
    """The open one is cancelled, whatever it does."""
    clock = Clockwork(desk, overlap="replace", catch_up="all")
    clock.turn()
    (first,) = clock.turn(minutes=60)
    (grant,) = desk.claim()
    assert grant.task.id == first.id
    (second,) = clock.turn(minutes=180)
    assert desk.get(first).status == "CANCELLED"
    assert desk.events(first)[-1].data["reason"] == f"{second.id} of schedule nightly replaces it"
    assert desk.events(first)[-1].actor == "schedule:nightly"
    desk.finish(desk.claim()[0])
    (third,) = clock.turn(minutes=60)
    assert desk.get(second).status == "DONE"
    assert desk.get(third).status == "TODO"


def test_a_purged_task_is_not_open(desk: Desk) -> None:
    """The schedule goes on."""
    clock = Clockwork(desk)
    clock.turn()
    (first,) = clock.turn(minutes=60)
    desk.cancel(first)
    desk._write(life.purge, task_id=first.id)
    assert len(clock.turn(minutes=60)) == 1


def test_another_line_starts_anew_and_another_task_does_not(desk: Desk) -> None:
    """Nothing is caught up with from before a line was declared."""
    clock = Clockwork(desk, overlap="queue", catch_up="all")
    clock.turn()
    desk.clock.advance(3 * 3600)
    clock.declare(cron="* * * * *", overlap="queue", catch_up="all")
    assert clock.turn() == []
    desk.clock.advance(120)
    clock.declare(cron="* * * * *", overlap="queue", catch_up="all", task={"title": "Other"})
    assert [task.title for task in clock.turn()] == ["Other", "Other"]


def test_one_that_comes_back_starts_anew(desk: Desk) -> None:
    """Its row went when it was no longer declared."""
    clock = Clockwork(desk, catch_up="all", overlap="queue")
    clock.turn()
    desk.store.write_sync(lambda c: schedules.forget(c, [clock.schedule]))
    assert len(clock.turn(minutes=60)) == 1
    desk.store.write_sync(lambda c: schedules.forget(c, []))
    assert clock.turn(minutes=180) == []
    assert len(clock.turn(minutes=60)) == 1


def test_a_task_that_can_not_be_made_is_told_once(desk: Desk) -> None:
    """Its moment has passed."""
    clock = Clockwork(desk, task={"orchestrator": "vp-gone"})
    clock.turn()
    assert clock.turn(minutes=60) == []
    assert clock.turn(minutes=1) == []
    ((kind, reason),) = clock.told()
    assert kind == "schedule_skipped"
    assert "vp-gone" in reason


def test_what_is_due_next_is_known_of_all_but_those_that_can_not_be_read(desk: Desk) -> None:
    """A wrong line stops nobody else; a new schedule is due at once, so that it is written down."""
    clock = Clockwork(desk)
    clock.turn()
    clock.declare(task={"title": "Same clock"})
    wrong, new = replace(clock.schedule, name="wrong", cron="61 * * * *"), replace(clock.schedule, name="new")
    desk.clock.advance(60)
    found = desk.store.read_sync(lambda c: schedules.upcoming(c, [clock.schedule, wrong, new], now_us=desk.now))
    assert (found["nightly"], found["new"]) == (desk.now - 60 * SECOND_US + HOUR_US, desk.now)
    assert isinstance(found["wrong"], ValueError)


@pytest.fixture
def second_store(desk: Desk) -> Iterator[Store]:
    """Another control plane's door to the same database; the same one where only one may write."""
    if desk.store.url.startswith("sqlite"):
        yield desk.store
        return
    store = open_store(desk.store.url)
    yield store
    store.close()


def test_several_control_planes_fire_each_moment_once(desk: Desk, second_store: Store) -> None:
    """All at the same moment, from the first time on."""
    clock = Clockwork(desk, overlap="queue", catch_up="all")
    for hours in (0, 1, 3, 1):
        desk.clock.advance(3600 * hours)
        ready = threading.Barrier(4)
        made: list[TaskRow] = []

        def fire(store: Store, ready: threading.Barrier = ready, made: list[TaskRow] = made) -> None:
            ready.wait()
            made += clock.turn(store=store)

        threads = [threading.Thread(target=fire, args=(store,)) for store in (desk.store, second_store) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == hours
    assert desk.page(limit=1).total == 5


def test_a_task_that_ends_as_it_is_replaced_stops_no_schedule(
    desk: Desk, second_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who fires holds it from the look on: its report is late, or it is not replaced."""
    clock = Clockwork(desk, overlap="replace")
    clock.turn()
    (first,) = clock.turn(minutes=60)
    (grant,) = desk.claim(first.orchestrator or "")
    late: list[Exception] = []

    def report() -> None:
        try:
            known = {"task_id": first.id, "token": grant.token, "retry": RETRY, "roll": 0.5}
            second_store.write_sync(lambda c: life.finish(c, outcome="done", actor="k-test", now_us=desk.now, **known))
        except LeaseLost as lost:
            late.append(lost)

    reporting = threading.Thread(target=report)

    def create_and_wait(*args: Any, **fields: Any) -> TaskRow:
        reporting.start()
        reporting.join(0.3)
        return life.create_task(*args, **fields)

    monkeypatch.setattr(schedules, "create_task", create_and_wait)
    (second,) = clock.turn(minutes=60)
    reporting.join()
    assert len(late) == 1
    assert (desk.get(first).status, desk.get(second).status) == ("CANCELLED", "TODO")
