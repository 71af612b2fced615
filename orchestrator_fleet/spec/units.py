"""Durations, sizes, shares and instants as people write them: `90s`, `512MiB`, `25%`, `2026-11-20T09:00:00Z`."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from orchestrator_fleet.spec.suggest import shown

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
MAX_DURATION_S = 3_650 * 86_400.0
MAX_SIZE = 1 << 50
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,16})(B|KiB|MiB|GiB|TiB)")
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%")


def parse_duration(value: Any) -> float:
    """`"1.5h"` -> 5400.0 seconds, to the microsecond and at most ten years.

    A bare 0 is 0; any other bare number has no unit and is refused.
    """
    if value == 0 and not isinstance(value, bool):
        return 0.0
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"got {shown(value)}, wanted a duration such as 90s, 15m, 2h or 7d")
    seconds = round(float(match[1]) * _SECONDS[match[2]], 6)
    if seconds > MAX_DURATION_S:
        raise ValueError(f"got {value!r}, wanted at most {format_duration(MAX_DURATION_S)}")
    return seconds


def format_duration(seconds: float) -> str:
    """5400.0 -> `"90m"`: the largest unit that leaves a whole number."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / _SECONDS[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"


def parse_size(value: Any) -> int:
    """`"512MiB"` -> 536870912 bytes."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"got {shown(value)}, wanted a size such as 64KiB, 512MiB or 2GiB")
    size = int(match[1]) * _BYTES[match[2]]
    if size > MAX_SIZE:
        raise ValueError(f"got {value!r}, wanted at most {format_size(MAX_SIZE)}")
    return size


def format_size(size: int) -> str:
    """536870912 -> `"512MiB"`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"


def parse_share(value: Any) -> float:
    """`"25%"` -> 0.25."""
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match is None or float(match[1]) > 100:  # noqa: PLR2004 - a share of a whole
        raise ValueError(f"got {shown(value)}, wanted a share such as 25%")
    return float(match[1]) / 100


def format_share(share: float) -> str:
    """0.25 -> `"25%"`."""
    return f"{share * 100:g}%"


def parse_instant(value: Any) -> datetime:
    """`"2026-11-20T09:00:00Z"` -> an aware datetime; without an offset it is UTC, a date is its midnight."""
    if isinstance(value, datetime):
        read = value
    else:
        try:
            read = datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise ValueError(f"got {shown(value)}, wanted a time such as 2026-11-20T09:00:00Z") from None
    return read if read.tzinfo is not None else read.replace(tzinfo=UTC)


def format_instant(value: datetime) -> str:
    """An aware datetime as RFC 3339 text in UTC: `2026-11-20T09:00:00Z`."""
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _schema(pattern: str, example: str, *, or_zero: bool = False) -> WithJsonSchema:
    text: dict[str, Any] = {"type": "string", "pattern": f"^{pattern}$", "examples": [example]}
    return WithJsonSchema({"anyOf": [text, {"const": 0}]} if or_zero else text)


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    _schema(_DURATION.pattern, "15m", or_zero=True),
]
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size), _schema(_SIZE.pattern, "512MiB")]
Share = Annotated[float, BeforeValidator(parse_share), PlainSerializer(format_share), _schema(_SHARE.pattern, "25%")]
Instant = Annotated[
    datetime,
    BeforeValidator(parse_instant),
    PlainSerializer(format_instant, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-11-20T09:00:00Z"]}),
]
