"""YAML as a tree that knows where everything stands.

`parse` reads one document by its events, never recursing and never building more than MAX_NODES values,
however the text is made. Scalars follow the YAML 1.2 core schema (null, true, false, integers, floats), so
`no`, `on`, `12:30` and dates stay text. What YAML offers and a fleet does not need (tags, merge keys, several
documents, keys that are not text) is refused by name.

An alias shares its anchor's node. Nodes are never changed: `edited` answers with a new tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml import events

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec.suggest import Path, hint, path_text, shown

MAX_NODES = 200_000
MAX_DEPTH = 50
MAX_PROBLEMS = 100
MAX_INT_DIGITS = 18
MAX_FLOAT_CHARS = 40

_Loader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(rf"[-+]?[0-9]{{1,{MAX_INT_DIGITS}}}")
_PREFIXED_INT = re.compile(r"0o[0-7]{1,20}|0x[0-9a-fA-F]{1,15}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|\ufeff")
_FORBIDDEN_IN_VALUE = re.compile("[\0\ud800-\udfff]")

Scalar = str | int | float | bool | None


class Place(NamedTuple):
    """Where something is written; line and column count from 1."""

    file: str
    line: int
    column: int


@dataclass(frozen=True, slots=True, eq=False)
class ScalarNode:
    """One value."""

    at: Place
    value: Scalar


@dataclass(frozen=True, slots=True, eq=False)
class ListNode:
    """A list. The numbers are those in the file; after `edited` some may be gone."""

    at: Place
    items: dict[int, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One key of a mapping, where the key stands, and its value."""

    key_at: Place
    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class MappingNode:
    """A mapping, in the file's order."""

    at: Place
    entries: dict[str, Entry] = field(default_factory=dict)

    def child(self, key: str) -> Node | None:
        """The value of a key, or None."""
        entry = self.entries.get(key)
        return entry.node if entry is not None else None


Node = ScalarNode | ListNode | MappingNode


def is_null(node: Node | None) -> bool:
    """Whether there is nothing: no such key, or a key with nothing behind it."""
    return node is None or (isinstance(node, ScalarNode) and node.value is None)


def kind(node: Node) -> str:
    """What an error calls it: a mapping, a list, or the value."""
    if isinstance(node, MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, ListNode) else shown(node.value)


def plain(node: Node) -> Any:
    """The tree as dicts, lists and scalars."""
    if isinstance(node, MappingNode):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, ListNode):
        return [plain(item) for item in node.items.values()]
    return node.value


def tree_of(value: Any, *, at: Place) -> Node:
    """The opposite of `plain`: a tree of JSON-like values, all of which stand at one place."""
    if isinstance(value, dict):
        return MappingNode(at, {str(key): Entry(at, tree_of(inner, at=at)) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return ListNode(at, {number: tree_of(item, at=at) for number, item in enumerate(value)})
    return ScalarNode(at, value)


def count(node: Node) -> int:
    """How many nodes `plain` would make."""
    if isinstance(node, MappingNode):
        return 1 + sum(count(entry.node) for entry in node.entries.values())
    return 1 + sum(count(item) for item in node.items.values()) if isinstance(node, ListNode) else 1


def edited(node: Node, edits: Mapping[Path, Node | None]) -> Node:
    """The tree with the nodes at some paths replaced, or taken out where the edit is None.

    A number in a path is the position in `plain`, as pydantic counts. Paths that lead nowhere change nothing.
    """
    by_step: dict[str | int, dict[Path, Node | None]] = {}
    for path, edit in edits.items():
        by_step.setdefault(path[0], {})[path[1:]] = edit
    if isinstance(node, MappingNode):
        entries = dict(node.entries)
        for key, below in by_step.items():
            entry = entries.get(key) if isinstance(key, str) else None
            if entry is None:
                continue
            new = below[()] if () in below else edited(entry.node, below)
            if new is None:
                del entries[str(key)]
            else:
                entries[str(key)] = Entry(entry.key_at, new)
        return MappingNode(node.at, entries)
    if isinstance(node, ListNode):
        items = dict(node.items)
        for position, number in enumerate(node.items):
            below = by_step.get(position, {})
            if not below:
                continue
            new = below[()] if () in below else edited(items[number], below)
            if new is None:
                del items[number]
            else:
                items[number] = new
        return ListNode(node.at, items)
    return node


def parse(text: str, *, file: str, first_line: int = 1) -> Node | None:
    """Read one YAML document; None when there is nothing but comments.

    `first_line` is the line of `file` that `text` starts on. Raises SpecInvalid.
    """
    text = text.removeprefix("\ufeff")
    _refuse_unprintable(text, file=file, first_line=first_line)
    builder = _Builder(file, first_line - 1)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise SpecInvalid([*builder.problems, _syntax(error, text, file, first_line - 1)]) from None
    except yaml.YAMLError as error:
        raise SpecInvalid([Diagnostic(file=file, problem=f"is not YAML: {error}")]) from None
    if builder.problems:
        raise SpecInvalid(builder.problems)
    return builder.root


def _refuse_unprintable(text: str, *, file: str, first_line: int) -> None:
    bad = _UNPRINTABLE.search(text)
    if bad is None:
        return
    before = text[: bad.start()]
    line, column = before.count("\n"), bad.start() - (before.rfind("\n") + 1)
    raise SpecInvalid(
        [
            Diagnostic(
                file=file,
                line=first_line + line,
                column=column + 1,
                problem=f"has the control character U+{ord(bad[0]):04X}, wanted plain text",
                hint="remove it, or write it as an escape in double quotes",
            )
        ]
    )


_SYNTAX_HINTS = (
    ("mapping values are not allowed", "check the indentation, and put a text that contains ': ' in quotes"),
    ("could not find expected ':'", "a key needs a colon and a space after it; check the quotes of the lines above"),
    ("did not find expected key", "check the indentation of this line, and the quotes and brackets above it"),
    ("did not find expected '-' indicator", "check the indentation: items of one list start in one column"),
    ("did not find expected ',' or", "close the bracket, or put a comma between the items"),
    ("unexpected end of stream", "close the quotes"),
    ("did not find expected <document start>", "check the indentation of this line"),
    ("cannot start any token", "put the text in quotes"),
    ("unknown escape character", "in double quotes a backslash is written twice; or use single quotes"),
    ("incompatible YAML document", "remove the %YAML line"),
)


def _syntax(error: yaml.MarkedYAMLError, text: str, file: str, lines_before: int) -> Diagnostic:
    problem = error.problem or "cannot be read"
    marks = (mark for mark in (error.problem_mark, error.context_mark) if mark is not None)
    line, column = next(((mark.line, mark.column) for mark in marks), (0, 0))
    lines = text.split("\n")
    at_tab = line < len(lines) and lines[line][column : column + 1] == "\t"
    if at_tab and ("cannot start any token" in problem or "violates indentation" in problem or "tab" in problem):
        problem, advice = "has a tab in its indentation", "indent with spaces"
    else:
        advice = next((words for part, words in _SYNTAX_HINTS if part in problem), "")
        context = f" ({error.context})" if error.context else ""
        problem = f"is not YAML: {problem}{context}"
    return Diagnostic(file=file, line=lines_before + line + 1, column=column + 1, problem=problem, hint=advice)


def resolve(text: str) -> Scalar:
    """An unquoted scalar's value by the YAML 1.2 core schema.

    Numbers that would not survive JSON (over MAX_INT_DIGITS digits, infinite) stay text: a hash of digits
    alone is still a hash.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if text[0] in "+-.0123456789":
        return _number(text)
    return text


def _number(text: str) -> int | float | str:
    if _INT.fullmatch(text):
        return int(text)
    if _PREFIXED_INT.fullmatch(text):
        return int(text, 0)
    if len(text) <= MAX_FLOAT_CHARS and _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():
        value = float(text)
        return value if math.isfinite(value) else text
    return text


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come yet. `size` and `height` count what it expands to."""

    node: MappingNode | ListNode
    anchor: str | None
    key: str | None = None
    key_at: Place | None = None
    size: int = 1
    height: int = 1


class _Builder:
    """Makes nodes out of parser events, with a stack of its own and a count of all that aliases expand to."""

    def __init__(self, file: str, lines_before: int) -> None:
        self.root: Node | None = None
        self.problems: list[Diagnostic] = []
        self._file, self._lines_before = file, lines_before
        self._stack: list[_Open] = []
        self._anchors: dict[str, tuple[Node, int, int] | None] = {}
        self._total = 0
        self._documents = 0

    def take(self, event: events.Event) -> None:
        """One more event; raises SpecInvalid where reading on makes no sense."""
        if isinstance(event, events.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, events.AliasEvent):
            self._alias(event)
        elif isinstance(event, events.MappingStartEvent):
            self._start(event, MappingNode(self._place(event)))
        elif isinstance(event, events.SequenceStartEvent):
            self._start(event, ListNode(self._place(event)))
        elif isinstance(event, events.MappingEndEvent | events.SequenceEndEvent):
            self._end()
        elif isinstance(event, events.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._stop(event, "starts a second YAML document", "one file holds one document; remove the ---")

    def _place(self, event: events.Event) -> Place:
        mark: Any = event.start_mark  # typed as optional, and always there
        return Place(self._file, self._lines_before + mark.line + 1, mark.column + 1)

    def _path(self) -> Path:
        steps: list[str | int] = []
        for frame in self._stack:
            if isinstance(frame.node, ListNode):
                steps.append(len(frame.node.items))
            elif frame.key is not None:
                steps.append(frame.key)
        return tuple(steps)

    def _problem(self, event: events.Event, problem: str, advice: str = "") -> None:
        place = self._place(event)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(
                Diagnostic(
                    file=self._file,
                    line=place.line,
                    column=place.column,
                    path=path_text(self._path()),
                    problem=problem,
                    hint=advice,
                )
            )

    def _stop(self, event: events.Event, problem: str, advice: str = "") -> NoReturn:
        self._problem(event, problem, advice)
        raise SpecInvalid(self.problems)

    def _grow(self, event: events.Event, size: int, height: int) -> None:
        self._total += size
        if self._total > MAX_NODES:
            self._stop(event, f"expands to more than {MAX_NODES} values", "write less, or use fewer aliases")
        if len(self._stack) + height > MAX_DEPTH:
            self._stop(event, f"is nested deeper than {MAX_DEPTH} levels", "write it flatter")

    def _wants_key(self) -> bool:
        return bool(self._stack) and isinstance(self._stack[-1].node, MappingNode) and self._stack[-1].key_at is None

    def _refuse_tag(self, event: events.ScalarEvent | events.CollectionStartEvent) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(event, f"has the tag {shown(tag)}", "tags are not used here; put text in quotes instead")

    def _scalar(self, event: events.ScalarEvent) -> None:
        self._grow(event, 1, 1)
        self._refuse_tag(event)
        value = event.value if event.style else resolve(event.value)
        if isinstance(value, str) and _FORBIDDEN_IN_VALUE.search(value):
            self._problem(event, "has a NUL or half a character in its text", "remove the escape")
        if event.anchor is not None:
            self._anchors[event.anchor] = (ScalarNode(self._place(event), value), 1, 1)
        if self._wants_key():
            self._key(event, value, raw=not event.style)
        else:
            self._add(ScalarNode(self._place(event), value), 1, 1)

    def _key(self, event: events.Event, value: Scalar, *, raw: bool) -> None:
        frame, place = self._stack[-1], self._place(event)
        if not isinstance(value, str):
            name = "empty" if value is None else f"{shown(value)}, not text"
            self._problem(event, f"has a key that is {name}", "give it a name" if value is None else "put it in quotes")
        elif value == "<<" and raw:
            self._problem(event, "has a merge key (<<)", "use `defaults`, which is merged under every orchestrator")
        elif value in self._entries(frame):
            first = self._entries(frame)[value].key_at
            self._problem(
                event,
                f"{shown(value)} stands here twice, first at {first.file}:{first.line}:{first.column}",
                "keep one",
            )
        else:
            frame.key = value
        frame.key_at = place

    @staticmethod
    def _entries(frame: _Open) -> dict[str, Entry]:
        return frame.node.entries if isinstance(frame.node, MappingNode) else {}

    def _alias(self, event: events.AliasEvent) -> None:
        name = str(event.anchor)
        if name not in self._anchors:
            known = hint(name, self._anchors, otherwise="declare it above with &")
            self._stop(event, f"names the anchor {shown(name)}, which is not there", known)
        target = self._anchors[name]
        if target is None:
            self._stop(event, f"contains itself by the alias *{name}", "write the value out")
        node, size, height = target
        self._grow(event, size, height)
        if not self._wants_key():
            self._add(node, size, height)
        elif isinstance(node, ScalarNode):
            self._key(event, node.value, raw=False)
        else:
            self._stop(event, f"has a key that is {kind(node)}", "keys are text")

    def _start(self, event: events.CollectionStartEvent, node: MappingNode | ListNode) -> None:
        self._grow(event, 1, 1)
        self._refuse_tag(event)
        if self._wants_key():
            self._stop(
                event, f"has a key that is {kind(node)}", "keys are text; put a text that starts with [ or { in quotes"
            )
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        self._stack.append(_Open(node, event.anchor))

    def _end(self) -> None:
        frame = self._stack.pop()
        if frame.anchor is not None:
            self._anchors[frame.anchor] = (frame.node, frame.size, frame.height)
        self._add(frame.node, frame.size, frame.height)

    def _add(self, node: Node, size: int, height: int) -> None:
        if not self._stack:
            self.root = node
            return
        frame = self._stack[-1]
        frame.size += size
        frame.height = max(frame.height, height + 1)
        if isinstance(frame.node, ListNode):
            frame.node.items[len(frame.node.items)] = node
            return
        if frame.key is not None and frame.key_at is not None:
            frame.node.entries[frame.key] = Entry(frame.key_at, node)
        frame.key = frame.key_at = None


def walk(node: Node) -> Iterator[tuple[Path, Node]]:
    """Every node with its path, parents first."""
    yield (), node
    if isinstance(node, MappingNode):
        for key, entry in node.entries.items():
            for path, below in walk(entry.node):
                yield (key, *path), below
    elif isinstance(node, ListNode):
        for number, item in node.items.items():
            for path, below in walk(item):
                yield (number, *path), below
