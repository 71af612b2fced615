"""What is used is kept by the minute, for as long as a budget asks for it."""

from __future__ import annotations

import pytest
from desk import Desk

from orchestrator_fleet.store.schema import spending as table
from orchestrator_fleet.tasks import spending
from orchestrator_fleet.tasks.spending import DAY_US, HOUR_US, MINUTE_US, Spent
from orchestrator_fleet.wire.link import Usage


def settle(desk: Desk, *used: tuple[str, Usage]) -> None:
    """Attempts end now, having used so much."""
    desk.store.write_sync(lambda c: spending.settle_all(c, used, now_us=desk.now))


def spent(desk: Desk, orchestrator: str = "vp-a") -> Spent:
    """What the windows that end now hold."""
    return desk.store.read_sync(lambda c: spending.spent(c, orchestrator, desk.now))


def test_what_a_minute_used_is_one_row_for_each_orchestrator(desk: Desk) -> None:
    """However many attempts end in it, together or one by one."""
    settle(desk, ("vp-a", Usage(usd=1.0)), ("vp-b", Usage(usd=5.0)), ("vp-a", Usage(usd=2.0)))
    desk.clock.advance(59)
    settle(desk, ("vp-a", Usage(usd=3.0, input_tokens=10)))
    assert spent(desk) == Spent(usd_24h=6.0, tokens_1h=10, mean_usd=2.0, mean_tokens=10 / 3)
    assert spent(desk, "vp-b").usd_24h == 5.0
    assert spent(desk, "nobody") == Spent()
    assert desk.store.read_sync(lambda c: len(c.execute(table.select()).all())) == 2


def test_tokens_are_those_that_a_providers_limits_count() -> None:
    """Reading its cache is none of them."""
    usage = Usage(input_tokens=1, output_tokens=20, cache_write_tokens=300, cache_read_tokens=4_000)
    assert spending.counted(usage) == 321


@pytest.mark.parametrize(("window_us", "field"), [(HOUR_US, "tokens_1h"), (DAY_US, "usd_24h")])
def test_a_minute_counts_until_all_of_it_has_left_the_window(desk: Desk, window_us: int, field: str) -> None:
    """So that a budget is never passed by what was used at its end."""
    desk.clock.advance(30)
    settle(desk, ("vp-a", Usage(usd=1.0, output_tokens=1)))
    desk.clock.advance((window_us + MINUTE_US) / 1e6 - 30 - 0.000001)
    assert getattr(spent(desk), field) == 1
    desk.clock.advance(0.000001)
    assert getattr(spent(desk), field) == 0


def test_what_no_budget_asks_for_any_more_is_dropped(desk: Desk) -> None:
    """By the next attempt of the same orchestrator."""
    settle(desk, ("vp-a", Usage(usd=1.0)), ("vp-b", Usage(usd=1.0)))
    desk.clock.advance(2 * 86_400 + 60)
    settle(desk, ("vp-a", Usage(usd=1.0)))
    rows = desk.store.read_sync(lambda c: c.execute(table.select()).all())
    assert sorted(row.orchestrator for row in rows) == ["vp-a", "vp-b"]


def test_the_moment_of_room_is_that_at_which_enough_has_left(desk: Desk) -> None:
    """The first minutes go first; what runs and is not spent yet may need the whole window."""
    began_us = desk.now
    for usd in (1.0, 2.0, 4.0):
        settle(desk, ("vp-a", Usage(usd=usd)))
        desk.clock.advance(600)

    def at(over: float) -> int:
        return desk.store.read_sync(lambda c: spending.usd_frees_at(c, "vp-a", over=over, now_us=desk.now))

    left_us = [began_us + n * 600_000_000 + DAY_US + MINUTE_US for n in range(3)]
    assert [at(0.0), at(0.99), at(1.0), at(2.99), at(3.0), at(6.99)] == [
        left_us[0],
        left_us[0],
        left_us[1],
        left_us[1],
        left_us[2],
        left_us[2],
    ]
    assert at(7.0) == desk.now + DAY_US
