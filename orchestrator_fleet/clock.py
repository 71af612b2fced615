"""Time as an argument. Everything that decides takes `now`; only doors ask the system.

Inside, an instant is an integer of microseconds since 1970 UTC (`_us`): exact, sortable, the same in
SQLite, PostgreSQL, msgspec and DuckDB. At the borders it is RFC 3339 text.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Protocol

SECOND_US = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Clock(Protocol):
    """Where the time comes from."""

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""


class SystemClock:
    """The machine's own clock."""

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""
        return time.time_ns() // 1000


class SteadyClock:
    """A clock that no step of the machine's own moves: it was set once, and counts from there until it is set again."""

    def __init__(self) -> None:
        self._ahead_us = 0
        self.set(SystemClock().now_us())

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""
        return time.monotonic_ns() // 1000 + self._ahead_us

    def set(self, now_us: int) -> None:
        """It is this late now."""
        self._ahead_us = now_us - time.monotonic_ns() // 1000


class FrozenClock:
    """A clock that moves only when told; for tests and simulations."""

    def __init__(self, now_us: int = 1_767_225_600 * SECOND_US) -> None:
        self._now_us = now_us

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""
        return self._now_us

    def advance(self, seconds: float) -> None:
        """Move forward (or back, if negative)."""
        self._now_us += int(seconds * SECOND_US)


def to_rfc3339(us: int) -> str:
    """`1767225600000000` -> `2026-01-01T00:00:00.000000Z`."""
    second, rest = divmod(us, SECOND_US)
    return f"{_second(second)}.{rest:06d}Z"


@lru_cache(maxsize=4096)
def _second(second: int) -> str:
    """A whole second as text. Kept, as every event tells times that were told a moment ago."""
    return (_EPOCH + timedelta(seconds=second)).isoformat()[: -len("+00:00")]


def from_datetime(value: datetime) -> int:
    """Microseconds since 1970 UTC of an aware datetime; a naive one counts as UTC."""
    aware = value if value.tzinfo else value.replace(tzinfo=UTC)
    delta = aware - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * SECOND_US + delta.microseconds
