"""Durations, sizes, shares and instants: read, written, and read again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_fleet.spec import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("90s", 90.0),
        ("1.5h", 5400.0),
        ("7d", 604_800.0),
        (0, 0.0),
        ("0s", 0.0),
        ("3650d", 315_360_000.0),
    ],
)
def test_a_duration_is_seconds(text, seconds):
    """With its unit, or a bare 0."""
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("value", [5, "5", "5 s", "-1s", "1e3s", "", None, True, False, "1w", [], "\uff13s"])
def test_what_is_no_duration_is_refused(value):
    """A number without a unit above all."""
    with pytest.raises(ValueError, match="wanted a duration such as 90s"):
        units.parse_duration(value)


def test_times_and_sizes_have_an_upper_bound():
    """What no database column could hold is refused where it is written."""
    with pytest.raises(ValueError, match="wanted at most 3650d"):
        units.parse_duration("999999999999d")
    with pytest.raises(ValueError, match="wanted at most 1024TiB"):
        units.parse_size("999999999999TiB")


@given(st.decimals(0, 10**8, places=6), st.sampled_from(["ms", "s", "m", "h"]))
def test_a_duration_survives_being_written(number, unit):
    """To the microsecond: control.json carries what fleet.yaml says."""
    try:
        seconds = units.parse_duration(f"{number:f}{unit}")
    except ValueError as error:
        assert "at most" in str(error)  # noqa: PT017 - hypothesis may ask for a thousand years
        return
    assert units.parse_duration(units.format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@given(st.integers(0, 1 << 50))
def test_a_size_survives_being_written(size):
    """Exactly."""
    assert units.parse_size(units.format_size(size)) == size


@given(st.integers(0, 100_000))
def test_a_share_survives_being_written(thousandths):
    """To three decimals of a percent."""
    share = units.parse_share(f"{thousandths / 1000}%")
    assert units.parse_share(units.format_share(share)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-11-20T09:00:00Z", datetime(2026, 11, 20, 9, tzinfo=UTC)),
        ("2026-11-20T09:00:00", datetime(2026, 11, 20, 9, tzinfo=UTC)),
        ("2026-11-20", datetime(2026, 11, 20, tzinfo=UTC)),
        ("2026-11-20T10:00:00+01:00", datetime(2026, 11, 20, 10, tzinfo=timezone(timedelta(hours=1)))),
    ],
)
def test_an_instant_is_always_aware(text, instant):
    """Without an offset it is UTC, and it is written in UTC."""
    read = units.parse_instant(text)
    assert read == instant
    assert read.tzinfo is not None
    assert units.parse_instant(units.format_instant(read)) == read


@pytest.mark.parametrize("value", [20261120, None, "", "soon", "2026-13-01", True])
def test_what_is_no_instant_is_refused(value):
    """A number is no time."""
    with pytest.raises(ValueError, match="wanted a time such as 2026-11-20T09:00:00Z"):
        units.parse_instant(value)
