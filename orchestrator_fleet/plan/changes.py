"""What differs between two JSON values, field by field, as a person reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from orchestrator_fleet.plan.model import FieldChange
from orchestrator_fleet.wire.documents import encode

MAX_VALUE_CHARACTERS = 200
SHORT_DIGEST = 8

# Lists whose order says nothing: their changes are shown entry by entry.
_SETS = frozenset(
    {
        "always_reject",
        "auto_approve",
        "avoid",
        "constraints",
        "escalate",
        "files",
        "responsibilities",
        "rooms",
        "scopes",
        "tags",
    }
)


def between(before: Any, after: Any, *, path: str = "") -> tuple[FieldChange, ...]:
    """`+` added, `-` removed, `~` changed, in the order of the paths; values are shortened."""
    return tuple(_walk(before, after, path))


def text_changed(path: str, before: bytes, after: bytes) -> FieldChange:
    """A changed text, as line counts: texts never stand in a plan."""
    old, new = Counter(before.splitlines()), Counter(after.splitlines())
    fresh, gone = (new - old).total(), (old - new).total()
    return FieldChange(
        op="~", path=path, before=f"{old.total()} lines", after=f"{new.total()} lines ({fresh} new, {gone} gone)"
    )


def digest_shown(digest: str) -> str:
    """The first digits of a SHA-256."""
    return digest[:SHORT_DIGEST]


def _walk(before: Any, after: Any, path: str) -> Iterator[FieldChange]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{path}.{key}" if path else key
            if key not in before:
                yield from _new(after[key], inner)
            elif key not in after:
                yield FieldChange(op="-", path=inner, before=shown(before[key]))
            else:
                yield from _walk(before[key], after[key], inner)
    elif before is None and after is not None:
        yield from _new(after, path)
    elif after is None and before is not None:
        yield FieldChange(op="-", path=path, before=shown(before))
    elif _is_set(path, before) and _is_set(path, after) and set(before) != set(after):
        yield from (FieldChange(op="-", path=path, before=shown(item)) for item in before if item not in set(after))
        yield from (FieldChange(op="+", path=path, after=shown(item)) for item in after if item not in set(before))
    elif type(before) is not type(after) or before != after:
        yield FieldChange(op="~", path=path, before=shown(before), after=shown(after))


def _new(value: Any, path: str) -> Iterator[FieldChange]:
    """A value that was not there, without the parts of it that say nothing."""
    parts = sorted(value.items()) if isinstance(value, dict) else []
    said = [(key, inner) for key, inner in parts if inner not in (None, [], {})]
    for key, inner in said:
        yield from _new(inner, f"{path}.{key}")
    if not said:
        yield FieldChange(op="+", path=path, after=shown(value))


def _is_set(path: str, value: Any) -> bool:
    return path.rpartition(".")[2] in _SETS and isinstance(value, list) and all(isinstance(item, str) for item in value)


def shown(value: Any) -> Any:
    """A value short enough for a plan: long texts are cut, large structures counted."""
    if isinstance(value, str):
        cut = f"{value[:MAX_VALUE_CHARACTERS]}... ({len(value)} characters)"
        return value if len(value) <= MAX_VALUE_CHARACTERS else cut
    if isinstance(value, list | dict) and len(encode(value)) > MAX_VALUE_CHARACTERS:
        return f"({len(value)} entries)"
    return value
