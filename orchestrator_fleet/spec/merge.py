"""Joining trees: included files into the main one, and `defaults` under every orchestrator.

Both work on nodes that know their places, so an error in a merged value still points at where it was written.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable

from pydantic import BaseModel

from orchestrator_fleet.errors import Diagnostic
from orchestrator_fleet.spec.model import FleetFile, Orchestrator
from orchestrator_fleet.spec.yaml_tree import Entry, ListNode, MappingNode, Node, ScalarNode, count, is_null, kind

MAX_DEFAULTS = 1_000


def _sections(*, wanted: type) -> frozenset[str]:
    """The keys of fleet.yaml that hold a mapping (a model or names to models), or a list."""

    def holds(annotation: object) -> bool:
        origin = typing.get_origin(annotation) or annotation
        if origin in {typing.Union, types.UnionType}:
            return any(holds(choice) for choice in typing.get_args(annotation))
        return origin is wanted or (wanted is dict and isinstance(origin, type) and issubclass(origin, BaseModel))

    return frozenset(name for name, field in FleetFile.model_fields.items() if holds(field.annotation))


MAPPINGS = _sections(wanted=dict)
LISTS = _sections(wanted=list) - {"include"}
_CAN_BE_SWITCHED_OFF = frozenset(name for name, field in Orchestrator.model_fields.items() if field.default is None)


def with_includes(main: MappingNode, included: Iterable[MappingNode]) -> tuple[MappingNode, list[Diagnostic]]:
    """One tree of all files: mappings join by key, lists follow each other, all else stands in the main file."""
    entries, problems = dict(main.entries), list[Diagnostic]()
    for tree in included:
        for key, entry in tree.entries.items():
            if key not in MAPPINGS | LISTS and key in FleetFile.model_fields:
                problems.append(_diagnostic(entry, key, "stands in an included file", f"move it to {main.at.file}"))
            elif key not in entries or is_null(entries[key].node):
                entries[key] = entry
            elif not is_null(entry.node):
                entries[key] = _joined(key, entries[key], entry, problems)
    return MappingNode(main.at, entries), problems


def _joined(key: str, first: Entry, more: Entry, problems: list[Diagnostic]) -> Entry:
    before, after = first.node, more.node
    if isinstance(before, MappingNode) and isinstance(after, MappingNode):
        names = dict(before.entries)
        for name, entry in after.entries.items():
            if name in names:
                place = names[name].key_at
                written = f"{place.file}:{place.line}:{place.column}"
                problems.append(
                    _diagnostic(entry, f"{key}.{name}", f"is declared twice, first at {written}", "keep one")
                )
            else:
                names[name] = entry
        return Entry(first.key_at, MappingNode(before.at, names))
    if isinstance(before, ListNode) and isinstance(after, ListNode):
        items = [*before.items.values(), *after.items.values()]
        return Entry(first.key_at, ListNode(before.at, dict(enumerate(items))))
    wanted = "a mapping" if key in MAPPINGS else "a list"
    problems.append(_diagnostic(more, key, f"got {kind(after)} here and {kind(before)} elsewhere, wanted {wanted}"))
    return first


def with_defaults(tree: MappingNode) -> tuple[MappingNode, list[Diagnostic]]:
    """`defaults` merged under every orchestrator: deep for mappings, the orchestrator's own values win.

    `runner` is replaced as a whole where its type differs; `machine` takes the place of a default placement;
    nobody escalates to themselves by default; and a key with nothing behind it switches an optional default off.
    """
    defaults, orchestrators = tree.child("defaults"), tree.entries.get("orchestrators")
    if not isinstance(defaults, MappingNode) or orchestrators is None:
        return tree, []
    if not isinstance(orchestrators.node, MappingNode):
        return tree, []
    size = count(defaults)
    if size > MAX_DEFAULTS:
        entry = tree.entries["defaults"]
        return tree, [_diagnostic(entry, "defaults", f"has {size} values, the limit is {MAX_DEFAULTS}", "write less")]
    merged = {
        name: Entry(entry.key_at, _orchestrator(name, defaults, entry.node))
        for name, entry in orchestrators.node.entries.items()
    }
    section = Entry(orchestrators.key_at, MappingNode(orchestrators.node.at, merged))
    return MappingNode(tree.at, {**tree.entries, "orchestrators": section}), []


def _orchestrator(name: str, defaults: MappingNode, own: Node) -> Node:
    if is_null(own):
        own = MappingNode(own.at)
    if not isinstance(own, MappingNode):
        return own
    below = {key: entry for key, entry in defaults.entries.items() if key not in own.entries}
    if not is_null(own.child("machine")):
        below.pop("placement", None)
    if "escalate_to" in below:
        below["escalate_to"] = _without_self(name, below["escalate_to"])
    return MappingNode(
        own.at, {**{key: _own_entry(key, entry, defaults) for key, entry in own.entries.items()}, **below}
    )


def _own_entry(key: str, entry: Entry, defaults: MappingNode) -> Entry:
    default = defaults.entries.get(key)
    if default is None:
        return entry
    if is_null(entry.node):
        return entry if key in _CAN_BE_SWITCHED_OFF else default
    if key == "runner" and _other_type(entry.node, default.node):
        return entry
    return Entry(entry.key_at, _layered(default.node, entry.node))


def _layered(default: Node, own: Node) -> Node:
    if not isinstance(default, MappingNode) or not isinstance(own, MappingNode):
        return own
    entries = dict(own.entries)
    for key, entry in default.entries.items():
        mine = entries.get(key)
        entries[key] = entry if mine is None else Entry(mine.key_at, _layered(entry.node, mine.node))
    return MappingNode(own.at, entries)


def _other_type(own: Node, default: Node) -> bool:
    if not isinstance(own, MappingNode) or not isinstance(default, MappingNode):
        return True
    mine, theirs = own.child("type"), default.child("type")
    if not isinstance(mine, ScalarNode) or not isinstance(theirs, ScalarNode):
        return False
    return mine.value != theirs.value


def _without_self(name: str, entry: Entry) -> Entry:
    if not isinstance(entry.node, ListNode):
        return entry
    items = {
        number: item
        for number, item in entry.node.items.items()
        if not (isinstance(item, ScalarNode) and item.value == name)
    }
    return entry if len(items) == len(entry.node.items) else Entry(entry.key_at, ListNode(entry.node.at, items))


def _diagnostic(entry: Entry, path: str, problem: str, hint: str = "") -> Diagnostic:
    at = entry.key_at
    return Diagnostic(file=at.file, line=at.line, column=at.column, path=path, problem=problem, hint=hint)
