"""Identifiers: sortable by time of making, never guessable, safe in a path and a URL."""

from __future__ import annotations

import re
import secrets

NAME_PATTERN = r"[a-z][a-z0-9-]{0,62}"
_NAME = re.compile(NAME_PATTERN)
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]


def is_name(text: str) -> bool:
    """Whether `text` follows the grammar of every declared name."""
    return _NAME.fullmatch(text) is not None


def new_id(prefix: str, now_us: int) -> str:
    """`<prefix>-` and 26 characters: 48 bits of milliseconds, then 80 random bits (the ULID layout)."""
    value = ((now_us // 1000) & (1 << 48) - 1) << 80 | secrets.randbits(80)
    digits = "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])
    return f"{prefix}-{digits}"


def new_token() -> str:
    """128 random bits as text: an attempt's fencing token."""
    return secrets.token_hex(16)
