"""What changes on the control plane: keys, routing, limits and settings, from one control.json to the next.

Orchestrators are not told again here: what changes about them stands under their machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from orchestrator_fleet.clock import from_datetime
from orchestrator_fleet.plan import changes
from orchestrator_fleet.plan.model import CONTROL_PLANE, Action, FieldChange
from orchestrator_fleet.wire.documents import CONTROL

_ORCHESTRATORS = "orchestrators"


class _Control(msgspec.Struct, kw_only=True, frozen=True):
    """A control.json whose spec is only split into sections: equal bytes are equal sections."""

    spec: dict[str, msgspec.Raw]
    placements: dict[str, str]
    charters: dict[str, str]


class _Key(msgspec.Struct, kw_only=True, frozen=True):
    """A key of fleet.yaml, as control.json has it."""

    owner: str
    sha256: str
    scopes: tuple[str, ...]
    created: datetime | None = None
    expires: datetime | None = None
    revoked: datetime | None = None


def between(before: bytes | None, after: bytes) -> list[Action]:
    """One `write` for each thing that changed; at least one.

    `before` is the control.json in force; None when it was not looked at, or was changed by hand.
    """
    new = msgspec.json.decode(after, type=_Control)
    try:
        old = msgspec.json.decode(before, type=_Control) if before is not None else None
    except msgspec.DecodeError:
        old = None
    if old is None:
        return [_write(CONTROL, "settings", "what is in it now cannot be told")]
    changed = [name for name in sorted(old.spec.keys() | new.spec.keys()) if old.spec.get(name) != new.spec.get(name)]
    actions = [action for name in changed for action in _section(name, _load(old, name), _load(new, name))]
    actions += _orchestrators(old, new)
    return actions or [_write(CONTROL, "settings", "it is written in another form")]


def _write(subject: str, change: str, reason: str, fields: tuple[FieldChange, ...] = ()) -> Action:
    return Action(target=CONTROL_PLANE, subject=subject, kind="write", change=change, reason=reason, fields=fields)


def _section(name: str, before: Any, after: Any) -> Iterator[Action]:
    """What changed in one section of fleet.yaml."""
    if name == "keys":
        yield from _keys(_table(before), _table(after))
    elif name == "routing":
        yield from _rules(name, "route", before, after)
    elif name == "limits":
        yield from _rules(name, "limit", before, after)
    elif name != _ORCHESTRATORS:
        fields = changes.between(before, after, path=name)
        yield _write(name, "settings", _paths(fields), fields)


def _keys(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Action]:
    old = {key_id: _read_key(raw) for key_id, raw in before.items()}
    new = {key_id: _read_key(raw) for key_id, raw in after.items()}
    leaving = [
        key_id for key_id in sorted(old) if key_id in new and not _revoked(old[key_id]) and _revoked(new[key_id])
    ]
    for key_id in sorted(new.keys() - old.keys()):
        previous = next((other for other in leaving if _owner(new[other]) == _owner(new[key_id])), None)
        fields = _key_fields(key_id, None, after[key_id])
        if previous is None:
            yield _write(f"key:{key_id}", "key_added", f"a new key of {_owner(new[key_id])}", fields)
            continue
        leaving.remove(previous)
        fields += _key_fields(previous, before[previous], after[previous])
        until = after[previous]["revoked"]
        reason = f"replaces {previous} of {_owner(new[key_id])}, which works until {until}"
        yield _write(f"key:{key_id}", "key_rotated", reason, fields)
        old.pop(previous)
    for key_id in sorted(old.keys() - new.keys()):
        if key_id not in after:
            yield _write(f"key:{key_id}", "key_removed", "fleet.yaml no longer names it")
    for key_id in sorted(old.keys() & new.keys()):
        if before[key_id] != after[key_id]:
            change, reason = _key_change(old[key_id], new[key_id])
            fields = _key_fields(key_id, before[key_id], after[key_id])
            yield _write(f"key:{key_id}", change, reason, fields)


def _key_change(old: _Key | None, new: _Key | None) -> tuple[str, str]:
    """(change, reason) of a key that stays."""
    if old is None or new is None:
        return "key_changed", "it could not be read before"
    if old.revoked is None and new.revoked is not None:
        return "key_revoked", f"revoked at {new.revoked.isoformat()}"
    if old.sha256 != new.sha256:
        return "key_rotated", "it has a new secret under the same id"
    more, fewer = sorted(set(new.scopes) - set(old.scopes)), sorted(set(old.scopes) - set(new.scopes))
    gained, lost = [f"scope {scope}" for scope in more], [f"scope {scope}" for scope in fewer]
    for word, was, now in (("expires", old.expires, new.expires), ("revoked", old.revoked, new.revoked)):
        if was != now:
            longer = now is None or (was is not None and from_datetime(now) > from_datetime(was))
            (gained if longer else lost).append(f"{word} {'later' if longer else 'sooner'}")
    parts = [f"gained: {', '.join(gained)}"] if gained else []
    parts += [f"lost: {', '.join(lost)}"] if lost else []
    if not parts:
        return "key_changed", "its owner or date changed"
    return "authority_gained" if gained else "authority_lost", f"authority {'; '.join(parts)}"


def _read_key(raw: Any) -> _Key | None:
    try:
        return msgspec.convert(raw, _Key)
    except msgspec.ValidationError:
        return None


def _revoked(key: _Key | None) -> bool:
    return key is not None and key.revoked is not None


def _owner(key: _Key | None) -> str:
    return key.owner if key else "nobody"


def _key_fields(key_id: str, before: Any, after: Any) -> tuple[FieldChange, ...]:
    """A key's fields, its hash cut short."""
    return changes.between(_without_hash(before), _without_hash(after), path=f"keys.{key_id}")


def _without_hash(raw: Any) -> Any:
    if isinstance(raw, dict) and isinstance(raw.get("sha256"), str):
        return {**raw, "sha256": changes.digest_shown(raw["sha256"])}
    return raw


def _rules(section: str, word: str, before: Any, after: Any) -> Iterator[Action]:
    """Named rules in a list whose order counts."""
    old, new = _by_name(before), _by_name(after)
    places = {name: f"{place} of {len(new)}" for place, name in enumerate(new, 1)}
    for name in sorted(old.keys() | new.keys()):
        subject, path = f"{word}:{name}", f"{section}.{name}"
        if name not in old:
            fields = changes.between(None, new[name], path=path)
            yield _write(subject, section, f"a new {word}, {places[name]}", fields)
        elif name not in new:
            yield _write(subject, section, "fleet.yaml no longer names it")
        elif old[name] != new[name]:
            fields = changes.between(old[name], new[name], path=path)
            yield _write(subject, section, _paths(fields), fields)
    stayed = [name for name in old if name in new], [name for name in new if name in old]
    if stayed[0] != stayed[1]:
        order = FieldChange(op="~", path=section, before=changes.shown(list(old)), after=changes.shown(list(new)))
        yield _write(section, section, "the order changed, and the first match wins", (order,))


def _load(doc: _Control, section: str) -> Any:
    return msgspec.json.decode(doc.spec[section]) if section in doc.spec else None


def _orchestrators(old: _Control, new: _Control) -> Iterator[Action]:
    was, now = _each_orchestrator(old), _each_orchestrator(new)
    names = was.keys() | now.keys() | old.placements.keys() | new.placements.keys()
    changed = [
        name
        for name in names
        if was.get(name) != now.get(name)
        or old.placements.get(name) != new.placements.get(name)
        or old.charters.get(name) != new.charters.get(name)
    ]
    if changed:
        noun = "orchestrator has" if len(changed) == 1 else "orchestrators have"
        yield _write(_ORCHESTRATORS, "settings", f"{len(changed)} {noun} changed; each stands under its machine")


def _each_orchestrator(doc: _Control) -> dict[str, msgspec.Raw]:
    """Each one's part of the spec, not decoded."""
    try:
        return msgspec.json.decode(doc.spec.get(_ORCHESTRATORS, b"{}"), type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return {}


def _paths(fields: tuple[FieldChange, ...]) -> str:
    """A reason that names the field, when there is one."""
    if not fields:
        return "it is written in another form"
    return f"{fields[0].path} changed" if len(fields) == 1 else f"{len(fields)} fields changed"


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _by_name(rules: Any) -> dict[str, Any]:
    """Rules by name, in the order of the list."""
    entries = rules if isinstance(rules, list) else []
    return {str(rule["name"]): rule for rule in entries if isinstance(rule, dict) and "name" in rule}
