"""One entry of a file edited: golden files of what changes, and any value in any style made any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator_fleet.spec import wording
from orchestrator_fleet.spec.entry import NotEditable, new_text, same, with_entry
from orchestrator_fleet.spec.yaml_tree import parse, plain

CASES = sorted((Path(__file__).parent / "entries").iterdir())
ROUND = [
    "a-number-in-braces",
    "an-argument-more",
    "an-entry-on-one-line",
    "json-entry-added",
    "protection-lifted",
    "rotated-key-changes-its-own-line",
    "scopes-on-lines",
    "windows-line-ends-kept",
]


def _text(path: Path) -> str:
    return path.read_bytes().decode()


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_an_edit_changes_exactly_that(case: Path):
    """before.yaml becomes after.yaml, to the byte, or the reason why not stands in refused.txt."""
    edit = json.loads(_text(case / "edit.json"))
    if (case / "refused.txt").exists():
        with pytest.raises(NotEditable) as refused:
            with_entry(_text(case / "before.yaml"), file="fleet.yaml", **edit)
        assert f"{refused.value}\n" == _text(case / "refused.txt")
    else:
        assert with_entry(_text(case / "before.yaml"), file="fleet.yaml", **edit) == _text(case / "after.yaml")


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ROUND], ids=lambda path: path.name)
def test_the_same_edit_again_changes_nothing(case: Path):
    """The text reads so already; also when the keys come in another order."""
    edit = json.loads(_text(case / "edit.json"))
    after = _text(case / "after.yaml")
    turned = dict(reversed(edit["value"].items()))
    assert with_entry(after, file="fleet.yaml", **{**edit, "value": turned}) == after


def test_a_rotation_is_one_line_in_the_diff():
    """All that a reviewer sees is `revoked`."""
    case = Path(__file__).parent / "entries/rotated-key-changes-its-own-line"
    before, after = _text(case / "before.yaml").split("\n"), _text(case / "after.yaml").split("\n")
    assert [line for line in after if line not in before] == ["    revoked: 2026-11-21T09:00:00Z"]
    assert len(after) == len(before) + 1


@pytest.mark.parametrize(
    "text",
    ["yes", "12:30", "1e5", "0x1f", "2026-11-20", "~", "", " x", "a: b", "a #b", "- a", "*", "\u2028", "a\r\nb", "[x]"],
)
def test_a_text_stays_a_text_for_every_reader(text: str):
    """In YAML 1.1 and in 1.2, in braces and in a block."""
    import yaml  # noqa: PLC0415 - the other reader

    written = new_text(section="keys", name="k", value={"a": text, "b": [text], "c": {"d": text}})
    wanted = {"keys": {"k": {"a": text, "b": [text], "c": {"d": text}}}}
    read = parse(written, file="x")
    assert read is not None
    assert plain(read) == yaml.safe_load(written) == wanted


NAMES = st.sampled_from(["a", "b-c", "labels", "no", "12", "x y", "é", "charter"])
TEXTS = st.one_of(
    st.sampled_from(
        ["x", "tasks:read", "charters/a.md", "yes", "10m", "it's", 'say "so"', "two\nlines\n", "  in\n out"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), max_size=12),
)
SCALARS = st.one_of(TEXTS, st.booleans(), st.none(), st.integers(-9, 99_999), st.sampled_from([0.25, 1.5, 60.0]))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)
ENTRIES = st.dictionaries(NAMES, VALUES, max_size=5)


@st.composite
def styled(draw: st.DrawFn, value: Any, *, column: int) -> list[str]:
    """A value behind a key, in some style: on one line or in a block, at some indentation, with comments or not."""
    comment = draw(st.sampled_from(["", "   # c"]))
    block = draw(st.booleans()) and value
    if not block or not isinstance(value, dict | list):
        if isinstance(value, str) and value.isprintable() and draw(st.booleans()):
            quoted = "'" + value.replace("'", "''") + "'"
            return [f" {quoted}{comment}"]
        return [f" {wording.inline(value)}{comment}"]
    inner = column + draw(st.integers(1, 4))
    lines = [comment]
    if isinstance(value, list):
        return [comment, *(f"{' ' * inner}-  {wording.inline(item)}{comment}" for item in value)]
    for key, one in value.items():
        if draw(st.booleans()):
            lines.append(f"{' ' * inner}# about {wording.key_text(key)}")
        head, *rest = draw(styled(one, column=inner))
        lines += [f"{' ' * inner}{wording.key_text(key)}:{head}", *rest]
    return lines


@st.composite
def files(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A file with a section of three entries, and what they say."""
    entries: dict[str, Any] = {f"e{number}": draw(ENTRIES) for number in range(3)}
    lines = ["# top", "before: {a: 1}  # kept", "", "keys:  # of all"]
    apart = draw(st.booleans())
    for name, value in entries.items():
        head, *rest = draw(styled(value, column=2))
        lines += [*([""] if apart else []), f"  # {name} is", f"  {name}:{head}", *rest]
    lines += ["", "# bottom", "after: [x]"]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join(lines) + end, entries


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(files(), ENTRIES, st.integers(0, 3))
def test_any_entry_in_any_style_becomes_any_other(file: tuple[str, Mapping[str, Any]], value: dict[str, Any], at: int):
    """It reads as wanted, the others' lines stay, again changes nothing, and taking it out leaves the rest."""
    text, entries = file
    name = f"e{at}"
    after = with_entry(text, file="x", section="keys", name=name, value=value)
    read = parse(after, file="x")
    assert read is not None
    assert same(plain(read), {"before": {"a": 1}, "keys": {**entries, name: value}, "after": ["x"]})
    assert with_entry(after, file="x", section="keys", name=name, value=value) == after
    for kept in ("# top", "before: {a: 1}  # kept", "keys:  # of all", "# bottom", "after: [x]"):
        assert kept in after
    for other in entries.keys() - {name}:
        assert f"  # {other} is" in after
    without = parse(with_entry(after, file="x", section="keys", name=name, value=None), file="x")
    assert without is not None
    assert same(plain(without)["keys"], {key: one for key, one in entries.items() if key != name})
