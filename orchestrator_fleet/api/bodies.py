"""Request bodies: JSON -> struct, telling every wrong field at once.

msgspec stops at the first error; a client wants them all. So where there is one, each top-level field is converted by
itself, strictly (no text that looks like a number), and unknown and missing fields are listed with them.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Generator
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec
from litestar.dto import AbstractDTO
from litestar.dto.data_structures import DTOFieldDefinition
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition

from orchestrator_fleet.api.problems import Malformed, clearer
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.wire.nesting import MAX_DEPTH, is_too_deep

MAX_ERRORS = 50
_NO_CHOICE = re.compile(r"Invalid enum value (?P<got>.*)", re.DOTALL)
_AT = re.compile(r"^(?P<message>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
Problem = tuple[str, str]


def decode(raw: bytes, kind: type[S]) -> S:
    """`raw` as a `kind`; raises Malformed when it is not JSON, Invalid with every wrong field."""
    return from_dict(document_of(raw), kind)


def document_of(raw: bytes) -> dict[str, Any]:
    """`raw` as a JSON object; raises Malformed when it is not JSON, Invalid when it is something else."""
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise Malformed(f"the body is not JSON: {problem}") from problem
    if not isinstance(document, dict):
        raise Invalid([("body", f"got {_kind_of(document)}, wanted a JSON object")])
    return document


def from_dict(document: dict[str, Any], kind: type[S], *, strict: bool = True) -> S:
    """A JSON object as a `kind`; raises Invalid with every wrong field.

    `strict=False` also takes numbers written as text, for query strings.
    """
    if not is_too_deep(document):
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(document, kind, strict=strict)
    if found := _wrong(document, kind, strict=strict):
        raise Invalid(found[:MAX_ERRORS])
    return msgspec.convert(document, kind, strict=strict)


def _wrong(document: dict[str, Any], kind: type[msgspec.Struct], *, strict: bool, inside: str = "") -> list[Problem]:
    """Every wrong field; of a struct in a field, each field of that one."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    found = [(inside + name, _unknown(name, list(fields))) for name in document if name not in fields]
    for name, field in fields.items():
        if name not in document:
            found += [(inside + name, "is required")] if field.required else []
        elif is_too_deep(document[name]):
            found.append((inside + name, f"is nested deeper than {MAX_DEPTH}; make it flatter"))
        elif isinstance(document[name], dict) and (struct := _struct_in(field.type)):
            found += _wrong(document[name], struct, strict=strict, inside=f"{inside}{name}.")
        else:
            found += _wrong_value(inside + name, document[name], field.type, strict=strict)
    return found


def _wrong_value(name: str, value: Any, kind: Any, *, strict: bool) -> list[Problem]:
    try:
        msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as problem:
        return [_located(name, str(problem), kind)]
    return []


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that a field may hold: `Spent | None` -> Spent."""
    kinds = (kind, *get_args(kind))
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, msgspec.Struct)), None)


def _located(name: str, problem: str, kind: Any) -> Problem:
    match = _AT.match(problem)
    path, message = (match["path"] or "", match["message"]) if match else ("", problem)
    if wrong := _NO_CHOICE.match(message):
        return name + path, f"got {wrong['got'][:100]}, wanted one of {', '.join(_choices(kind))}"
    return name + path, clearer(message)


def _choices(kind: Any) -> list[str]:
    """The words that a type takes: `Literal["a", "b"] | list[Literal["a", "b"]]` -> a, b."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return list(dict.fromkeys(word for one in get_args(kind) for word in _choices(one)))


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:100], known, n=1)
    return f"is not a known field; did you mean {close[0]}?" if close else "is not a known field"


def _kind_of(value: Any) -> str:
    names: dict[type, str] = {list: "an array", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


class JsonBody(AbstractDTO[T]):
    """Litestar's way to let `decode` read a handler's `data`; the OpenAPI schema is the struct's own."""

    def decode_bytes(self, value: bytes) -> Any:
        """The body as the handler's struct."""
        return decode(value, self.model_type)  # type: ignore[type-var] # handlers only name structs

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Generator[DTOFieldDefinition, None, None]:
        """No field is treated one by one."""
        del model_type
        yield from ()

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        """No field is treated one by one."""
        del field_definition
        return False

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing is generated: `decode` is enough."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: Any
    ) -> Reference | Schema:
        """The struct's own schema."""
        del handler_id
        schema: Reference | Schema = schema_creator.for_field_definition(field_definition)
        return schema
