"""Where everything stands in a YAML text, to the character: what an edit that leaves all else alone goes by.

Unlike `yaml_tree`, which says what a text means, this keeps aliases, styles and empty values apart. The text must
have been read by `yaml_tree.parse` before: that is what refuses one that is too deep or too big.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from yaml import events

_Loader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
_BLANK_END = re.compile(r"(?:\r?\n[ \t]*)+\Z")


@dataclass(slots=True)
class Part:
    """One node of the text, from `start` to before `end`; of a block, `end` is behind its last character."""

    kind: Literal["mapping", "list", "scalar", "alias"]
    start: int
    end: int
    flow: bool = False
    style: str = ""  # of a scalar: "", ', ", | or >
    text: str = ""  # of a scalar: what it says
    pairs: list[tuple[Part, Part]] = field(default_factory=list)
    items: list[Part] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing is written there: a key with nothing behind it."""
        return self.start == self.end

    def leaves(self) -> Iterator[Part]:
        """What is written in it that holds nothing else, in the order of the text."""
        if not self.pairs and not self.items and self.kind in {"scalar", "alias"}:
            yield self
        for inner in itertools.chain(*self.pairs, self.items):
            yield from inner.leaves()


def marks(text: str) -> Part | None:
    """The document's root; None where there is nothing but comments. Raises yaml.YAMLError."""
    found = yaml.parse(text, Loader=_Loader)
    for event in found:
        if isinstance(event, events.NodeEvent):
            return _part(event, found, text)
    return None


def _part(event: events.NodeEvent, rest: Iterator[events.Event], text: str) -> Part:
    begin: Any = event.start_mark  # typed as optional, and always there
    until: Any = event.end_mark
    start, end = int(begin.index), int(until.index)
    if isinstance(event, events.AliasEvent):
        return Part("alias", start, end)
    if isinstance(event, events.ScalarEvent):
        style = str(event.style or "")
        if not event.value and not style and text[start:end] == "":
            return Part("scalar", start, start)
        return Part("scalar", start, _end_of_scalar(text, start, end, style), style=style, text=str(event.value))
    whole = Part(
        "mapping" if isinstance(event, events.MappingStartEvent) else "list",
        start,
        end,
        flow=bool(getattr(event, "flow_style", False)),
    )
    while not isinstance(inner := next(rest), events.CollectionEndEvent):
        if not isinstance(inner, events.NodeEvent):
            continue
        first = _part(inner, rest, text)
        if whole.kind == "list":
            whole.items.append(first)
            continue
        behind = next(rest)
        if isinstance(behind, events.NodeEvent):
            whole.pairs.append((first, _part(behind, rest, text)))
    last: Any = inner.end_mark
    whole.end = int(last.index) if whole.flow else _end_of_block(whole)
    return whole


def _end_of_block(whole: Part) -> int:
    if whole.pairs:
        key, value = whole.pairs[-1]
        return max(key.end, value.end)
    return whole.items[-1].end if whole.items else whole.end


def _end_of_scalar(text: str, start: int, end: int, style: str) -> int:
    """Behind its last character: the parser counts the empty lines after a | or > to it, which `+` alone keeps."""
    if style not in {"|", ">"}:
        return end
    written = text[start:end]
    header = written.partition("\n")[0].partition("#")[0]
    if "+" in header:
        return start + len(written.removesuffix("\n").removesuffix("\r"))
    return start + len(_BLANK_END.sub("", written))
