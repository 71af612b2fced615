"""The order of the line, pure: who is claimed next.

A task's *rank* is its priority's class (CRITICAL 0 .. LOW 3), less one for each `AGING_US` it has waited, down to 0.
The line is ordered by rank, then due date (none last), then creation, then id. The rank stands in the row, so that an
index is the line; a row also says when its place changes next (`ripens_at_us`: it wakes from a backoff, or rises a
class), and whoever claims lets ripe rows change first.
"""

from __future__ import annotations

import msgspec

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.tasks.task import PRIORITIES, Priority

AGING_US = 24 * 3600 * SECOND_US
NO_DUE_US = (1 << 63) - 1  # a task without a due date comes after all that have one
_CLASS = {priority: number for number, priority in enumerate(PRIORITIES)}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a TODO task stands. `wakes_at_us`: not claimable before; None when it is claimable now."""

    rank: int
    waiting_since_us: int
    wakes_at_us: int | None
    ripens_at_us: int | None


def rank_at(*, priority: Priority, waiting_since_us: int, now_us: int) -> int:
    """0 (next) to 3: the priority's class, raised by waiting."""
    return max(0, _CLASS[priority] - max(0, now_us - waiting_since_us) // AGING_US)


def place(*, priority: Priority, waiting_since_us: int, available_at_us: int | None, now_us: int) -> Place:
    """The place at `now_us` of a task that is TODO."""
    rank = rank_at(priority=priority, waiting_since_us=waiting_since_us, now_us=now_us)
    if available_at_us is not None and available_at_us > now_us:
        return Place(
            rank=rank, waiting_since_us=waiting_since_us, wakes_at_us=available_at_us, ripens_at_us=available_at_us
        )
    rises_at_us = waiting_since_us + (_CLASS[priority] - rank + 1) * AGING_US if rank else None
    return Place(rank=rank, waiting_since_us=waiting_since_us, wakes_at_us=None, ripens_at_us=rises_at_us)


def due_key_us(due_at_us: int | None) -> int:
    """The due date as a key to sort by."""
    return NO_DUE_US if due_at_us is None else due_at_us
