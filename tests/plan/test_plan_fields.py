"""Nothing that people write can change without a plan that says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from builders import Living, full_fleet
from pydantic import BaseModel, ValidationError

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.spec.model import CharterFront, Fleet, FleetFile

FULL = full_fleet()
FRONT = "charters/full.md"
Path = tuple[str | int, ...]

# Values of many kinds; the first that is valid in a place and differs from what is there is put in.
TEXTS = [
    "charters/vp.md",
    "charters/full.md",
    "m2",
    "vp-2",
    "7s",
    "7KiB",
    "7%",
    "env:OTHER",
    "file:/other",
    "sqlite",
    "https://other:1",
    "ssh://other@host",
    "/other",
    "0" * 64,
    "2031-01-01T00:00:00Z",
    "tasks:work",
    "other",
]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value in a JSON document, and every entry of a list as a whole."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        yield path, value
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def replaced(document: Any, path: Path, value: Any) -> Any:
    """A copy with one value put in."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


def options(model: type[BaseModel]) -> set[str]:
    """All words that a Literal anywhere in a model allows."""
    found: set[str] = set()

    def walk(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for field in annotation.model_fields.values():
                walk(field.annotation)
                for extra in field.metadata:
                    walk(extra)
        for inner in get_args(annotation):
            if isinstance(inner, str):
                found.add(inner)
            else:
                walk(inner)

    walk(model)
    return found


WORDS = sorted(options(FleetFile))


def candidates(value: Any) -> Iterator[Any]:
    match value:
        case bool():
            yield not value
        case int() | float():
            yield from (value + 1, value - 1, value / 2)
        case str():
            yield from (text for text in (value + "x", *TEXTS, *WORDS) if text != value)
        case list():
            yield from (value[1:], [*value, *value[-1:]], ["human:me"], ["work.py"])
            yield [{"task": {"title": "x"}, "expect": "vp-1"}]
        case None:
            yield from (*TEXTS, 7, {"user": "x"}, {"hours": "Mon-Fri 08:00-18:00"}, {"repo": "x"}, {"rooms": ["x"]})
            yield from ({"labels": {}}, {"usd_per_day": 1}, {"token": "env:X"})


FILE, CHARTER = (
    FULL.file.model_dump(mode="json", by_alias=True),
    FULL.charters[FRONT].front.model_dump(mode="json", by_alias=True),
)


def variant(path: Path, value: Any) -> Fleet | None:
    """The full fleet with one value changed; None when it would not be valid, or not be another."""
    try:
        if path[0] == "charter":
            front = CharterFront.model_validate(replaced(CHARTER, path[1:], value))
            read = FULL.charters[FRONT].model_copy(update={"front": front})
            other = FULL.model_copy(update={"charters": {**FULL.charters, FRONT: read}})
        else:
            other = FULL.model_copy(update={"file": FleetFile.model_validate(replaced(FILE, path, value))})
    except ValidationError:
        return None
    known = all(spec.charter in FULL.charters for spec in other.file.orchestrators.values())
    return other if known and other != FULL else None


# There is one version; a runner's type can't change without its other fields; and one of these excludes the other.
FIXED = {
    ("version",),
    ("orchestrators", "vp-1", "placement"),
    ("orchestrators", "vp-3", "machine"),
    ("routing", 0, "to", "discipline"),
    ("routing", 1, "to", "orchestrator"),
}
PATHS = [
    *((path, value) for path, value in leaves(FILE) if path not in FIXED and path[-2:] != ("runner", "type")),
    *((("charter", *path), value) for path, value in leaves(CHARTER)),
]


@pytest.fixture(scope="module")
def living() -> Living:
    """Machines on which the full fleet is applied."""
    made = Living()
    made.apply(FULL)
    assert made.plan(FULL).empty
    return made


@pytest.mark.parametrize(("path", "value"), PATHS, ids=[".".join(map(str, path)) for path, _ in PATHS])
def test_a_change_of_any_field_is_in_the_plan(living: Living, path: Path, value: Any) -> None:
    """Each value and each list of the spec, one by one."""
    refused = False
    for other in filter(None, (variant(path, candidate) for candidate in candidates(value))):
        try:
            made = living.plan(other)
        except SpecInvalid:
            refused = True  # such as draining a machine that somebody is bound to: that is said, too
            continue
        assert not made.empty
        assert all(action.reason for action in made.actions)
        return
    assert refused, f"no other valid value is known for {path}, now {value!r}: add one to `candidates`"


def test_prose_and_files_that_travel_are_in_the_plan_too(living: Living) -> None:
    """What is not a field of the spec."""
    prose = FULL.charters[FRONT].model_copy(update={"prose": "Otherwise."})
    for other in (
        FULL.model_copy(update={"charters": {**FULL.charters, FRONT: prose}}),
        FULL.model_copy(update={"assets": {**FULL.assets, "work.py": b"print(2)\n"}}),
        FULL.model_copy(update={"assets": {**FULL.assets, "lib/b.py": b"B = 1\n"}}),
        FULL.model_copy(update={"templates": {"charter.md.j2": "{{ prose }}"}}),
    ):
        assert "reload" in {action.kind for action in living.plan(other).actions}


def unset(model: type[BaseModel], documents: list[Any], path: str) -> Iterator[str]:
    """Fields of a model that no document gives another value than None or nothing."""
    for name, field in model.model_fields.items():
        values = [value for document in documents if (value := getattr(document, name)) not in (None, [], {}, "")]
        if not values:
            yield f"{path}{name}"
            continue
        inner = [v for value in values for v in _members(value) if isinstance(v, BaseModel)]
        for kind in {type(v) for v in inner}:
            yield from unset(kind, [v for v in inner if type(v) is kind], f"{path}{field.alias or name}.")


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]


def test_the_full_fleet_sets_every_field() -> None:
    """Otherwise the test above would not see a new one."""
    assert list(unset(FleetFile, [FULL.file], "")) == []
    assert list(unset(CharterFront, [FULL.charters[FRONT].front], "charter.")) == []
