"""Pure: the place in line over time, and the wait before the next try."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_fleet.tasks import line
from orchestrator_fleet.tasks.backoff import RetryPolicy, wait_us
from orchestrator_fleet.tasks.line import AGING_US
from orchestrator_fleet.tasks.task import PRIORITIES

times = st.integers(min_value=0, max_value=10 * AGING_US)


@given(priority=st.sampled_from(PRIORITIES), since=times, now=times)
def test_a_rank_rises_one_class_a_day_and_never_above_the_first(priority: str, since: int, now: int) -> None:
    """LOW reaches the top after three days."""
    rank = line.rank_at(priority=priority, waiting_since_us=since, now_us=now)
    days = max(0, now - since) // AGING_US
    assert rank == max(0, PRIORITIES.index(priority) - days)


@given(priority=st.sampled_from(PRIORITIES), since=times, now=times, available=st.none() | times)
def test_nothing_changes_before_a_place_ripens_and_something_does_then(
    priority: str, since: int, now: int, available: int | None
) -> None:
    """So an index on that one moment is enough to keep the line right."""

    def at(moment: int) -> line.Place:
        return line.place(priority=priority, waiting_since_us=since, available_at_us=available, now_us=moment)

    place = at(now)
    if place.ripens_at_us is None:
        assert place.wakes_at_us is None
        assert at(now + 100 * AGING_US) == place
        return
    assert place.ripens_at_us > now
    assert at(place.ripens_at_us - 1) == place or place.wakes_at_us is not None
    ripe = at(place.ripens_at_us)
    assert (ripe.rank, ripe.wakes_at_us) != (place.rank, place.wakes_at_us)


@given(failures=st.integers(min_value=1, max_value=10_000), roll=st.floats(min_value=0, max_value=1))
def test_a_wait_doubles_up_to_its_most_and_stays_within_the_jitter(failures: int, roll: float) -> None:
    """Also after very many failures."""
    wait = wait_us(RetryPolicy(backoff_s=2, backoff_max_s=300, jitter=0.2), failures=failures, roll=roll) / 1e6
    base = min(2 * 2 ** min(failures - 1, 20), 300)
    assert base * 0.8 - 1e-6 <= wait <= base * 1.2 + 1e-6


@pytest.mark.parametrize(("failures", "seconds"), [(1, 2), (2, 4), (3, 8), (8, 256), (9, 300), (50, 300)])
def test_the_waits_without_jitter(failures: int, seconds: int) -> None:
    """2, 4, 8 ... 300 seconds."""
    assert wait_us(RetryPolicy(jitter=0), failures=failures, roll=0.9) == seconds * 1_000_000
