"""Where a page of a list ended, as a text that a client brings along for the next one: the list's own key."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from orchestrator_fleet.errors import Invalid

MAX_CHARS = 1_000
SAME_SORT = "a page with the same sort"


def write(key: Any) -> str:
    """A key as a text that stands in a URL as it is."""
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def read(text: str, kind: Any, *, of: str = "a page") -> Any:
    """The key, a `kind`, that `write` made a text of; Invalid, which says to take one `of` that, when it is none."""
    if len(text) <= MAX_CHARS:
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=kind)
        except (ValueError, msgspec.MsgspecError):
            pass
    raise wrong(of=of)


def wrong(*, of: str = "a page") -> Invalid:
    """What is said to a cursor of another list."""
    return Invalid([("cursor", f"it is not a cursor of this list; take `next_cursor` of {of}")])
