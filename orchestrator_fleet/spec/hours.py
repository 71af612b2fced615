"""Working hours as people write them: `Mon-Fri 08:00-18:00, Sat 10:00-12:00`.

Each part is days (one, a range, or none for every day) and a span of the day; a span that ends before it
starts goes on into the next day.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache

from orchestrator_fleet.clock import SECOND_US, from_datetime

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
MAX_WINDOWS = 50
MAX_DAYS = 15  # spring may swallow one week's only window, and not the next one's too
_MINUTE_US = 60 * SECOND_US
_PART = re.compile(
    r"(?:([A-Za-z]{3})(?:\s*-\s*([A-Za-z]{3}))?\s+)?([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Open on these weekdays (0 is Monday) from a minute of the day to another, which may be the next day's."""

    days: frozenset[int]
    from_minute: int
    to_minute: int

    def holds(self, *, weekday: int, minute: int) -> bool:
        """Whether it is open at a minute of a weekday."""
        if self.from_minute < self.to_minute:
            return weekday in self.days and self.from_minute <= minute < self.to_minute
        started_yesterday = (weekday - 1) % 7 in self.days and minute < self.to_minute
        return started_yesterday or (weekday in self.days and minute >= self.from_minute)


def parse_hours(text: str) -> tuple[Window, ...]:
    """The windows of a text; raises ValueError that says what is wrong with which part."""
    parts = text.split(",")
    if len(parts) > MAX_WINDOWS:
        raise ValueError(f"has {len(parts)} parts, the limit is {MAX_WINDOWS}")
    return tuple(_window(part.strip()) for part in parts)


def is_open(windows: tuple[Window, ...], *, weekday: int, minute: int) -> bool:
    """Whether any window holds a minute (of the day) of a weekday (0 is Monday)."""
    return any(window.holds(weekday=weekday, minute=minute) for window in windows)


def _window(part: str) -> Window:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(f"got {part!r}, wanted days and a span such as Mon-Fri 08:00-18:00")
    start, end = _minute(match[3], match[4]), _minute(match[5], match[6])
    if start == end:
        raise ValueError(f"{part!r} starts and ends at the same minute; for the whole day write 00:00-24:00")
    if start == DAY_MINUTES:
        raise ValueError(f"{part!r} starts at 24:00; write 00:00 of the next day")
    return Window(days=_days(match[1], match[2]), from_minute=start, to_minute=end)


def _minute(hour: str, minute: str) -> int:
    value = int(hour) * 60 + int(minute)
    if int(minute) > 59 or value > DAY_MINUTES:  # noqa: PLR2004 - a clock's face
        raise ValueError(f"got {hour}:{minute}, wanted a time from 00:00 to 24:00")
    return value


def _days(first: str | None, last: str | None) -> frozenset[int]:
    if first is None:
        return frozenset(range(7))
    start = _day(first)
    end = _day(last) if last is not None else start
    return frozenset((start + step) % 7 for step in range((end - start) % 7 + 1))


def _day(text: str) -> int:
    name = text.capitalize()
    if name not in DAYS:
        raise ValueError(f"got the day {text!r}, wanted one of {', '.join(DAYS)}")
    return DAYS.index(name)


def is_open_at(windows: tuple[Window, ...], *, timezone: str, now_us: int) -> bool:
    """Whether the zone's clock on the wall shows a time inside a window."""
    local = _local(now_us, _zone(timezone))
    return is_open(windows, weekday=local.weekday(), minute=local.hour * 60 + local.minute)


def opens_at(windows: tuple[Window, ...], *, timezone: str, now_us: int) -> int | None:
    """The first moment from now on at which it is open (microseconds): `now_us` itself when it is.

    The wall's clock decides: a window that begins in the hour that spring skips opens when the clock has jumped over
    its beginning, and one that lies in the hour that autumn repeats is open twice. None: not within MAX_DAYS.
    """
    if is_open_at(windows, timezone=timezone, now_us=now_us):
        return now_us
    return _opens_after(windows, timezone, now_us // _MINUTE_US)


@lru_cache(maxsize=1_024)
def _opens_after(windows: tuple[Window, ...], timezone: str, minute: int) -> int | None:
    """It changes with the minute only: those who ask meanwhile get what is known."""
    now_us, zone = minute * _MINUTE_US, _zone(timezone)
    today = _local(now_us, zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    days = [today + timedelta(days=step) for step in range(MAX_DAYS + 1)]
    begins = {
        from_datetime((day + timedelta(minutes=window.from_minute)).replace(tzinfo=zone, fold=fold))
        for day in days
        for window in windows
        if day.weekday() in window.days
        for fold in (0, 1)
    }
    candidates = sorted(at_us for at_us in begins | set(_jumps(zone, now_us)) if at_us > now_us)
    return next((at_us for at_us in candidates if is_open_at(windows, timezone=timezone, now_us=at_us)), None)


def _jumps(zone: tzinfo, from_us: int) -> Iterator[int]:
    """The minutes within MAX_DAYS at which the wall's clock jumps."""
    for day in range(MAX_DAYS + 1):
        early, late = from_us // _MINUTE_US + day * DAY_MINUTES, from_us // _MINUTE_US + (day + 1) * DAY_MINUTES
        if _offset(early, zone) == _offset(late, zone):
            continue
        while late - early > 1:
            middle = (early + late) // 2
            early, late = (middle, late) if _offset(middle, zone) == _offset(early, zone) else (early, middle)
        yield late * _MINUTE_US


def _offset(minute: int, zone: tzinfo) -> timedelta | None:
    return _local(minute * _MINUTE_US, zone).utcoffset()


def _local(now_us: int, zone: tzinfo) -> datetime:
    return datetime.fromtimestamp(now_us // SECOND_US, zone)


@lru_cache(maxsize=1_024)
def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    from zoneinfo import ZoneInfo  # noqa: PLC0415 - most fleets keep UTC

    return ZoneInfo(name)
