"""Durations, sizes and shares as people write them: `90s`, `512MiB`, `25%`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)(ms|s|m|h|d)")
_SIZE = re.compile(r"(\d{1,15})(B|KiB|MiB|GiB|TiB)")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,3})?)%")


def parse_duration(value: Any) -> float:
    """`"1.5h"` -> 5400.0 seconds. A bare 0 is 0; any other bare number has no unit and is refused."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"got {value!r}, wanted a duration such as 90s, 15m, 2h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """5400.0 -> `"90m"`: the largest unit that leaves a whole number."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / _SECONDS[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds:g}s" if seconds else "0s"


def parse_size(value: Any) -> int:
    """`"512MiB"` -> 536870912 bytes."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"got {value!r}, wanted a size such as 64KiB, 512MiB or 2GiB")
    return int(match[1]) * _BYTES[match[2]]


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
        raise ValueError(f"got {value!r}, wanted a share such as 25%")
    return float(match[1]) / 100


def format_share(share: float) -> str:
    """0.25 -> `"25%"`."""
    return f"{share * 100:g}%"


def _schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$", "examples": [example]})


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    _schema(_DURATION.pattern, "15m"),
]
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size), _schema(_SIZE.pattern, "512MiB")]
Share = Annotated[float, BeforeValidator(parse_share), PlainSerializer(format_share), _schema(_SHARE.pattern, "25%")]
