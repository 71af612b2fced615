"""Tables, cells and spans."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from orchestrator_fleet.cli import output


def test_a_plain_table_is_aligned_and_has_no_trailing_space() -> None:
    """Two spaces between columns."""
    assert output.plain_table(("id", "title"), [["a", "x y"], ["long", ""]]) == "id    title\na     x y\nlong\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        ("", "-"),
        (0, "0"),
        (["a"], '["a"]'),
        ("two\nlines", "two lines"),
        ("\x1b[31mred\x07", "[31mred"),
        ("é" * 300, "é" * 199 + "…"),
    ],
)
def test_a_cell_is_one_harmless_line(value: object, shown: str) -> None:
    """Nothing in a task's title moves a cursor or breaks a row."""
    assert output.cell(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.42, "0.4s"), (12.9, "12s"), (95, "1m"), (7_300, "2h"), (200_000, "2d")]
)
def test_a_span_is_told_in_its_largest_unit(seconds: float, shown: str) -> None:
    """Short enough for a column."""
    assert output.span(seconds) == shown


def test_an_age_counts_from_now() -> None:
    """A clock that is behind shows nought, not a negative age."""
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert output.age("2026-01-01T11:55:00.000000Z", now=now) == "5m"
    assert output.age("2026-01-01T12:00:01Z", now=now) == "0.0s"
    assert output.age(None) == "-"
