"""Working hours: what people write and when it is open."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import given

from orchestrator_fleet.clock import from_datetime, to_rfc3339
from orchestrator_fleet.spec.hours import DAYS, is_open, is_open_at, opens_at, parse_hours

MON, FRI, SAT, SUN = 0, 4, 5, 6


def at(text: str, weekday: int, clock: str) -> bool:
    """Whether the hours are open on a weekday at `HH:MM`."""
    hour, minute = clock.split(":")
    return is_open(parse_hours(text), weekday=weekday, minute=int(hour) * 60 + int(minute))


@pytest.mark.parametrize(
    ("text", "weekday", "clock", "is_it"),
    [
        ("Mon-Fri 08:00-18:00", MON, "08:00", True),
        ("Mon-Fri 08:00-18:00", MON, "07:59", False),
        ("Mon-Fri 08:00-18:00", FRI, "17:59", True),
        ("Mon-Fri 08:00-18:00", FRI, "18:00", False),
        ("Mon-Fri 08:00-18:00", SAT, "12:00", False),
        ("Mon-Fri 08:00-18:00, Sat 10:00-12:00", SAT, "11:00", True),
        ("08:00-18:00", SUN, "12:00", True),
        ("sat - mon 8:00 - 9:00", SUN, "08:30", True),
        ("Sat-Mon 08:00-09:00", FRI, "08:30", False),
        ("Fri 22:00-06:00", FRI, "23:00", True),
        ("Fri 22:00-06:00", SAT, "05:59", True),
        ("Fri 22:00-06:00", SAT, "06:00", False),
        ("Fri 22:00-06:00", FRI, "05:00", False),
        ("Sun 22:00-06:00", MON, "05:00", True),
        ("Mon 00:00-24:00", MON, "23:59", True),
    ],
)
def test_hours_are_open_from_the_first_minute_to_before_the_last(text, weekday, clock, is_it):
    """Over midnight too, and over the week's end."""
    assert at(text, weekday, clock) is is_it


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "got '', wanted days and a span"),
        ("always", "got 'always', wanted days and a span"),
        ("Mon-Fri", "got 'Mon-Fri', wanted days and a span"),
        ("Mun 08:00-18:00", "got the day 'Mun', wanted one of Mon, Tue"),
        ("Mon 08:60-18:00", "got 08:60, wanted a time from 00:00 to 24:00"),
        ("Mon 08:00-24:01", "got 24:01, wanted a time from 00:00 to 24:00"),
        ("Mon 24:00-08:00", "starts at 24:00; write 00:00 of the next day"),
        ("Mon 08:00-08:00", "starts and ends at the same minute"),
        (",".join(["Mon 08:00-09:00"] * 51), "has 51 parts, the limit is 50"),
    ],
)
def test_what_is_no_hours_says_what_is_wanted(text, problem):
    """The text names the part that is wrong."""
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        parse_hours(text)


def us(text: str) -> int:
    """An instant, from RFC 3339."""
    return from_datetime(datetime.fromisoformat(text))


@pytest.mark.parametrize(
    ("text", "zone", "now", "opens"),
    [
        ("Mon-Fri 08:00-18:00", "UTC", "2026-01-03T12:00:00Z", "2026-01-05T08:00:00Z"),
        ("Mon-Fri 08:00-18:00", "Europe/Berlin", "2026-01-05T06:59:59Z", "2026-01-05T07:00:00Z"),
        ("Mon-Fri 08:00-18:00", "Europe/Berlin", "2026-01-05T07:00:00Z", "2026-01-05T07:00:00Z"),
        ("Mon-Fri 08:00-18:00", "Europe/Berlin", "2026-01-05T17:00:00Z", "2026-01-06T07:00:00Z"),
        ("Mon-Fri 08:00-18:00", "America/New_York", "2026-01-05T12:00:00Z", "2026-01-05T13:00:00Z"),
        ("Mon-Fri 08:00-18:00", "Asia/Kolkata", "2026-01-04T12:00:00Z", "2026-01-05T02:30:00Z"),
        ("Mon 08:00-09:00", "UTC", "2026-01-05T09:00:00Z", "2026-01-12T08:00:00Z"),
        ("Fri 22:00-06:00", "UTC", "2026-01-03T05:59:00Z", "2026-01-03T05:59:00Z"),
        ("Fri 22:00-06:00", "UTC", "2026-01-03T06:00:00Z", "2026-01-09T22:00:00Z"),
        ("Fri 22:00-06:00, Sat 12:00-13:00", "UTC", "2026-01-03T06:00:00Z", "2026-01-03T12:00:00Z"),
        # Spring: at 02:00 the clock in Berlin jumps to 03:00. What begins in between begins then.
        ("Sun 02:30-06:00", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-03-29T01:00:00Z"),
        ("Sun 02:10-02:50", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-04-05T00:10:00Z"),
        ("Sun 08:00-18:00", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-03-29T06:00:00Z"),
        ("Sun 02:30-03:30", "America/New_York", "2026-03-08T06:00:00Z", "2026-03-08T07:00:00Z"),
        # Autumn: at 03:00 it is 02:00 again. What lies in that hour is open twice.
        ("Sun 02:30-02:45", "Europe/Berlin", "2026-10-25T00:00:00Z", "2026-10-25T00:30:00Z"),
        ("Sun 02:30-02:45", "Europe/Berlin", "2026-10-25T00:45:00Z", "2026-10-25T01:30:00Z"),
        ("Sun 02:00-02:30", "Europe/Berlin", "2026-10-25T00:30:00Z", "2026-10-25T01:00:00Z"),
        ("Sun 08:00-18:00", "Europe/Berlin", "2026-10-25T00:00:00Z", "2026-10-25T07:00:00Z"),
    ],
)
def test_hours_open_when_the_clock_on_the_wall_says_so(text, zone, now, opens):
    """In the zone, over its two jumps a year, to the microsecond."""
    found = opens_at(parse_hours(text), timezone=zone, now_us=us(now))
    assert found is not None
    assert to_rfc3339(found) == to_rfc3339(us(opens))


ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca", "Asia/Kathmandu"]
MINUTE_US = 60_000_000


@st.composite
def hours_written(draw: st.DrawFn) -> str:
    """One or two parts, over midnight or not."""
    parts = []
    for _ in range(draw(st.integers(1, 2))):
        first, last = draw(st.sampled_from(DAYS)), draw(st.sampled_from(DAYS))
        start = draw(st.integers(0, 24 * 60 - 1))
        end = draw(st.integers(1, 24 * 60).filter(lambda minute, start=start: minute != start))
        parts.append(f"{first}-{last} {start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}")
    return ", ".join(parts)


@given(
    text=hours_written(),
    zone=st.sampled_from(ZONES),
    minute=st.integers(us("2026-01-01T00:00:00Z") // MINUTE_US, us("2027-01-01T00:00:00Z") // MINUTE_US),
)
def test_no_minute_before_the_opening_is_open_and_the_opening_is(text, zone, minute):
    """Against the wall's clock itself, asked minute by minute."""
    windows, now_us = parse_hours(text), minute * MINUTE_US
    found = opens_at(windows, timezone=zone, now_us=now_us)
    assert found is not None
    assert is_open_at(windows, timezone=zone, now_us=found)
    local = datetime.fromtimestamp(found // 1_000_000, UTC).astimezone(ZoneInfo(zone))
    assert is_open(windows, weekday=local.weekday(), minute=local.hour * 60 + local.minute)
    for before in range(now_us, found, MINUTE_US):
        assert not is_open_at(windows, timezone=zone, now_us=before)


def test_hours_that_spring_swallows_open_a_week_later():
    """The longest wait there is."""
    found = opens_at(parse_hours("Sun 02:10-02:50"), timezone="Europe/Berlin", now_us=us("2026-03-22T02:00:00Z"))
    assert found == us("2026-04-05T00:10:00Z")
