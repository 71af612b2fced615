"""The YAML reader: values, places, and what it refuses to be led into."""

from __future__ import annotations

import math

import pytest
import yaml

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.spec import yaml_tree
from orchestrator_fleet.spec.yaml_tree import ListNode, MappingNode, Place, ScalarNode, edited, parse, plain

TEXT = """\
# a comment
version: 1
machines:
  m01: {slots: 8}
  "quoted": &a
    - one
    - 2
  again: *a
"""


def read(text: str):
    """The plain value of a text."""
    node = parse(text, file="x.yaml")
    assert node is not None
    return plain(node)


def refusal(text: str) -> str:
    """What a text is refused with."""
    with pytest.raises(SpecInvalid) as refused:
        parse(text, file="x.yaml")
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("12:30", "12:30"),
        ("190:20:30", "190:20:30"),
        ("1_000", "1_000"),
        ("2026-11-20", "2026-11-20"),
        ("2026-11-20T09:00:00Z", "2026-11-20T09:00:00Z"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1e999", "1e999"),
        ("-", "-"),
        ("'12'", "12"),
        ('"true"', "true"),
        ("1" * 18, int("1" * 18)),
        ("1" * 64, "1" * 64),
        ("=", "="),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object):
    """Only null, booleans, integers and floats that JSON can carry are anything but text."""
    if text == "-":
        assert yaml_tree.resolve(text) == value
        return
    got = read(f"key: {text}")["key"]
    assert got == value
    assert type(got) is type(value)


def test_a_block_scalar_of_digits_is_text():
    """The style decides: only unquoted scalars are resolved."""
    assert read("key: |\n  12\n") == {"key": "12\n"}


def test_every_key_and_value_knows_its_place():
    """Lines and columns count from 1, and an alias stands where its anchor does."""
    root = parse(TEXT, file="x.yaml")
    assert isinstance(root, MappingNode)
    machines = root.child("machines")
    assert isinstance(machines, MappingNode)
    assert root.entries["version"].key_at == Place("x.yaml", 2, 1)
    assert root.entries["version"].node.at == Place("x.yaml", 2, 10)
    assert machines.entries["m01"].key_at == Place("x.yaml", 4, 3)
    assert machines.entries["m01"].node.at == Place("x.yaml", 4, 8)
    quoted = machines.child("quoted")
    assert isinstance(quoted, ListNode)
    assert [item.at[1:] for item in quoted.items.values()] == [(6, 7), (7, 7)]
    assert machines.child("again") is quoted


def test_places_count_from_the_line_the_text_starts_on():
    """Front matter starts on line 2 of its file."""
    root = parse("a: 1\nb: 2\n", file="c.md", first_line=2)
    assert isinstance(root, MappingNode)
    assert root.entries["b"].key_at == Place("c.md", 3, 1)


def test_columns_count_characters_not_bytes():
    """What an editor shows as column 8 is column 8."""
    root = parse("é😀: {b: 1}\n", file="x.yaml")
    assert isinstance(root, MappingNode)
    inner = root.child("é😀")
    assert isinstance(inner, MappingNode)
    assert inner.entries["b"].key_at == Place("x.yaml", 1, 6)


def test_windows_line_ends_and_a_byte_order_mark_are_fine():
    """Both count for nothing."""
    assert read("\ufeffa: 1\r\nb: x\r\n") == {"a": 1, "b": "x"}


def test_nothing_but_comments_is_no_document():
    """The caller says what an empty file means."""
    assert parse("# nothing\n", file="x.yaml") is None


def test_the_pure_parser_reads_the_same(monkeypatch: pytest.MonkeyPatch):
    """Where libyaml is missing, values and places are the same."""
    fast = parse(TEXT, file="x.yaml")
    monkeypatch.setattr(yaml_tree, "_Loader", yaml.SafeLoader)
    slow = parse(TEXT, file="x.yaml")
    assert fast is not None
    assert slow is not None
    assert plain(fast) == plain(slow)
    places = [[(path, node.at) for path, node in yaml_tree.walk(root)] for root in (fast, slow)]
    assert places[0] == places[1]


def test_aliases_are_counted_as_what_they_expand_to(monkeypatch: pytest.MonkeyPatch):
    """Ten lists of ten of ten are over a thousand values, however short the text is."""
    monkeypatch.setattr(yaml_tree, "MAX_NODES", 1_000)
    text = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    assert len(read(text)["b"]) == 10
    assert "expands to more than 1000 values" in refusal(text + f"c: [{', '.join(['*b'] * 10)}]\n")


def test_the_value_limit_stops_reading_at_once(monkeypatch: pytest.MonkeyPatch):
    """Events after the limit are never asked for."""
    monkeypatch.setattr(yaml_tree, "MAX_NODES", 10)
    taken = []
    real = yaml_tree._Builder.take
    monkeypatch.setattr(yaml_tree._Builder, "take", lambda self, event: (taken.append(event), real(self, event))[1])
    refusal("- x\n" * 10_000)
    assert len(taken) < 20


def test_depth_counts_through_aliases():
    """A chain of aliases is as deep as what it stands for."""
    chain = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))
    assert "nested deeper than 50 levels" in refusal(chain)


def test_deep_text_is_refused_without_recursion():
    """Four megabytes of brackets end at the fiftieth."""
    assert "nested deeper than 50 levels" in refusal("a: " + "[" * (4 << 20))


def test_an_anchor_may_be_set_again():
    """The nearest one above counts, as YAML says."""
    assert read("a: &x 1\nb: *x\nc: &x 2\nd: *x\n") == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_an_alias_may_be_a_key():
    """If it stands for text."""
    assert read("a: &x name\n*x : 1\n") == {"a": "name", "name": 1}
    assert "keys are text" in refusal("a: &x [1]\n*x : 1\n")


def test_all_problems_of_a_text_come_at_once():
    """Reading goes on after a duplicate, a tag, a merge key and a number as a key."""
    lines = refusal("a: 1\na: 2\nb: !x 1\n<<: {}\n3: 4\n").splitlines()
    assert [line.split(": ")[0] for line in lines] == ["x.yaml:2:1", "x.yaml:3:4", "x.yaml:4:1", "x.yaml:5:1"]


def test_a_quoted_merge_sign_is_a_name_like_any_other():
    """It is YAML's, not ours, that `<<` is special."""
    assert read('"<<": 1\n') == {"<<": 1}


def test_edited_replaces_and_removes_and_leaves_the_first_tree_alone():
    """Positions are those of the list as it was."""
    root = parse("a: [1, 2, 3]\nb: {c: 1, d: 2}\n", file="x.yaml")
    assert root is not None
    seven = ScalarNode(Place("x.yaml", 1, 1), 7)
    new = edited(root, {("a", 0): None, ("a", 2): seven, ("b", "c"): None, ("b", "x"): None, ("y", "z"): None})
    assert plain(new) == {"a": [2, 7], "b": {"d": 2}}
    assert plain(root) == {"a": [1, 2, 3], "b": {"c": 1, "d": 2}}
    assert isinstance(new, MappingNode)
    left = new.child("a")
    assert isinstance(left, ListNode)
    assert list(left.items) == [1, 2]


def test_no_number_is_infinite():
    """What JSON cannot say stays text."""
    assert all(not isinstance(v, float) or math.isfinite(v) for v in read("[1e308, 1e309, -1e309, .inf, .nan]"))
