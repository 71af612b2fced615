"""How an orchestrator did: which windows to look at, one question for all of them, and the answer as the API gives it.

What is counted, and how, stands in `analytics.sql` alone. Pure but for `look`, which asks by what it is given.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any, get_args

from orchestrator_fleet.clock import SECOND_US, from_datetime, to_rfc3339
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.history.sql import Result
from orchestrator_fleet.wire.vps import Bucket, Range

Ask = Callable[[str, Sequence[Any], int], Awaitable[Result]]

MAX_BUCKETS = 2_200
# Less than this share more or less is as it was.
STEADY = 0.1

_DAY_US = 86_400 * SECOND_US
_SPANS_US: Mapping[str, int] = {"24h": _DAY_US, "7d": 7 * _DAY_US, "30d": 30 * _DAY_US, "90d": 90 * _DAY_US}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = "SELECT epoch_us(min(happened_at)) FROM events WHERE orchestrator = $1"
_METRICS = "SELECT * FROM analytics_of_windows($1, $2::TIMESTAMPTZ[], $3::TIMESTAMPTZ[])"


@dataclass(frozen=True, slots=True)
class Window:
    """From `since_us` (in it) to `until_us` (not in it), microseconds since 1970."""

    since_us: int
    until_us: int


async def look(ask: Ask, orchestrator: str, *, span: Range, bucket: Bucket, now_us: int) -> dict[str, Any]:
    """The orchestrator's analytics up to `now_us`. `ask` answers a query, its parameters and the most rows wanted.

    Raises Invalid when the span has more buckets than MAX_BUCKETS.
    """
    ((first_us,),) = (await ask(_FIRST, [orchestrator], 1)).rows
    whole = window(span, first_us=first_us, now_us=now_us)
    before = None if span == "all" else Window(2 * whole.since_us - whole.until_us, whole.since_us)
    buckets = split(whole, bucket)
    windows = [whole, *([] if before is None else [before]), *buckets]
    found = await ask(_METRICS, [orchestrator, *_bounds(windows)], len(windows))
    summary, *others = [dict(zip(found.columns[1:], row[1:], strict=True)) for row in found.rows]
    previous = None if before is None else others.pop(0)
    is_known_before = first_us is not None and first_us < whole.since_us
    return {
        "range": span,
        "bucket": bucket,
        "from": None if whole.since_us == whole.until_us else to_rfc3339(whole.since_us),
        "to": to_rfc3339(whole.until_us),
        "summary": summary,
        "series": [
            {"start": to_rfc3339(of.since_us), "end": to_rfc3339(of.until_us), **metrics}
            for of, metrics in zip(buckets, others, strict=True)
        ],
        "trend": trends(summary, previous if is_known_before else None),
        "previous": previous,
    }


def window(span: Range, *, first_us: int | None, now_us: int) -> Window:
    """The window of a span that ends now; `all` begins with the orchestrator's first event, or is empty without one."""
    if span == "all":
        return Window(now_us if first_us is None else min(first_us, now_us), now_us)
    return Window(now_us - _SPANS_US[span], now_us)


def split(whole: Window, bucket: Bucket) -> list[Window]:
    """The window by hours, days, weeks from Monday or months of UTC; the first and the last may be a part of one.

    Raises Invalid when there are more than MAX_BUCKETS.
    """
    if fits(whole, bucket):
        return list(_split(whole, bucket))
    coarser = get_args(Bucket)[get_args(Bucket).index(bucket) + 1 :]
    better = next((one for one in coarser if fits(whole, one)), None)
    cure = "take a shorter range" if better is None else f"take {better}"
    raise Invalid([("bucket", f"got {bucket}: the range has more than {MAX_BUCKETS} of them; {cure}")])


def fits(whole: Window, bucket: Bucket) -> bool:
    """Whether the window has at most MAX_BUCKETS of these."""
    return sum(1 for _ in islice(_split(whole, bucket), MAX_BUCKETS + 1)) <= MAX_BUCKETS


def trends(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Each metric against the span before: up, down, stable, or None where one of them is not known.

    Of percentiles the median counts.
    """
    return {name: _trend(_number(value), _number((before or {}).get(name))) for name, value in now.items()}


def _trend(now: float | None, before: float | None) -> str | None:
    if now is None or before is None:
        return None
    if abs(now - before) <= STEADY * abs(before):
        return "stable"
    return "up" if now > before else "down"


def _number(value: Any) -> float | None:
    number: float | None = value["p50"] if isinstance(value, Mapping) else value
    return number


def _bounds(windows: Sequence[Window]) -> tuple[list[datetime], list[datetime]]:
    return [_time(one.since_us) for one in windows], [_time(one.until_us) for one in windows]


def _time(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)


def _split(whole: Window, bucket: Bucket) -> Iterator[Window]:
    for since_us, until_us in pairwise(_edges(whole, bucket)):
        yield Window(since_us, until_us)


def _edges(whole: Window, bucket: Bucket) -> Iterator[int]:
    at_us = whole.since_us
    while at_us < whole.until_us:
        yield at_us
        at_us = from_datetime(_next(_time(at_us), bucket))
    yield whole.until_us


def _next(at: datetime, bucket: Bucket) -> datetime:
    """The first beginning of a bucket after `at`."""
    hour = at.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    match bucket:
        case "hour":
            return hour + timedelta(hours=1)
        case "day":
            return day + timedelta(days=1)
        case "week":
            return day + timedelta(days=7 - day.weekday())
        case "month":
            return (day.replace(day=1) + timedelta(days=32)).replace(day=1)
