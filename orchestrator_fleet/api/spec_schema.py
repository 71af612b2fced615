"""The OpenAPI schema of an orchestrator's spec: the one that `fleet schema` prints, as Litestar wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema

from orchestrator_fleet.ids import NAME_PATTERN
from orchestrator_fleet.spec.model import Orchestrator
from orchestrator_fleet.wire.vps import MAX_CHARTER_CHARS


def _snake(word: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in word).removeprefix("$")


def schema_of(found: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """A JSON schema of pydantic's as a Schema; what it refers to stands in it."""
    if "$ref" in found:
        return schema_of(definitions[found["$ref"].rpartition("/")[2]], definitions)
    known = {field.name for field in fields(Schema)}
    given: dict[str, Any] = {}
    for word, value in found.items():
        name = {"not": "schema_not", "if": "schema_if"}.get(word, _snake(word))
        if name in known and name != "discriminator":
            given[name] = _value(name, value, definitions)
    return Schema(**given)


def _value(name: str, value: Any, definitions: Mapping[str, Any]) -> Any:
    if name == "properties":
        return {key: schema_of(inner, definitions) for key, inner in value.items()}
    if name in ("any_of", "one_of", "all_of"):
        return [schema_of(inner, definitions) for inner in value]
    if name in ("items", "property_names", "additional_properties") and isinstance(value, dict):
        return schema_of(value, definitions)
    return value


def _body(*, new: bool) -> RequestBody:
    found = Orchestrator.model_json_schema()
    schema = schema_of({**found, "title": "NewOrchestrator" if new else "OrchestratorSpec"}, found.get("$defs", {}))
    name = schema_of({"type": "string", "pattern": f"^{NAME_PATTERN}$", "description": "Its name."}, {})
    more = {"name": name}
    if new:
        about = "A new charter's text; without it, the charter is there already."
        more["charter_text"] = schema_of({"type": "string", "maxLength": MAX_CHARTER_CHARS, "description": about}, {})
        schema.required = ["name", *(schema.required or [])]
    schema.properties = {**more, **(schema.properties or {})}
    return RequestBody(content={"application/json": OpenAPIMediaType(schema=schema)}, required=True)


@dataclass
class Declaring(Operation):
    """An operation whose body is a new orchestrator."""

    def __post_init__(self) -> None:
        """Name the body."""
        self.request_body = _body(new=True)


@dataclass
class Replacing(Operation):
    """An operation whose body is an orchestrator's spec."""

    def __post_init__(self) -> None:
        """Name the body."""
        self.request_body = _body(new=False)
