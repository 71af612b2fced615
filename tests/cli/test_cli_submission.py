"""Many tasks at once: their order, their dependencies, and when waiting is over."""

from __future__ import annotations

import json

import pytest

from orchestrator_fleet.cli import submission
from orchestrator_fleet.errors import FleetError


def _parse(items: object) -> list[str]:
    return [item["title"] for item in submission.parse(json.dumps(items), name="tasks.json")]


def test_items_come_after_what_they_wait_for() -> None:
    """Else in the order of the file."""
    items = [
        {"title": "c", "after": ["b"]},
        {"title": "a", "ref": "a"},
        {"title": "b", "ref": "b", "after": ["a"]},
        {"title": "d"},
    ]
    order = _parse(items)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order.index("a") < order.index("b") < order.index("c")


def test_one_object_is_a_list_of_one() -> None:
    """So that a single task can stand in a file too."""
    assert _parse({"title": "only"}) == ["only"]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ("text", "wanted a JSON list of objects"),
        ([1], "wanted a JSON list of objects"),
        ([{"title": "a", "after": ["x"]}], "[0].after: no item has the ref 'x'"),
        ([{"title": "a", "ref": "r"}, {"title": "b", "ref": "r"}], "the ref 'r' stands twice"),
        (
            [{"title": "a", "ref": "a", "after": ["b"]}, {"title": "b", "ref": "b", "after": ["a"]}],
            "the items wait for each other: ",
        ),
        ([{"title": "a", "ref": "a", "after": ["a"]}], "the items wait for each other: a -> a"),
    ],
)
def test_a_list_that_cannot_be_ordered_is_refused(items: object, problem: str) -> None:
    """Before anything is created."""
    with pytest.raises(FleetError) as error:
        _parse(items)
    assert problem in str(error.value)
    assert str(error.value).startswith("tasks.json: ")


def test_text_that_is_not_json_is_refused() -> None:
    """With where it stops being so."""
    with pytest.raises(FleetError, match=r"not JSON.*line 1"):
        submission.parse("{", name="x")


def _task(status: str, reason: str | None = None, *depends_on: str) -> dict[str, object]:
    return {"status": status, "blocked_reason": reason, "depends_on": list(depends_on)}


@pytest.mark.parametrize(
    ("tasks", "moving"),
    [
        ({"a": _task("TODO"), "b": _task("IN_PROGRESS"), "c": _task("DONE")}, {"a", "b"}),
        ({"a": _task("BLOCKED", "attempts_exhausted")}, set()),
        ({"a": _task("TODO"), "b": _task("BLOCKED", "dependency", "a")}, {"a", "b"}),
        ({"a": _task("CANCELLED"), "b": _task("BLOCKED", "dependency", "a")}, set()),
        (
            {
                "a": _task("BLOCKED", "approval"),
                "b": _task("BLOCKED", "dependency", "a"),
                "c": _task("BLOCKED", "dependency", "b"),
            },
            set(),
        ),
        ({"a": _task("BLOCKED", "dependency", "elsewhere")}, {"a"}),
        ({"a": _task("DONE"), "b": _task("BLOCKED", "dependency", "a")}, {"b"}),
    ],
)
def test_waiting_is_over_when_nothing_can_move_by_itself(tasks, moving: set[str]) -> None:
    """A dependency that will never be done ends the wait of all behind it."""
    assert submission.moving(tasks) == moving


def test_counts_tell_how_far_it_is() -> None:
    """In one line."""
    tasks = [_task("DONE"), _task("TODO"), _task("BLOCKED"), _task("IN_PROGRESS"), _task("CANCELLED")]
    assert submission.counts(tasks) == "1 of 5 done, 1 in progress, 2 waiting, 1 cancelled"
