"""How long to wait before trying again: longer after each failure, never all at the same moment."""

from __future__ import annotations

import random

_MOST_DOUBLINGS = 16


def delay_s(failures: int, *, first_s: float, longest_s: float, chance: float) -> float:
    """Seconds to wait after so many failures in a row: `first_s` doubled each time up to `longest_s`.

    Half of it is random: `chance` is 0..1.
    """
    doublings = min(max(failures - 1, 0), _MOST_DOUBLINGS)
    return min(longest_s, first_s * float(2**doublings)) * (0.5 + chance / 2)


def chance() -> float:
    """0..1, from the system."""
    return random.random()  # noqa: S311 - it spreads retries, it guards nothing
