"""Whatever stands in the files, the answer is a fleet or a SpecInvalid that says why."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.spec.load import MAX_DIAGNOSTICS, load_fleet
from orchestrator_fleet.spec.model import FleetFile
from orchestrator_fleet.spec.yaml_tree import parse, plain

BASE = {
    "version": 1,
    "fleet": "acme",
    "machines": {"m01": {"labels": {"zone": "a"}, "slots": 8}},
    "defaults": {"runner": {"type": "command", "command": ["echo"]}, "sessions": {"max": 2}},
    "orchestrators": {"vp-cto": {"charter": "charters/cto.md", "escalate_to": ["human:oncall"]}},
    "keys": {"k-7f3a9c21": {"owner": "vp-cto", "sha256": "ab" * 32, "scopes": ["admin"]}},
    "routing": [{"name": "rest", "to": {"orchestrator": "vp-cto"}}],
    "limits": [{"name": "one", "key": "task.id", "max_running": 1}],
    "schedules": {"nightly": {"cron": "0 2 * * *", "task": {"title": "x"}}},
    "rollout": {"canary": 1},
    "alerts": [{"name": "a", "when": "backlog.open > 1", "notify": []}],
    "notify": {"webhook": {"ops": "env:OPS"}},
}
WORDS = st.sampled_from(
    [
        "type",
        "command",
        "charter",
        "labels",
        "defaults",
        "runner",
        "vp-cto",
        "human:x",
        "task.id",
        "{{ task.x }}",
        "5m",
        "../x",
        "<<",
        "\0",
        "",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NO_NUL = st.characters(min_codepoint=1, max_codepoint=0xFFFF, exclude_categories=["Cs"])
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """One folder for all examples; each writes its own fleet.yaml."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "charters").mkdir()
        (Path(name) / "charters/cto.md").write_text("Do it.\n")
        yield Path(name)


def load_or_refuse(path: Path) -> None:
    """Load; anything but a fleet or a SpecInvalid fails the test."""
    diagnostics = []
    try:
        load_fleet(path)
    except SpecInvalid as refused:
        diagnostics = refused.diagnostics
        said = str(refused)
    else:
        said = ""
    assert len(diagnostics) <= MAX_DIAGNOSTICS + 1
    assert said.count("\n") == max(len(diagnostics) - 1, 0)
    assert bool(said) == bool(diagnostics)


def paths(value: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every path of a value."""
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, below in pairs:
        yield from paths(below, (*at, step))


def replaced(value: object, path: tuple[str | int, ...], new: object) -> object:
    """The value with another one at a path."""
    if not path:
        return new
    if isinstance(value, dict):
        return {key: replaced(below, path[1:], new) if key == path[0] else below for key, below in value.items()}
    assert isinstance(value, list)
    return [replaced(below, path[1:], new) if number == path[0] else below for number, below in enumerate(value)]


@RELAXED
@given(data=st.binary(max_size=400))
def test_random_bytes_are_refused_in_words(folder: Path, data: bytes):
    """As fleet.yaml and as a charter."""
    (folder / "fleet.yaml").write_bytes(data)
    load_or_refuse(folder / "fleet.yaml")


@RELAXED
@given(text=st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@`,?\n\t ~<0.1\\x"), max_size=80))
def test_random_marks_of_yaml_are_refused_in_words(folder: Path, text: str):
    """Texts that are nearly YAML, alone and below a good beginning."""
    for start in ("", "version: 1\nfleet: a\nmachines:\n  m01:\n"):
        (folder / "fleet.yaml").write_text(start + text)
        load_or_refuse(folder / "fleet.yaml")


@RELAXED
@given(data=st.data())
def test_any_value_in_any_place_is_taken_or_refused_in_words(folder: Path, data: st.DataObject):
    """A sound fleet with up to three of its values put out of shape."""
    value: object = BASE
    for _ in range(data.draw(st.integers(1, 3))):
        value = replaced(value, data.draw(st.sampled_from(list(paths(value)))), data.draw(VALUES))
    (folder / "fleet.yaml").write_text(json.dumps(value))
    load_or_refuse(folder / "fleet.yaml")


@RELAXED
@given(front=VALUES, raw=st.text(max_size=60))
def test_any_front_matter_is_taken_or_refused_in_words(folder: Path, front: object, raw: str):
    """As JSON, which is YAML, and as any text."""
    (folder / "fleet.yaml").write_text(json.dumps(BASE).replace("charters/cto.md", "charters/x.md"))
    for text in (json.dumps(front), raw):
        (folder / "charters/x.md").write_text(f"---\n{text}\n---\nDo it.\n", encoding="utf-8")
        load_or_refuse(folder / "fleet.yaml")


def test_the_fleet_that_is_mutated_is_sound(folder: Path):
    """Else the tests above would test nothing."""
    (folder / "fleet.yaml").write_text(json.dumps(BASE))
    assert load_fleet(folder / "fleet.yaml").file.fleet == "acme"


def test_a_loaded_fleet_reads_back_the_same_from_json(folder: Path):
    """What the control plane's document carries is the whole spec."""
    (folder / "fleet.yaml").write_text(json.dumps(BASE))
    file = load_fleet(folder / "fleet.yaml").file
    assert FleetFile.model_validate(file.model_dump(mode="json", by_alias=True)) == file


@RELAXED
@given(
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**17), 10**17)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(NO_NUL),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(NO_NUL), inner),
        max_leaves=20,
    )
)
def test_json_reads_as_itself(value: object):
    """JSON is YAML: what a program writes is read as it was meant."""
    node = parse(json.dumps([value]), file="x.json")
    assert node is not None
    assert plain(node) == [value]
