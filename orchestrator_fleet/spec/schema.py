"""JSON Schema 2020-12 of fleet.yaml and of a charter's front matter, for editors and for `fleet schema`."""

from __future__ import annotations

from typing import Any

from orchestrator_fleet.spec.model import CharterFront, FleetFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_ID = "urn:orchestrator-fleet:fleet.yaml:1"
CHARTER_ID = "urn:orchestrator-fleet:charter:1"


def json_schema() -> dict[str, Any]:
    """The schema of fleet.yaml; `$defs/CharterFront` is that of a charter's front matter."""
    schema = FleetFile.model_json_schema(by_alias=True)
    charter = charter_schema()
    shared = charter.pop("$defs")
    definitions = {**schema.pop("$defs"), **shared, "CharterFront": {k: v for k, v in charter.items() if k[0] != "$"}}
    _allow_nothing(schema["properties"]["machines"])
    whole = {"$schema": DIALECT, "$id": SCHEMA_ID, **schema, "$defs": dict(sorted(definitions.items()))}
    _close_names(whole)
    return whole


def charter_schema() -> dict[str, Any]:
    """The schema of a charter's front matter alone."""
    schema = {"$schema": DIALECT, "$id": CHARTER_ID, **CharterFront.model_json_schema(by_alias=True)}
    _close_names(schema)
    return schema


def _allow_nothing(section: dict[str, Any]) -> None:
    """Let `m01:` with nothing behind it pass, as loading does."""
    for pattern, value in section["patternProperties"].items():
        section["patternProperties"][pattern] = {"anyOf": [value, {"type": "null"}]}


def _close_names(part: Any) -> None:
    """Refuse names that don't follow the pattern, as loading does; pydantic leaves that open."""
    if isinstance(part, dict):
        if "patternProperties" in part:
            part["additionalProperties"] = False
        for below in part.values():
            _close_names(below)
    elif isinstance(part, list):
        for below in part:
            _close_names(below)
