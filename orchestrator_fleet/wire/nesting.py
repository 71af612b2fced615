"""How deep a JSON value may go: what one reader can still read, a reader deeper in its stack can't."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other more than MAX_DEPTH times."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _nested_in(outer)]
        if not level:
            return False
    return True


def _nested_in(value: Any) -> list[Any]:
    """The lists and objects that stand in it."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in inside if isinstance(inner, dict | list)]
