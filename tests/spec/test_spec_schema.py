"""The JSON Schema: says the same as loading does, for what it can say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.schema import charter_schema, json_schema
from orchestrator_fleet.spec.yaml_tree import parse, plain

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}
FULL = """\
version: 1
fleet: acme
control_plane: {url: "http://127.0.0.1:8700", store: sqlite, writes: commit, reconcile: manual, interval: 60s}
machines:
  m01:
  m02: {address: "ssh://fleet@10.0.0.2:22", labels: {zone: a}, root: /opt/fleet, identity: "file:~/.ssh/fleet"}
defaults:
  runner: {type: command, command: [echo, hi]}
  retry: {max_attempts: 3, backoff: 2s, backoff_max: 5m, jitter: 0.2}
orchestrators:
  vp-eng:
    charter: charters/cto.md
    discipline: engineering
    runner: {type: claude-code, model: claude-sonnet-4-5, secrets: {ANTHROPIC_API_KEY: env:ANTHROPIC_API_KEY}}
    workspace: {repo: ., ref: main, isolate: worktree}
    sessions: {max: 4, timeout: 45m}
    schedule: {timezone: Europe/Berlin, hours: "Mon-Fri 08:00-18:00"}
    budget: {usd_per_day: 50, tokens_per_hour: 200000, on_breach: pause}
    escalate_to: [human:oncall]
    slack: {user: vp-eng, channel: "#eng"}
    protect: true
keys:
  k-7f3a9c21:
    owner: vp-eng
    sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    scopes: [tasks:work]
    created: 2026-11-20T09:00:00Z
routing:
  - {name: by-discipline, when: has(task.discipline), to: {discipline: "{{ task.discipline }}"}}
  - {name: rest, to: {orchestrator: vp-eng}, tests: [{task: {title: x}, expect: vp-eng}]}
limits: [{name: one-per-repo, key: task.metadata.repo, max_running: 1}]
schedules:
  nightly: {cron: "0 2 * * *", task: {title: Triage, priority: LOW}, overlap: skip, catch_up: last}
rollout: {canary: 1, max_deletes: 25%, drift: correct, min_healthy: 0}
alerts: [{name: stalled, when: backlog.oldest_s > 900, for: 5m, notify: [webhook:ops]}]
notify: {webhook: {ops: env:OPS_WEBHOOK_URL}}
"""


def refusals(  # noqa: C901, PLR0912 - one branch for each keyword of JSON Schema
    schema: dict[str, Any], value: Any, root: dict[str, Any], path: str = "$"
) -> list[str]:
    """Where a value breaks a schema: the keywords that ours uses, and an error for any other."""
    known = {
        *("$ref", "type", "const", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum"),
        *("exclusiveMinimum", "minItems", "maxItems", "items", "properties", "patternProperties", "required"),
        *("additionalProperties", "minProperties", "maxProperties", "anyOf", "oneOf", "propertyNames"),
    }
    notes = {"title", "description", "default", "examples", "format", "discriminator", "$schema", "$id", "$defs"}
    assert set(schema) <= known | notes, set(schema) - known - notes
    found: list[str] = []
    if "$ref" in schema:
        found += refusals(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, path)
    for word, at_least in (("anyOf", 1), ("oneOf", 1)):
        fits = [choice for choice in schema.get(word, ()) if not refusals(choice, value, root, path)]
        if word in schema and len(fits) < at_least:
            found.append(f"{path}: fits none of {word}")
    kind = schema.get("type")
    if kind == "integer" and (not isinstance(value, int) or isinstance(value, bool)):
        return [*found, f"{path}: no integer"]
    if kind == "number" and (not isinstance(value, int | float) or isinstance(value, bool)):
        return [*found, f"{path}: no number"]
    if kind in TYPES and not isinstance(value, TYPES[kind]):
        return [*found, f"{path}: no {kind}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{path}: not {schema['const']}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: none of {schema['enum']}")
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.append(f"{path}: not like {schema['pattern']}")
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            found.append(f"{path}: wrong length")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not low <= value <= high or value <= schema.get("exclusiveMinimum", value - 1):
            found.append(f"{path}: out of bounds")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{path}: wrong number of items")
        for number, item in enumerate(value):
            found += refusals(schema.get("items", {}), item, root, f"{path}[{number}]")
    if isinstance(value, dict):
        found += [f"{path}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
            found.append(f"{path}: wrong number of entries")
        for name, item in value.items():
            below = [part for pattern, part in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
            if name in schema.get("properties", {}):
                below.append(schema["properties"][name])
            if not below and schema.get("additionalProperties") is False:
                found.append(f"{path}: unknown key {name}")
            if not below and isinstance(schema.get("additionalProperties"), dict):
                below.append(schema["additionalProperties"])
            for part in below:
                found += refusals(part, item, root, f"{path}.{name}")
    return found


def value_of(text: str) -> Any:
    """A YAML text as a value."""
    node = parse(text, file="fleet.yaml")
    assert node is not None
    return plain(node)


def test_a_fleet_that_uses_everything_loads_and_fits(write_fleet):
    """What loading takes, an editor must not mark red."""
    load_fleet(write_fleet(head="", machines="", orchestrators="", more=FULL))
    assert refusals(json_schema(), value_of(FULL), json_schema()) == []


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("version: 1", "version: 2", "$.version: not 1"),
        ("fleet: acme", "fleet: Acme!", "$.fleet: not like"),
        ("  m01:\n", "  M01:\n", "$.machines: unknown key M01"),
        ("discipline: engineering", "disipline: engineering", "$.orchestrators.vp-eng: unknown key disipline"),
        ("timeout: 45m", "timeout: 45", "$.orchestrators.vp-eng.sessions.timeout: "),
        ("max: 4", "max: 0", "$.orchestrators.vp-eng.sessions.max: out of bounds"),
        ("scopes: [tasks:work]", "scopes: [work]", "$.keys.k-7f3a9c21.scopes[0]: none of"),
        ("max_deletes: 25%", "max_deletes: 0.25", "$.rollout.max_deletes: no string"),
        ("    charter: charters/cto.md\n", "", "$.orchestrators.vp-eng: lacks charter"),
    ],
)
def test_what_loading_refuses_by_shape_does_not_fit(old, new, where):
    """The same mistakes, seen while typing."""
    assert old in FULL
    found = refusals(json_schema(), value_of(FULL.replace(old, new)), json_schema())
    assert any(line.startswith(where) for line in found), found


def properties(part: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every property anywhere in a schema."""
    found: list[tuple[str, dict[str, Any]]] = []
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict):
            found += part["properties"].items()
        for below in part.values():
            found += properties(below)
    elif isinstance(part, list):
        for below in part:
            found += properties(below)
    return found


def test_everything_a_person_writes_is_described():
    """An editor shows what each key is for."""
    schema = json_schema()
    definitions = schema["$defs"]
    nameless = {
        name
        for name, part in properties(schema)
        if name != "type" and "description" not in {**part, **definitions.get(part.get("$ref", "")[8:], {})}
    }
    assert nameless == set()


def test_the_schema_names_its_dialect_and_itself():
    """2020-12, with an id and a title."""
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"]
    assert schema["title"] == "fleet.yaml, version 1"


def test_a_charters_front_matter_has_a_schema_too():
    """Alone, and as a definition of the whole."""
    front = value_of("role: VP\ntier: 1\nlimits: {sessions: 4, memory: 2GiB}\nsafety: {auto_approve: [Read]}\n")
    assert refusals(charter_schema(), front, charter_schema()) == []
    assert refusals({"$ref": "#/$defs/CharterFront"}, front, json_schema()) == []
    assert refusals(charter_schema(), {"safty": {}}, charter_schema()) == ["$: unknown key safty"]
