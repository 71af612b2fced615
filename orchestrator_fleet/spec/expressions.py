"""CEL expressions and `{{ task.field }}` templates: what they may name, checked before anything runs.

The CEL library comes in with the first expression. It knows the roots and functions an expression names, but not
the fields behind them; those are found by a tokenizer that skips string literals.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from orchestrator_fleet.spec.suggest import hint, one_of, shown

MAX_EXPRESSION_CHARS = 4_000
MAX_BRACKETS = 40
_EXTENSION = "cel.cel"

TASK_FIELDS = frozenset(
    {
        "attempt",
        "available_at",
        "blocked_reason",
        "charter_version",
        "completed_at",
        "created_at",
        "created_by",
        "depends_on",
        "description",
        "discipline",
        "due_at",
        "error",
        "estimate_s",
        "generation",
        "id",
        "max_attempts",
        "metadata",
        "orchestrator",
        "parent",
        "priority",
        "result",
        "route",
        "started_at",
        "status",
        "tags",
        "title",
        "updated_at",
        "version",
    }
)
TASK_ROOTS: Mapping[str, frozenset[str] | None] = {"task": TASK_FIELDS}
ALERT_ROOTS: Mapping[str, frozenset[str] | None] = {
    "backlog": frozenset({"blocked", "in_progress", "oldest_s", "open", "overdue", "total"}),
    "budget": frozenset({"breached", "tokens_last_hour", "tokens_per_hour", "usd_per_day", "usd_today"}),
    "fleet": frozenset({"machines", "name", "online", "orchestrators"}),
    "orchestrator": frozenset(
        {"discipline", "generation", "id", "labels", "last_seen_s", "machine", "name", "paused", "role", "status"}
    ),
    "presence": frozenset(),
    "sessions": frozenset({"free", "max", "running"}),
}
"""What an alert may name, all of one orchestrator's live values; `presence` is ONLINE, OFFLINE, BUSY or AWAY."""

_MACROS = frozenset({"all", "exists", "exists_one", "filter", "map"})
_METHODS = frozenset(
    {
        "contains",
        "endsWith",
        "getDate",
        "getDayOfMonth",
        "getDayOfWeek",
        "getDayOfYear",
        "getFullYear",
        "getHours",
        "getMilliseconds",
        "getMinutes",
        "getMonth",
        "getSeconds",
        "matches",
        "size",
        "startsWith",
    }
)
_FUNCTIONS = frozenset(
    {"bytes", "double", "duration", "dyn", "has", "int", "size", "string", "timestamp", "type", "uint"}
)
_TOKEN = re.compile(
    r"""
    (?P<string>[rRbB]{0,2}(?:'{3}(?:\\.|[^\\])*?'{3}|"{3}(?:\\.|[^\\])*?"{3}|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"))
    |(?P<comment>//[^\n]*)
    |(?P<number>(?:\d+\.\d+|\d+|\.\d+)(?:[eE][+-]?\d+)?[uU]?)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<space>\s+)
    |(?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SYNTAX_ERROR = re.compile(r"<input>:(\d+):(\d+): (?:Syntax error: )?([^\n]+)")
_RESERVED = frozenset({"true", "false", "null", "in"})
_TEMPLATE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_TEMPLATE_NAME = re.compile(r"\s*task\.([A-Za-z_][A-Za-z0-9_]*)((?:\.[A-Za-z_][A-Za-z0-9_]*)*)\s*")


class Program(Protocol):
    """A compiled expression."""

    def execute(self, evaluation_context: Any = None) -> Any:
        """Evaluate over a dict of roots; raises RuntimeError, TypeError, KeyError or ValueError."""

    def variables(self) -> list[str]:
        """The root names, those bound by macros included."""

    def functions(self) -> list[str]:
        """The functions and operators."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    column: int


def compile_cel(text: str) -> Program:
    """Compile; raises ValueError with one line that says what is wrong and at which character."""
    if len(text) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"has {len(text)} characters, the limit is {MAX_EXPRESSION_CHARS}; split the rule")
    _refuse_deep(text)
    try:
        return cast("Program", _library().compile(text))
    except ValueError as error:
        raise ValueError(_syntax_problem(str(error))) from None


def _library() -> Any:
    """The compiled half of the CEL package.

    Importing the package as a whole brings in its command line (prompt_toolkit, typer): 130 ms and 20 MB that nobody
    here uses. So its extension module is loaded by itself, under its own name, as a later `import cel` would find it.
    """
    if _EXTENSION in sys.modules:
        return sys.modules[_EXTENSION]
    package = importlib.machinery.PathFinder.find_spec(_EXTENSION.partition(".")[0])
    folders = package.submodule_search_locations if package is not None else None
    spec = importlib.machinery.PathFinder.find_spec(_EXTENSION, folders) if folders else None
    if spec is None or spec.loader is None:
        return importlib.import_module(_EXTENSION)  # packed in another way, or missing: the error is Python's own
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_EXTENSION] = module
    return module


def check(text: str, *, roots: Mapping[str, frozenset[str] | None]) -> list[str]:
    """What is wrong with an expression: its syntax, or names it may not use.

    `roots`: root -> its fields, None for any, empty for a plain value without fields.
    """
    try:
        program = compile_cel(text)
    except ValueError as error:
        return [str(error)]
    tokens = list(_tokens(text))
    bound = _bound(tokens)
    return [
        *_root_problems(program, tokens, roots=roots, bound=bound),
        *_field_problems(tokens, roots={name: fields for name, fields in roots.items() if name not in bound}),
        *_function_problems(tokens),
    ]


def is_template(text: str) -> bool:
    """Whether the text has template marks."""
    return "{{" in text or "{%" in text


def check_template(text: str) -> list[str]:
    """What is wrong with a template: only `{{ task.<field> }}` is known, and `{{ task.metadata.<anything> }}`."""
    problems = []
    rest = _TEMPLATE.sub("", text)
    if "{{" in rest or "}}" in rest or "{%" in rest:
        problems.append(f"got {shown(text)}, wanted {{{{ task.<field> }}}} in closed braces")
    for inner in _TEMPLATE.findall(text):
        name = _TEMPLATE_NAME.fullmatch(inner)
        if name is None:
            problems.append(f"got {{{{{inner}}}}}, wanted {{{{ task.<field> }}}}")
        elif name[1] not in TASK_FIELDS:
            problems.append(_unknown_field("task", name[1], TASK_FIELDS))
    return problems


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "mark"
        if kind not in {"space", "comment"}:
            yield _Token(kind, match[0], match.start() + 1)


def _refuse_deep(text: str) -> None:
    """Refuse nesting that would make the parser recurse far; it stops by itself at about twice as much."""
    depth = 0
    for token in _tokens(text):
        if token.kind == "mark":
            depth += (token.text in "([{?") - (token.text in ")]}:")
            if depth > MAX_BRACKETS:
                raise ValueError(
                    f"is nested deeper than {MAX_BRACKETS} brackets at character {token.column}; split the rule"
                )


def _syntax_problem(message: str) -> str:
    match = _SYNTAX_ERROR.search(message)
    if match is None:
        return f"is not CEL: {message.splitlines()[0]}"
    line, column, problem = match.groups()
    where = f"character {column}" if line == "1" else f"line {line}, character {column}"
    plainly = problem.split(" expecting {")[0].replace("mismatched input '<EOF>'", "it ends too early")
    return f"is not CEL at {where}: {plainly}"


def _bound(tokens: list[_Token]) -> frozenset[str]:
    """Names that macros bind: the `t` of `task.tags.exists(t, ...)`."""
    return frozenset(
        name.text
        for dot, macro, bracket, name, comma in zip(
            tokens, tokens[1:], tokens[2:], tokens[3:], tokens[4:], strict=False
        )
        if dot.text == "."
        and macro.text in _MACROS
        and bracket.text == "("
        and name.kind == "name"
        and comma.text == ","
    )


def _root_problems(
    program: Program,
    tokens: list[_Token],
    *,
    roots: Mapping[str, frozenset[str] | None],
    bound: frozenset[str],
) -> list[str]:
    unknown = [name for name in program.variables() if name not in roots and name not in bound]
    return [
        f"unknown name {name}{_at(tokens, name)}; {hint(name, roots, otherwise=f'it may name {one_of(sorted(roots))}')}"
        for name in unknown
    ]


def _at(tokens: list[_Token], name: str) -> str:
    before = [None, *tokens]
    for previous, token in zip(before, tokens, strict=False):
        if token.text == name and token.kind == "name" and (previous is None or previous.text != "."):
            return f" at character {token.column}"
    return ""


def _field_problems(tokens: list[_Token], *, roots: Mapping[str, frozenset[str] | None]) -> list[str]:
    problems = []
    padded = [_Token("mark", "", 0), *tokens, *[_Token("mark", "", 0)] * 3]
    for before, root, link, name, after in zip(padded, padded[1:], padded[2:], padded[3:], padded[4:], strict=False):
        if root.kind != "name" or before.text == "." or root.text not in roots:
            continue
        fields = roots[root.text]
        if fields is None:
            continue
        if link.text == "." and name.kind == "name" and after.text != "(":
            field = name.text
        elif link.text == "[" and name.kind == "string" and after.text == "]":
            field = name.text.strip("'\"")
        else:
            continue
        if field not in fields:
            problems.append(_unknown_field(root.text, field, fields, column=name.column))
    return problems


def _unknown_field(root: str, field: str, fields: frozenset[str], *, column: int = 0) -> str:
    where = f" at character {column}" if column else ""
    known = f"it has {one_of(sorted(fields))}" if fields else f"{root} is a plain value"
    return f"{root} has no field {field}{where}; {hint(field, fields, otherwise=known)}"


def _function_problems(tokens: list[_Token]) -> list[str]:
    problems = []
    padded = [_Token("mark", "", 0), *tokens]
    for before, name, bracket in zip(padded, padded[1:], padded[2:], strict=False):
        if name.kind != "name" or bracket.text != "(" or name.text in _RESERVED:
            continue
        known = _METHODS | _MACROS if before.text == "." else _FUNCTIONS
        if name.text not in known:
            sort = "method" if before.text == "." else "function"
            advice = hint(name.text, known, otherwise=f"there are {one_of(sorted(known))}")
            problems.append(f"unknown {sort} {name.text} at character {name.column}; {advice}")
    return problems
