"""Working hours: what people write and when it is open."""

from __future__ import annotations

import pytest

from orchestrator_fleet.spec.hours import is_open, parse_hours

MON, FRI, SAT, SUN = 0, 4, 5, 6


def at(text: str, weekday: int, clock: str) -> bool:
    """Whether the hours are open on a weekday at `HH:MM`."""
    hour, minute = clock.split(":")
    return is_open(parse_hours(text), weekday=weekday, minute=int(hour) * 60 + int(minute))


@pytest.mark.parametrize(
    ("text", "weekday", "clock", "is_it"),
    [
        ("Mon-Fri 08:00-18:00", MON, "08:00", True),
        ("Mon-Fri 08:00-18:00", MON, "07:59", False),
        ("Mon-Fri 08:00-18:00", FRI, "17:59", True),
        ("Mon-Fri 08:00-18:00", FRI, "18:00", False),
        ("Mon-Fri 08:00-18:00", SAT, "12:00", False),
        ("Mon-Fri 08:00-18:00, Sat 10:00-12:00", SAT, "11:00", True),
        ("08:00-18:00", SUN, "12:00", True),
        ("sat - mon 8:00 - 9:00", SUN, "08:30", True),
        ("Sat-Mon 08:00-09:00", FRI, "08:30", False),
        ("Fri 22:00-06:00", FRI, "23:00", True),
        ("Fri 22:00-06:00", SAT, "05:59", True),
        ("Fri 22:00-06:00", SAT, "06:00", False),
        ("Fri 22:00-06:00", FRI, "05:00", False),
        ("Sun 22:00-06:00", MON, "05:00", True),
        ("Mon 00:00-24:00", MON, "23:59", True),
    ],
)
def test_hours_are_open_from_the_first_minute_to_before_the_last(text, weekday, clock, is_it):
    """Over midnight too, and over the week's end."""
    assert at(text, weekday, clock) is is_it


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "got '', wanted days and a span"),
        ("always", "got 'always', wanted days and a span"),
        ("Mon-Fri", "got 'Mon-Fri', wanted days and a span"),
        ("Mun 08:00-18:00", "got the day 'Mun', wanted one of Mon, Tue"),
        ("Mon 08:60-18:00", "got 08:60, wanted a time from 00:00 to 24:00"),
        ("Mon 08:00-24:01", "got 24:01, wanted a time from 00:00 to 24:00"),
        ("Mon 24:00-08:00", "starts at 24:00; write 00:00 of the next day"),
        ("Mon 08:00-08:00", "starts and ends at the same minute"),
        (",".join(["Mon 08:00-09:00"] * 51), "has 51 parts, the limit is 50"),
    ],
)
def test_what_is_no_hours_says_what_is_wanted(text, problem):
    """The text names the part that is wrong."""
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        parse_hours(text)
