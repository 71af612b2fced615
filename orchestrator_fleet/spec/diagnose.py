"""From what pydantic found to what a person reads: the place, the path, what was got, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator_fleet.errors import Diagnostic
from orchestrator_fleet.ids import NAME_PATTERN
from orchestrator_fleet.spec.suggest import Path, hint, one_of, path_text, shown
from orchestrator_fleet.spec.yaml_tree import (
    Entry,
    ListNode,
    MappingNode,
    Node,
    Place,
    Scalar,
    ScalarNode,
    edited,
    plain,
    resolve,
    walk,
)

MAX_ROUNDS = 12
MAX_FOUND = 200
_NAME_WORDS = "a name of a-z, 0-9 and -, starting with a letter, at most 63 characters"
_PATTERN_WORDS = {
    f"^{NAME_PATTERN}$": _NAME_WORDS,
    r"^k-[0-9a-f]{8}$": "a key id such as k-7f3a9c21, as `fleet key create` makes it",
    r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|exec:.+)$": "a reference: env:NAME, file:PATH or exec:COMMAND",
    r"^/[^\x00]*$": "an absolute path",
    r"^https?://[^\s/]+(:\d+)?/?$": "a URL such as http://127.0.0.1:8700",
    r"^(local|ssh://[^\s@/]+@[^\s/]+)$": "local, or ssh://user@host:port",
    r"^[0-9a-f]{64}$": "a SHA-256 in 64 hex digits",
}
_TYPE_WORDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUND_WORDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_LENGTH_WORDS = {
    "string_too_short": ("at least", "min_length", "characters"),
    "string_too_long": ("at most", "max_length", "characters"),
    "too_short": ("at least", "min_length", "entries"),
    "too_long": ("at most", "max_length", "entries"),
}
_NULL_AS = {"dict_type": "mapping", "model_type": "mapping", "model_attributes_type": "mapping", "list_type": "list"}
_ModelT = TypeVar("_ModelT", bound=BaseModel)


class Locator:
    """Finds where the value at a path was written, and what that place is called.

    A value merged from `defaults` is found, and named, where it stands there.
    """

    def __init__(self, tree: Node) -> None:
        self._tree = tree
        self._numbers: dict[int, list[int]] = {}
        defaults = tree.child("defaults") if isinstance(tree, MappingNode) else None
        self._inherited: dict[int, Path] = (
            {id(node): ("defaults", *path) for path, node in walk(defaults)} if defaults is not None else {}
        )

    def find(self, path: Path, *, key: bool = False) -> tuple[Place, Path]:
        """The place of the value (or of its key) at a path, or of the nearest thing around it."""
        node, place, written = self._tree, self._tree.at, list[str | int]()
        for position, step in enumerate(path):
            last = position == len(path) - 1
            if isinstance(node, MappingNode) and step in node.entries:
                entry = node.entries[str(step)]
                written.append(step)
                node = entry.node
                place = node.at if last and not key and _stands_alone(node) else entry.key_at
            elif isinstance(node, ListNode) and isinstance(step, int) and step < len(node.items):
                number = self._numbers_of(node)[step]
                written.append(number)
                node = node.items[number]
                place = node.at
            else:
                written.extend(path[position:])
                break
            written = list(self._inherited.get(id(node), written))
        return place, tuple(written)

    def _numbers_of(self, node: ListNode) -> list[int]:
        if id(node) not in self._numbers:
            self._numbers[id(node)] = list(node.items)
        return self._numbers[id(node)]

    def diagnostic(self, path: Path, problem: str, advice: str = "", *, key: bool = False) -> Diagnostic:
        """A diagnostic about the value (or the key) at a path."""
        place, written = self.find(path, key=key)
        return Diagnostic(
            file=place.file,
            line=place.line,
            column=place.column,
            path=path_text(written),
            problem=problem,
            hint=advice,
        )


def _stands_alone(node: Node) -> bool:
    """Whether the value itself is the best place to point at: not what begins lines below its key, or is nothing."""
    return isinstance(node, ScalarNode) and node.value is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked(Generic[_ModelT]):
    """What became of a tree.

    `value` is None where nothing sensible is left; `tree` is what it was made of; `mended` has the top-level keys
    under which something was cut out.
    """

    value: _ModelT | None
    tree: MappingNode
    problems: tuple[Diagnostic, ...]
    mended: frozenset[str]


def validate(
    model: type[_ModelT], tree: MappingNode, *, stand_ins: Mapping[str, Scalar] | None = None
) -> Checked[_ModelT]:
    """Check a tree against a model, and go on with what is sound of it.

    Nothing behind a key counts as an empty mapping or list where one is wanted. What is wrong is reported and
    cut out, so that all the rest can still be checked; `stand_ins` take the place of top-level values without
    which there would be no rest.
    """
    mending = _Mending(model, stand_ins or {})
    for _ in range(MAX_ROUNDS):
        try:
            return mending.answer(model.model_validate(plain(tree)), tree)
        except ValidationError as error:
            edits = mending.edits(tree, error.errors(include_url=False))
        if any(_leaves_nothing(model, path, mending.stand_ins) for path, edit in edits.items() if edit is None):
            break
        tree = _without(tree, edits, stand_ins=mending.stand_ins)
    return mending.answer(None, tree)


class _Mending(Generic[_ModelT]):
    """Turns the errors of one round after the other into diagnostics, and into edits that take them away."""

    def __init__(self, model: type[_ModelT], stand_ins: Mapping[str, Scalar]) -> None:
        self.stand_ins = stand_ins
        self._model = model
        self._found: list[Diagnostic] = []
        self._around_cuts: set[Path] = set()
        self._mended: set[str] = set()

    def answer(self, value: _ModelT | None, tree: MappingNode) -> Checked[_ModelT]:
        return Checked(value=value, tree=tree, problems=tuple(self._found), mended=frozenset(self._mended))

    def edits(self, tree: MappingNode, errors: Sequence[Mapping[str, Any]]) -> dict[Path, Node | None]:
        locator, edits, seen = Locator(tree), dict[Path, Node | None](), set[tuple[Path, str]]()
        for error in errors:
            path, sort = _path_of(error["loc"]), error["type"]
            place, written = locator.find(path, key=True)
            if error["input"] is None and sort in _NULL_AS and path:
                edits[path] = MappingNode(place) if _NULL_AS[sort] == "mapping" else ListNode(place)
                continue
            edits[path[:-1] if sort == "missing" and len(path) > 1 else path] = None
            self._mended.update(str(step) for step in path[:1])
            if sort == "missing" and path[0] == "defaults":
                continue  # half a default is fine: what is still missing is missing in the orchestrator
            follows_from_a_cut = written in self._around_cuts
            if not follows_from_a_cut and (written, sort) not in seen and len(self._found) < MAX_FOUND:
                self._found.append(_diagnostic(error, model=self._model, path=path, locator=locator))
            seen.add((written, sort))
        self._around_cuts.update(written[:length] for written, _ in seen for length in range(1, len(written) + 1))
        return edits


def _leaves_nothing(model: type[BaseModel], path: Path, stand_ins: Mapping[str, Scalar]) -> bool:
    """Whether without the value at a path there is nothing left to check."""
    if not path:
        return True
    field = model.model_fields.get(str(path[0]))
    return path[1:] == () and path[0] not in stand_ins and field is not None and field.is_required()


def _without(tree: MappingNode, edits: dict[Path, Node | None], *, stand_ins: Mapping[str, Scalar]) -> MappingNode:
    rest = edited(tree, {path: edit for path, edit in _outermost(edits).items() if path})
    entries = dict(rest.entries) if isinstance(rest, MappingNode) else {}
    for name, value in stand_ins.items():
        if (name,) in edits:
            entries[name] = Entry(tree.at, ScalarNode(tree.at, value))
    return MappingNode(tree.at, entries)


def _outermost(edits: dict[Path, Node | None]) -> dict[Path, Node | None]:
    """Leave out edits below another edit."""
    return {
        path: edit for path, edit in edits.items() if not any(path[:length] in edits for length in range(1, len(path)))
    }


def _path_of(loc: tuple[str | int, ...]) -> Path:
    """Pydantic's location as a path: without the tag of a runner's type and the mark of a bad key."""
    steps = list(loc)
    if steps and steps[-1] == "[key]":
        steps.pop()
    runner_at = {"orchestrators": 2, "defaults": 1}.get(str(steps[0]), 0) if steps else 0
    if runner_at and len(steps) > runner_at + 1 and steps[runner_at] == "runner":
        del steps[runner_at + 1]
    return tuple(steps)


def _diagnostic(item: Mapping[str, Any], *, model: type[BaseModel], path: Path, locator: Locator) -> Diagnostic:
    sort, got, context = item["type"], item["input"], item.get("ctx", {})
    bad_key = item["loc"][-1:] == ("[key]",)
    if sort == "extra_forbidden":
        known = sorted(_keys_at(model, item["loc"][:-1]))
        advice = hint(str(path[-1]), known, otherwise=f"known keys: {one_of(known)}")
        return locator.diagnostic(path, "unknown key", advice, key=True)
    if sort == "missing":
        about = _description(model, item["loc"])
        place, _ = locator.find(path[:-1], key=True)
        _, written = locator.find(path)
        return Diagnostic(
            file=place.file,
            line=place.line,
            column=place.column,
            path=path_text(written),
            problem="is missing",
            hint=about,
        )
    if sort == "union_tag_not_found":
        return locator.diagnostic(path, "has no type", "add type: command or type: claude-code")
    if sort == "union_tag_invalid":
        tags = [tag.strip("' ") for tag in str(context["expected_tags"]).split(",")]
        wanted = f"got {shown(context['tag'])}, wanted one of {one_of(tags)}"
        return locator.diagnostic((*path, "type"), wanted, hint(str(context["tag"]), tags))
    problem, advice = _value_problem(sort, got, context, message=item["msg"])
    return locator.diagnostic(path, problem, advice, key=bad_key)


def _value_problem(sort: str, got: Any, context: Mapping[str, Any], *, message: str) -> tuple[str, str]:
    """(problem, hint) of a value of the wrong kind, form or size."""
    if sort == "value_error":
        return str(context["error"]), ""
    if sort == "literal_error":
        choices = _literals(str(context["expected"]))
        wanted = f"{'' if len(choices) == 1 else 'one of '}{one_of(choices)}"
        return f"got {shown(got)}, wanted {wanted}", "take it out of its quotes" if got in choices else hint(
            str(got), choices
        )
    if sort in _LENGTH_WORDS:
        words, name, unit = _LENGTH_WORDS[sort]
        many = len(got) if isinstance(got, str | list | dict) else 0
        return f"has {many} {unit}, wanted {words} {context[name]}", ""
    words_wanted = _wanted(sort, context)
    if words_wanted is None:
        return f"{message[:1].lower()}{message[1:]}, got {shown(got)}", ""
    return f"got {shown(got)}, wanted {words_wanted}", _cure(sort, got)


def _cure(sort: str, got: Any) -> str:
    """What to write instead, where that is plain from the kind of the value."""
    if sort == "string_type" and isinstance(got, bool | int | float):
        return "put it in quotes"
    if sort == "list_type" and isinstance(got, str):
        return "put it in [brackets]"
    if sort in {"int_type", "float_type"} and isinstance(got, str) and isinstance(resolve(got or "-"), int | float):
        return "take it out of its quotes"
    return ""


def _wanted(sort: str, context: Mapping[str, Any]) -> str | None:
    """What stands after `wanted`, or None for an error that is not about kind, form or bounds."""
    if sort == "string_pattern_mismatch":
        return _PATTERN_WORDS.get(context["pattern"], f"text of the form {context['pattern']}")
    if sort in _BOUND_WORDS:
        words, name = _BOUND_WORDS[sort]
        return f"{words} {context[name]:g}"
    return _TYPE_WORDS.get(sort)


def _literals(expected: str) -> list[str]:
    """Names out of pydantic's `'a', 'b' or 'c'`."""
    return [word.strip().strip("'") for word in expected.replace(" or ", ",").split(",")]


def _keys_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> set[str]:
    return {name for part in _parts_at(model, loc) for name in _fields(part)}


def _description(model: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    for part in _parts_at(model, loc[:-1]):
        field = _fields(part).get(str(loc[-1]))
        if field is not None and field.description:
            text = field.description.rstrip(".")
            return f"add it ({text[:1].lower()}{text[1:]})"
    return "add it"


def _fields(part: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in part.model_fields.items()}


def _parts_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The models that a value at this location may be."""
    choices: list[Any] = [model]
    for step in loc:
        choices = [below for choice in choices for below in _below(choice, step)]
    return [
        part for choice in choices for part in _leaves(choice) if isinstance(part, type) and issubclass(part, BaseModel)
    ]


def _below(annotation: Any, step: str | int) -> Iterator[Any]:
    for leaf in _leaves(annotation):
        origin = get_origin(leaf)
        if origin in {dict, list}:
            yield get_args(leaf)[-1]
        elif isinstance(leaf, type) and issubclass(leaf, BaseModel):
            fields = _fields(leaf)
            tag = fields.get("type")
            if tag is not None and step in get_args(tag.annotation):
                yield leaf
            elif step in fields:
                yield fields[str(step)].annotation


def _leaves(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, its wrappers taken off."""
    if get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in {dict, list} or isinstance(annotation, type):
        yield annotation
    else:
        for choice in get_args(annotation):
            yield from _leaves(choice)
