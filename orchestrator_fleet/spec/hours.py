"""Working hours as people write them: `Mon-Fri 08:00-18:00, Sat 10:00-12:00`.

Each part is days (one, a range, or none for every day) and a span of the day; a span that ends before it
starts goes on into the next day.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
MAX_WINDOWS = 50
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
