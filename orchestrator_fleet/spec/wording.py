"""New values as YAML text, the way a person would write them: short ones on one line, long ones below their key.

ruamel.yaml does the writing. It is told of each text whether it goes bare, so that no reader takes it for another
type: neither one of YAML 1.1 (`yes`, `12:30`) nor one of YAML 1.2.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString, PlainScalarString

from orchestrator_fleet.spec.yaml_tree import resolve

LINE = 120
_NO_WIDTH = 1 << 30
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T[0-9:.]+(Z|[+-]\d{2}:\d{2})")
_BARE = re.compile(r"[\w./@+(*~-]([\w ./@+()'*~:,=-]*[\w./@+()'*~-])?")  # what follows decides the rest
_SEEN_AS_NUMBER = re.compile(r"[-+]?(0[xob])?[0-9_.]+([eE][-+]?[0-9]+)?|[-+.]+|[-+]?[0-9_]+(:[0-9_.]+)+")
_OTHER_TYPE = re.compile(r"(?i)true|false|null|yes|no|on|off|y|n|~|\.(inf|nan)|[-+]\.inf")
_BLOCK_TEXT = re.compile(r"[^\s][^\r\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]*[^\s]\n?")
_implicit: Any = yaml.resolver.Resolver()  # untyped
_STR = "tag:yaml.org,2002:str"


class _Unresolving(VersionedResolver):
    """Every scalar is the text that was chosen for it here."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if issubclass(kind, yaml.ScalarNode) or kind.__name__ == "ScalarNode":
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)


def inline(value: Any) -> str:
    """A value on one line, as it may stand in braces."""
    pair = CommentedMap({PlainScalarString("k"): _tree(value)})
    pair.fa.set_flow_style()
    return _dumped(pair).removeprefix("{k: ").removesuffix("}")


def as_json(value: Any) -> str:
    """A value on one line of a file that is JSON."""
    return json.dumps(value, ensure_ascii=False)


def key_text(name: str) -> str:
    """A key as it is written."""
    return inline(name)


def behind(value: Any, *, column: int, step: int, room: int = LINE, flow: bool | None = None) -> list[str]:
    """What stands behind `key:`, by line: the first goes on the key's own line, the rest below it.

    `column` is the key's. A mapping or list goes below where it would not fit into `room` characters on the key's
    line; `flow` says it of the outermost one.
    """
    if value in ({}, []) or not isinstance(value, Mapping | list) or (flow is True and not _has_lines(value)):
        return _scalar_behind(value, column=column, step=step)
    if flow is None and not _has_lines(value) and column + len(inline(value)) + 1 <= room:
        return [f" {inline(value)}"]
    lines = _below(value, column=column, step=step)
    return ["", *lines]


def _scalar_behind(value: Any, *, column: int, step: int) -> list[str]:
    if isinstance(value, str) and "\n" in value and _BLOCK_TEXT.fullmatch(value):
        head, *text = _dumped(CommentedMap({"k": LiteralScalarString(value)}), step=step).split("\n")
        return [head.removeprefix("k:"), *(" " * column + line if line else "" for line in text)]
    return [f" {inline(value)}"]


def _below(value: Any, *, column: int, step: int) -> list[str]:
    indent = " " * (column + step)
    lines: list[str] = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = key_text(str(key))
            head, *rest = behind(inner, column=column + step, step=step, room=LINE - len(name) - 1)
            lines += [f"{indent}{name}:{head}", *rest]
        return lines
    return [f"{indent}- {inline(item)}" for item in value]


def _has_lines(value: Any) -> bool:
    """Whether some text in it is better read in lines of its own."""
    if isinstance(value, Mapping):
        return any(_has_lines(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_has_lines(item) for item in value)
    return isinstance(value, str) and "\n" in value


def _dumped(tree: Any, *, step: int = 2) -> str:
    out = io.StringIO()
    writer = YAML(typ="rt", pure=True)
    writer.Resolver = _Unresolving
    writer.width, writer.allow_unicode = _NO_WIDTH, True
    writer.indent(mapping=step, sequence=step + 2, offset=step)
    writer.dump(tree, out)
    return out.getvalue().removesuffix("\n")


def _tree(value: Any) -> Any:
    made: CommentedMap | CommentedSeq
    if isinstance(value, Mapping):
        made = CommentedMap((_scalar(str(key)), _tree(inner)) for key, inner in value.items())
    elif isinstance(value, list | tuple):
        made = CommentedSeq([_tree(item) for item in value])
    else:
        return _scalar(value)
    made.fa.set_flow_style()
    return made


def _scalar(value: Any) -> Any:
    if value is None:
        return PlainScalarString("null")
    if isinstance(value, bool):
        return PlainScalarString("true" if value else "false")
    if isinstance(value, int | float):
        return PlainScalarString(json.dumps(value))
    text = str(value)
    return PlainScalarString(text) if _reads_as_itself(text) else DoubleQuotedScalarString(text)


def _reads_as_itself(text: str) -> bool:
    if _TIME.fullmatch(text):
        return True
    bare = _BARE.fullmatch(text) and ": " not in text and not text.startswith(("- ", "? ", "*", "~"))
    if not bare or _OTHER_TYPE.fullmatch(text) or _SEEN_AS_NUMBER.fullmatch(text) or resolve(text) != text:
        return False
    return bool(_implicit.resolve(yaml.ScalarNode, text, (True, False)) == _STR)
