"""One entry of a section of a YAML text, edited the way a careful person would: every other byte stays as it was.

    marks (where everything stands) -> splices (what goes where) -> the new text, read again and compared

Inside the entry, what keeps its value keeps its lines, comments, order and quoting; only what changes is written
anew. What comes out must read as the old values with exactly this entry changed. Where it would not (the entry is
shared by an alias, say) the text is left alone, and the error shows the lines to write by hand.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from orchestrator_fleet.errors import FleetError, SpecInvalid
from orchestrator_fleet.spec import wording
from orchestrator_fleet.spec.marks import Part, marks
from orchestrator_fleet.spec.yaml_tree import MappingNode, is_null, parse, plain

DEFAULT_INDENT = 2
_AFTER_ITEM = re.compile(r",?[ \t]*(#[^\n]*)?\r?\n")
_DASH = re.compile(r"[ ]*- +")


class NotEditable(FleetError):
    """There is no place for the edit that leaves all else as it is; shows what to write by hand."""


class _NoPlace(Exception):
    """Why not."""


def with_entry(text: str, *, file: str, section: str, name: str, value: Mapping[str, Any] | None) -> str:
    """The text with this entry reading as `value`, or taken out where that is None.

    Raises SpecInvalid where the text is no YAML, NotEditable where there is no way.
    """
    old = parse(text, file=file)
    try:
        if not isinstance(old, MappingNode):
            _refuse("the file holds no mapping")
        written = old.child(section)
        if not is_null(written) and not isinstance(written, MappingNode):
            _refuse(f"`{section}` is no mapping there")
        wanted = plain(old)
        entries = dict(wanted.get(section) or {})
        if name in entries and value is not None and same(entries[name] or {}, value):
            return text
        after = _Text(text).edited(section, name, entries.get(name), None if value is None else to_plain(value))
        if value is None:
            del entries[name]
        else:
            entries[name] = to_plain(value)
        wanted[section] = entries
        try:
            new = parse(after, file=file)
        except SpecInvalid as refused:
            _refuse(f"the text would not read any more: {refused.diagnostics[0].problem}")
        if new is None or not same(plain(new), wanted):
            _refuse("other values would change with it, or it would not read as wanted")
    except (_NoPlace, yaml.YAMLError) as why:
        raise NotEditable(f"{file}: {section}.{name}: {_by_hand(str(why), section, name, value)}") from None
    return after


def new_text(*, section: str, name: str, value: Mapping[str, Any]) -> str:
    """The text of a file of its own for one entry."""
    head = wording.behind(to_plain(value), column=DEFAULT_INDENT, step=DEFAULT_INDENT, flow=False)
    return "\n".join([f"{section}:", *_entry_lines(name, head, column=DEFAULT_INDENT)]) + "\n"


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are the same value: true is not 1, but 2.0 is 2."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(inner, other[key]) for key, inner in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def to_plain(value: Any) -> Any:
    """Mappings as dicts and sequences as lists, however deep."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"got {type(value).__name__}, wanted what YAML can say")


def _refuse(why: str) -> NoReturn:
    raise _NoPlace(why)


def _by_hand(why: str, section: str, name: str, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return f"found no way to take it out and leave all else as it is ({why}); take it out by hand"
    lines = new_text(section=section, name=name, value=value)
    return f"found no place for it that leaves all else as it is ({why}); write it by hand:\n{lines}"


def _entry_lines(name: str, behind: Sequence[str], *, column: int) -> list[str]:
    return [f"{' ' * column}{wording.key_text(name)}:{behind[0]}", *behind[1:]]


def _overlap(splices: Sequence[tuple[int, int, str]]) -> bool:
    ordered = sorted(splices, key=lambda splice: splice[:2])
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))


@dataclass(slots=True)
class _Text:
    """A text and the splices that were found for it: what goes out from where to where, and what comes in."""

    text: str
    splices: list[tuple[int, int, str]] = field(default_factory=list)
    as_json: bool = False
    step: int = DEFAULT_INDENT
    line_end: str = "\n"

    def edited(self, section: str, name: str, before: Any, value: dict[str, Any] | None) -> str:
        """The new text; raises _NoPlace."""
        root = marks(self.text)
        if root is None or root.kind != "mapping" or not root.pairs:
            _refuse("the file holds no mapping that is written out")
        first = self.text.find("\n")
        self.line_end = "\r\n" if first > 0 and self.text[first - 1] == "\r" else "\n"
        self.as_json = root.flow and root.pairs[0][0].style == '"'
        self.step = self._step_of(root)
        pair = next((one for one in root.pairs if one[0].text == section), None)
        if pair is None:
            if value is None:
                _refuse(f"there is no `{section}`")
            self._add_section(root, section, name, value)
        else:
            self._edit_section(root, pair, name, before, value)
        return self._spliced()

    def _edit_section(
        self, root: Part, pair: tuple[Part, Part], name: str, before: Any, value: dict[str, Any] | None
    ) -> None:
        key, whole = pair
        if whole.kind == "alias":
            _refuse("it stands behind an alias")
        number = next((n for n, (inner, _) in enumerate(whole.pairs) if inner.text == name), None)
        if number is not None and value is None:
            self._delete(whole, [number], of=key)
        elif number is not None and value is not None:
            entry_key, entry = whole.pairs[number]
            self._value(entry_key, entry, before if before is not None else None, value, parent=whole)
        elif value is None:
            _refuse("it is not there")
        elif whole.pairs:
            self._append(whole, {name: value}, like_others=True)
        elif root.flow or (whole.kind == "mapping" and "\n" in self.text[whole.start : whole.end]):
            self._replace_flow(key, whole, {name: value})
        else:
            column = self._column(key.start)
            head = wording.behind(value, column=column + self.step, step=self.step, flow=False)
            self._replace_behind(key, whole, ["", *_entry_lines(name, head, column=column + self.step)])

    def _add_section(self, root: Part, section: str, name: str, value: dict[str, Any]) -> None:
        if root.flow:
            self._append_flow(root, f"{self._key(section)}: {self._inline({name: value})}")
            return
        column = self._column(root.pairs[0][0].start)
        head = wording.behind(value, column=column + self.step, step=self.step, flow=False)
        lines = [f"{' ' * column}{section}:", *_entry_lines(name, head, column=column + self.step)]
        at = self._end_of_document()
        before = self.text[:at]
        if before.rstrip(" \t\r\n") and not re.search(r"\n[ \t]*\r?\n\Z", before):
            lines.insert(0, "")
        self._insert_lines(at, lines)

    # Values

    def _value(self, key: Part, part: Part, before: Any, after: Any, *, parent: Part) -> None:
        """Make the value behind a key read as `after`."""
        if same(before, after) and not (part.empty and after is not None):
            return
        goes_deeper = part.pairs if part.kind == "mapping" else part.items
        alike = part.kind != "alias" and goes_deeper and after and type(before) is type(after)
        if alike and self._deeper(part, before, after):
            return
        if parent.flow or (part.flow and isinstance(after, dict | list) and after):
            self._replace_flow(key, part, after)
        else:
            column = self._column(key.start)
            room = wording.LINE - (key.end - key.start) - 1
            lines = wording.behind(after, column=column, step=self.step, room=room)
            self._replace_behind(key, part, self._quoted_as(part, after) or lines)

    def _deeper(self, part: Part, before: Any, after: Any) -> bool:
        """Change only what differs inside; False where it is to be written anew as a whole."""
        if isinstance(after, dict) and not before.keys() & after.keys():
            return False
        begun = len(self.splices)
        try:
            if isinstance(after, dict):
                self._mapping(part, before, after)
            else:
                self._list(part, before, after)
            if not part.flow or not _overlap(self.splices[begun:]):
                return True
        except _NoPlace:
            if not part.flow:
                raise
        del self.splices[begun:]
        if self._has_comment(part):
            _refuse("a comment stands in the way")
        return False

    def _mapping(self, part: Part, before: dict[str, Any], after: dict[str, Any]) -> None:
        gone = [number for number, (key, _) in enumerate(part.pairs) if key.text not in after]
        for number, (key, value) in enumerate(part.pairs):
            if key.kind != "scalar":
                _refuse("a key is an alias")
            if number not in gone:
                self._value(key, value, before[key.text], after[key.text], parent=part)
        self._delete(part, gone)
        added = {key: value for key, value in after.items() if key not in before}
        if added:
            self._append(part, added, after_gone=len(part.pairs) - 1 in gone)

    def _list(self, part: Part, before: list[Any], after: list[Any]) -> None:
        """Items that stay are left alone; between them each is replaced, taken out or put in."""
        gone: list[int] = []
        old, new = ([json.dumps(item, sort_keys=True) for item in items] for items in (before, after))
        for what, start, end, into, until in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if what == "equal":
                continue
            both = min(end - start, until - into)
            for number in range(both):
                self._item(part.items[start + number], before[start + number], after[into + number])
            gone += range(start + both, end)
            if until - into > both:
                self._put_items(part, start + both, after[into + both : until])
        self._delete(part, gone)

    def _item(self, item: Part, before: Any, after: Any) -> None:
        mappings = item.kind == "mapping" and isinstance(after, dict) and isinstance(before, dict)
        if not mappings or not self._deeper(item, before, after):
            self.splices.append((item.start, item.end, self._inline(after)))

    def _put_items(self, part: Part, at: int, values: list[Any]) -> None:
        texts = [self._inline(value) for value in values]
        if part.flow:
            if at == 0:
                self.splices.append((part.items[0].start, part.items[0].start, ", ".join(texts) + ", "))
            else:
                self.splices.append((part.items[at - 1].end, part.items[at - 1].end, "".join(f", {t}" for t in texts)))
            return
        item = part.items[max(at - 1, 0)]
        line = self._line_start(item.start)
        dash = self.text[line : item.start]
        if not _DASH.fullmatch(dash):
            _refuse("the list does not start its own line")
        where = line if at == 0 else self._next_line(item.end)
        self._insert_lines(where, [f"{dash}{text}" for text in texts])

    def _replace_flow(self, key: Part, part: Part, value: Any) -> None:
        if part.empty:
            at = self._behind_colon(key)
            self.splices.append((at, at, f" {self._inline(value)}"))
        else:
            self.splices.append((part.start, part.end, self._inline(value)))

    def _replace_behind(self, key: Part, part: Part, lines: Sequence[str]) -> None:
        """Put lines in the place of a value in block style; a comment behind the key or the value stays."""
        colon = self._behind_colon(key)
        key_line = self._end_of_line(key.end)
        first, rest = lines[0], [self.line_end + line for line in lines[1:]]
        if part.empty:
            self.splices.append((colon, colon, first))
            self.splices.append((key_line, key_line, "".join(rest)))
        elif part.start > key_line:
            self.splices.append((colon, colon, first))
            self.splices.append((key_line, part.end, "".join(rest)))
        else:
            until = self._end_of_line(part.end)
            comment = "" if part.style in {"|", ">"} else self.text[part.end : until]
            gap = self.text[colon : part.start]  # what lines values up stays
            self.splices.append((colon, until, f"{gap + first.lstrip() if first else ''}{comment}{''.join(rest)}"))

    def _quoted_as(self, part: Part, value: Any) -> list[str] | None:
        """A text that takes the place of a quoted one is quoted the same way."""
        if not isinstance(value, str) or part.style not in {"'", '"'} or "\n" in value or not value.isprintable():
            return None
        if part.style == "'":
            return [" '" + value.replace("'", "''") + "'"]
        return [f" {wording.as_json(value)}"]

    # Entries that come and go

    def _append(
        self, whole: Part, added: dict[str, Any], *, like_others: bool = False, after_gone: bool = False
    ) -> None:
        if whole.flow:
            for key, value in added.items():
                self._append_flow(whole, f"{self._key(key)}: {self._inline(value)}", after_gone=after_gone)
            return
        first_key, first = whole.pairs[0]
        last_key, last = whole.pairs[-1]
        column = self._column(first_key.start)
        step = self.step
        if like_others and first.kind == "mapping" and first.pairs and not first.flow:
            step = max(self._column(first.pairs[0][0].start) - column, 1)
        lines: list[str] = []
        for key, value in added.items():
            room = wording.LINE - len(wording.key_text(key)) - 1
            flow = (last.kind == "mapping" and last.flow and bool(last.pairs)) if like_others else None
            lines += _entry_lines(
                key, wording.behind(value, column=column, step=step, room=room, flow=flow), column=column
            )
        if like_others and len(whole.pairs) > 1 and self._stands_apart(whole.pairs[-2][1].end, last_key.start):
            lines.insert(0, "")
        self._insert_lines(self._next_line(max(last.end, last_key.end)), lines)

    def _append_flow(self, whole: Part, entry: str, *, after_gone: bool = False) -> None:
        if not whole.pairs:
            self.splices.append((whole.start + 1, whole.start + 1, entry))
            return
        key, value = whole.pairs[-1]
        at = max(key.end, value.end)
        begins_line = self.text[self._line_start(key.start) : key.start].strip() == ""
        apart = begins_line and len(whole.pairs) > 1 and self._line_start(key.start) != self._line_start(whole.start)
        gap = self.line_end + " " * self._column(key.start) if apart else " "
        behind = re.match(r"\s*,", self.text[at : whole.end])
        if after_gone:
            _refuse("its last key goes and another comes, in braces")
        if behind:
            at += behind.end()
            comma = "," if apart else ""
            self.splices.append((at, at, f"{gap}{entry}{comma}"))
        else:
            self.splices.append((at, at, f",{gap}{entry}"))

    def _delete(self, whole: Part, numbers: Sequence[int], *, of: Part | None = None) -> None:
        """Take out pairs or items; of a section (`of` is its key) the last one leaves {} behind."""
        parts = [(key.start, max(key.end, value.end)) for key, value in whole.pairs]
        parts = parts or [(item.start, item.end) for item in whole.items]
        kept = [number for number in range(len(parts)) if number not in numbers]
        for number in numbers:
            if whole.flow:
                self._delete_flow(parts, number, first_kept=kept[0] if kept else len(parts))
            else:
                self._delete_lines(whole, parts, number, of=of)

    def _delete_lines(self, whole: Part, parts: list[tuple[int, int]], number: int, *, of: Part | None) -> None:
        start, end = parts[number]
        line = self._line_start(start)
        lead = self.text[line:start]
        if lead.strip() and not (whole.items and _DASH.fullmatch(lead)):
            if number + 1 == len(parts):
                _refuse("it does not start its own line")
            self.splices.append((start, parts[number + 1][0], ""))
            return
        floor = parts[number - 1][1] if number else (of.end if of is not None else 0)
        begin = self._with_own_comments(line, floor=floor, indent=len(lead) - len(lead.lstrip(" ")))
        until = self._next_line(end)
        if of is not None:
            begin, until = self._without_gap(begin, until, first=number == 0, floor=floor)
            if len(parts) == 1:
                colon = self._behind_colon(of)
                self.splices.append((colon, colon, " {}"))
        self.splices.append((begin, until, ""))

    def _delete_flow(self, parts: list[tuple[int, int]], number: int, *, first_kept: int) -> None:
        start, end = parts[number]
        line = self._line_start(start)
        alone = not self.text[line:start].strip()
        behind = _AFTER_ITEM.match(self.text, end)
        if alone and behind and "," in behind[0]:
            self.splices.append((line, behind.end(), ""))
            return
        before = self.text[parts[number - 1][1] : start] if number else ""
        if first_kept < number and "#" not in before:
            self.splices.append((parts[number - 1][1], end, ""))
        elif number < first_kept < len(parts) and "#" not in self.text[end : parts[number + 1][0]]:
            self.splices.append((start, parts[number + 1][0], ""))
        elif len(parts) == 1:
            self.splices.append((start, end, ""))
        else:
            _refuse("a comment stands in the way")

    def _with_own_comments(self, line: int, *, floor: int, indent: int) -> int:
        """Where the comment lines begin that stand directly above a line, at its indentation."""
        begin = line
        while begin > 0:
            above = self._line_start(begin - 1)
            words = self.text[above:begin]
            if above <= floor or not words.strip().startswith("#") or len(words) - len(words.lstrip(" ")) != indent:
                return begin
            begin = above
        return begin

    def _without_gap(self, begin: int, until: int, *, first: bool, floor: int) -> tuple[int, int]:
        """Of the empty lines on both sides of what goes, one side goes with it."""
        above = begin
        while (
            above > 0
            and self._line_start(above - 1) > floor
            and not self.text[self._line_start(above - 1) : above].strip()
        ):
            above = self._line_start(above - 1)
        below = until
        while below < len(self.text) and not self.text[below : self._next_line(below)].strip():
            below = self._next_line(below)
        if above < begin and (below > until or below == len(self.text)):
            return above, until
        if first and above == begin and below > until and below < len(self.text) and self._column_of_line(below) > 0:
            return begin, below
        return begin, until

    # Places

    def _has_comment(self, part: Part) -> bool:
        """Whether there is one between the values in it."""
        at, gaps = part.start, list[str]()
        for leaf in part.leaves():
            gaps.append(self.text[at : leaf.start])
            at = leaf.end
        return "#" in "".join([*gaps, self.text[at : part.end]])

    def _spliced(self) -> str:
        out, at = [], 0
        for start, end, new in sorted(self.splices, key=lambda splice: splice[:2]):
            if start < at:
                _refuse("two edits meet in one place")
            out += [self.text[at:start], new]
            at = end
        return "".join([*out, self.text[at:]])

    def _insert_lines(self, at: int, lines: Sequence[str]) -> None:
        new = "".join(line + self.line_end for line in lines)
        if at and self.text[at - 1] != "\n":
            new = self.line_end + new  # the last line had no line end
        self.splices.append((at, at, new))

    def _inline(self, value: Any) -> str:
        return wording.as_json(value) if self.as_json else wording.inline(value)

    def _key(self, name: str) -> str:
        return wording.as_json(name) if self.as_json else wording.key_text(name)

    def _step_of(self, root: Part) -> int:
        """The file's own indentation: the first block mapping inside the root tells."""
        column = self._column(root.pairs[0][0].start)
        for _, value in root.pairs:
            if value.kind == "mapping" and value.pairs and not value.flow:
                return max(self._column(value.pairs[0][0].start) - column, 1)
        return DEFAULT_INDENT

    def _stands_apart(self, end: int, start: int) -> bool:
        return re.search(r"\n[ \t]*\r?\n", self.text[end:start]) is not None

    def _behind_colon(self, key: Part) -> int:
        found = re.compile(r"\s*:").match(self.text, key.end)
        if found is None:
            _refuse("a key has no colon")
        return found.end()

    def _line_start(self, at: int) -> int:
        return self.text.rfind("\n", 0, at) + 1

    def _next_line(self, at: int) -> int:
        found = self.text.find("\n", at)
        return len(self.text) if found < 0 else found + 1

    def _end_of_line(self, at: int) -> int:
        found = self.text.find("\n", at)
        end = len(self.text) if found < 0 else found
        return end - 1 if found > 0 and self.text[found - 1] == "\r" and found - 1 >= at else end

    def _column(self, at: int) -> int:
        return at - self._line_start(at)

    def _column_of_line(self, line: int) -> int:
        words = self.text[line : self._next_line(line)]
        return len(words) - len(words.lstrip(" "))

    def _end_of_document(self) -> int:
        """Before the `...` that ends a document, else behind the last line."""
        at = len(self.text)
        while at > 0:
            line = self._line_start(at - 1)
            words = self.text[line:at].strip()
            if words == "...":
                return line
            if words and not words.startswith("#"):
                break
            at = line
        return len(self.text)
